"""What surrounds a run: paths of the environment, Python, locks, terminals, the log's receiver."""

import errno
import os
import re
import subprocess
import sys
import tomllib

import pytest
import test_rooms
from made_up_runs import LAPTOP, draw, records, usual_entry, write_run
from packaging.requirements import Requirement
from tiny import ROOT, run_script, tiny_scale

from lab.process import ExperimentError, file_lock


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


# ── Python and systems ──────────────────────────────────────────────────────────────────────────

PRETEND = """
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "numpy", "matplotlib")))  # nothing is installed
sys.{what} = {value!r}
sys.argv = [{script!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("script", ["experiment.py", "plot.py"])
@pytest.mark.parametrize(
    ("what", "value", "sentence"),
    [
        ("version_info", (3, 13, 1), "wheel for Python 3.13: use Python 3.11 or 3.12"),
        ("version_info", (3, 10, 9), "wheel for Python 3.10: use Python 3.11 or 3.12"),
        ("platform", "win32", "error: Windows lacks the file locks used here: run this inside WSL"),
    ],
)
def test_a_python_or_system_that_cannot_run_this_is_told_before_any_package_is_imported(
    what, value, sentence, script
):
    code = PRETEND.format(what=what, value=value, script=str(ROOT / script))
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: ") and sentence in line


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_project_names_the_pythons_that_its_pins_have_wheels_for():
    assert project()["requires-python"] == ">=3.11,<3.13"


@pytest.mark.parametrize("first", ["sae_lens", "experiment"])
def test_what_the_readme_imports_can_be_imported_in_either_order(first):
    """After the README's install, which takes out a torchvision built for another torch."""
    other = {"sae_lens": "experiment", "experiment": "sae_lens"}[first]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {first}; import {other}; "
    code += "experiment.register_with_sae_lens()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ── The packages, said three times ──────────────────────────────────────────────────────────────

PINNED = {
    line.partition("==")[0]: line.partition("#")[0].strip()
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
}


def inline_metadata(script: str) -> dict:
    """What `uv run` reads at a script's head: found as PEP 723 says, which gives the pattern."""
    text = (ROOT / script).read_text(encoding="utf-8")
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (block,) = (found for found in re.finditer(pattern, text) if found["type"] == "script")
    lines = (line.removeprefix("#").removeprefix(" ") for line in block["content"].splitlines())
    return tomllib.loads("\n".join(lines))


def test_uv_gives_the_experiment_what_pip_does():
    """All but the tests' own; and pip, with which the language model is fetched."""
    found = inline_metadata("experiment.py")
    wanted = [pin for name, pin in PINNED.items() if name not in ("pytest", "pytest-xdist", "ruff")]
    assert found["dependencies"] == [*wanted, "pip"]
    assert found["requires-python"] == project()["requires-python"]
    (left_out,) = found["tool"]["uv"]["override-dependencies"]
    requirement = Requirement(left_out)
    assert requirement.name == "torchvision" and not requirement.marker.evaluate()


def test_uv_gives_the_figures_what_pip_does():
    found = inline_metadata("plot.py")
    outside = {name.partition(".")[0] for name in test_rooms.reached("plot")}
    assert found["dependencies"] == [PINNED[name] for name in PINNED if name in outside]
    assert found["requires-python"] == project()["requires-python"]


# ── Terminals ───────────────────────────────────────────────────────────────────────────────────


def test_a_terminal_that_is_not_utf8_costs_signs_and_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    for name in ("run_1", "run_7"):
        write_run(tmp_path, name, {LAPTOP: usual_entry()}, records(8))
    process = draw(tmp_path)
    assert process.returncode == 0, process.stderr
    assert "?" in process.stdout and "Traceback" not in process.stderr
    assert (tmp_path / "report.html").exists()
    command = [sys.executable, str(ROOT / "experiment.py")]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert process.returncode == 1 and "UnicodeEncodeError" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith("error: --out_dir is missing")


# ── Locks ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wait", [True, False])
def test_a_lock_is_ours_alone_until_it_is_let_go(tmp_path, wait):
    with file_lock(tmp_path / "lock", wait) as free:
        assert free
        with file_lock(tmp_path / "lock") as again:
            assert not again
    with file_lock(tmp_path / "lock") as free:
        assert free


def test_a_file_system_without_locks_is_told_with_its_folder_and_a_way_round(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ExperimentError) as error, file_lock(tmp_path / "lock", wait=True):
        pass
    message = str(error.value)
    assert f"the file system of {tmp_path} has no locks (Function not implemented)" in message
    assert "COSINE_SAE_CACHE" in message and "--out_dir" in message


NO_LOCKS = """
import errno, fcntl
def flock(file, how):
    if {part!r} in file.name:
        raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


@pytest.mark.parametrize(("part", "folder"), [("run_7", "run_7"), ("models", "cache")])
def test_a_run_where_there_are_no_locks_ends_in_one_sentence(tiny_model, tmp_path, part, folder):
    scale = tiny_scale(tiny_model)
    if folder == "cache":
        part = "documents"  # the first thing that this scale keeps
    process = run_script(
        "--out_dir=run_7", scale=scale, cache=tmp_path / "cache", cwd=tmp_path,
        patch=NO_LOCKS.format(part=part),
    )  # fmt: skip
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last.startswith("error: the file system of ") and folder in last
    assert "No locks available" in last and "Traceback" not in process.stderr


# ── Weights & Biases ────────────────────────────────────────────────────────────────────────────


def test_a_log_that_cannot_be_sent_is_told_before_any_work(tiny_model, tmp_path):
    process = run_script(
        "--out_dir=run_7", scale=tiny_scale(tiny_model), cache=tmp_path / "cache", cwd=tmp_path,
        WANDB_PROJECT="sae", HOME=str(tmp_path), WANDB_API_KEY="",
    )  # fmt: skip
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last.startswith("error: Weights & Biases refuses (No API key configured")
    assert last.endswith("run `wandb login`, set WANDB_MODE=offline, or unset WANDB_PROJECT")
    assert not (tmp_path / "run_7" / "config.json").exists()


def test_a_training_that_is_taken_up_stays_one_run_of_weights_and_biases(tiny_model, tmp_path):
    how = {"WANDB_PROJECT": "sae", "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    scale = tiny_scale(tiny_model, checkpoint_seconds=0)
    stop = "step = experiment.Trainer.step\n"
    stop += "def stopping(self, x):\n    import os, signal\n"
    stop += "    if self.steps_done == 9: os.kill(os.getpid(), signal.SIGTERM)\n"
    stop += "    return step(self, x)\nexperiment.Trainer.step = stopping"
    shared = {"scale": scale, "cache": tmp_path / "cache", "cwd": tmp_path, "quick": True, **how}
    assert run_script("--out_dir=run_7", patch=stop, **shared).returncode == 75
    process = run_script("--out_dir=run_7", **shared)
    assert process.returncode == 0, process.stderr
    assert "going on from the checkpoint of step 10" in process.stdout
    runs = [path.name for path in tmp_path.glob("wandb/offline-run-*")]
    assert len(runs) == 2, "two executions"
    assert len({name.split("-")[-1] for name in runs}) == 1, "of one run"
