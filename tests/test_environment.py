"""Where the environment points: paths mean the folder in which the command was typed."""

import os
import subprocess
import sys

import pytest
from tiny import ROOT, run_script, tiny_scale


@pytest.mark.parametrize("name", ["COSINE_SAE_CACHE", "HF_HOME", "HF_DATASETS_CACHE", "WANDB_DIR"])
def test_a_relative_path_is_made_absolute_before_any_library_reads_it(tmp_path, name):
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import lab; "
    code += f"print(os.environ[{name!r}])"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {name: "some/folder"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == str(tmp_path / "some/folder")


def test_a_relative_cache_gives_the_same_bytes_as_an_absolute_one(tiny_model, tmp_path):
    """SAE-Bench works in a folder of its own: probes were not found from there and made anew."""
    scale = tiny_scale(tiny_model, tasks=("sentiment",))
    for cache, folder in ((tmp_path / "cache", "a"), ("../cache", "b")):
        (tmp_path / folder).mkdir()
        process = run_script("--out_dir=run_7", scale=scale, cache=cache, cwd=tmp_path / folder)
        assert process.returncode == 0, process.stderr
    first, second = (tmp_path / folder / "run_7/final_info.json" for folder in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob("b/*cache*"))
