"""The pythia-70m scale from start to finish: on a hub, and where there is only what was kept."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from hub import COMMITS, PYTHIA, TEXT, TEXT_REVISION, LocalHub
from test_gemma import finish, log_of, start

from lab.scales import SCALES, Scale


def small(**changes) -> Scale:
    """The pythia-70m scale with its sizes cut down; names, tasks and text stay."""
    sizes = tiny.SMALL | {"training_tokens": 24 * 256, "n_seeds": 1, "absorption_words": 800}
    return replace(SCALES["pythia-70m"], **sizes | changes)


@pytest.fixture(scope="module")
def online(hub, tmp_path_factory) -> SimpleNamespace:
    folder, cache = tmp_path_factory.mktemp("online"), tmp_path_factory.mktemp("cache")
    out = finish(start(hub, cache, folder, small()), folder)
    return SimpleNamespace(folder=folder, out=out, results=results_of(folder))


def results_of(folder: Path) -> dict:
    return json.loads((folder / "run_2" / "final_info.json").read_text(encoding="utf-8"))


def test_the_pythia_scale_runs_start_to_finish(online):
    (entry,) = online.results.values()
    assert list(online.results) == ["pythia-70m layer 3"]
    missing = {name for name, value in entry["means"].items() if value is None}
    between_seeds = ("_rank_correlation", "_mcc", "_mcc_null", "_over_seeds")
    assert all(name.endswith(between_seeds) for name in missing), "of which there is one here"
    assert entry["means"]["absorption_letters"] >= 20
    assert len(entry["per_task"]["probing_top_1"]) == 8
    config = json.loads((online.folder / "run_2" / "config.json").read_text())
    assert config["language_model"]["files"] == COMMITS[PYTHIA]
    assert f"{TEXT}@{TEXT_REVISION}/plain_text/train-00000-of-00004.parquet" in online.out


def test_what_sae_bench_notes_down_as_the_models_dtype_is_what_it_read_in(online):
    """Training reads in bfloat16, scores in float32: the same model twice."""
    config = json.loads((online.folder / "run_2" / "config.json").read_text())
    assert config["language_model"]["dtype"] == "torch.bfloat16"
    (entry,) = online.results.values()
    for kind in ("sparse_probing", "absorption"):
        for result in entry["sae_bench"][kind]:
            assert result["eval_config"]["llm_dtype"] == "float32"
            assert result["sae_cfg_dict"]["dtype"] == "float32"


KEEP = f"""
from huggingface_hub import snapshot_download
snapshot_download("{PYTHIA}")
snapshot_download("{TEXT}", repo_type="dataset", revision="{TEXT_REVISION}")
for name in ("LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5", "fancyzhx/ag_news",
             "Helsinki-NLP/europarl", "codeparrot/github-code"):
    snapshot_download(name, repo_type="dataset", ignore_patterns="*.py")
"""


def test_without_a_network_what_the_hubs_client_keeps_is_read_with_the_same_results(
    hub, online, tmp_path
):
    with LocalHub(hub.folder) as other:  # an empty home of its own
        environment = os.environ | other.environment
        subprocess.run([sys.executable, "-c", KEEP], env=environment, check=True, timeout=300)
        asked = len(other.requests)
        for name, how in (
            ("flag", {"HF_HUB_OFFLINE": "1"}),
            ("gone", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        ):
            folder = tmp_path / name
            folder.mkdir()
            quick = name == "gone"  # trained on the same, not scored
            process = start(other, folder / "cache", folder, small(), quick=quick, **how)
            out = finish(process, folder)
            assert "the hub cannot be reached" in out
            assert log_of(folder) == log_of(online.folder)
            assert quick or results_of(folder) == online.results
        assert len(other.requests) == asked, "nobody was asked"


def test_without_a_network_what_is_not_kept_is_named_before_any_work(hub, tmp_path):
    with LocalHub(hub.folder) as other:
        process = start(other, tmp_path / "cache", tmp_path, small(), HF_HUB_OFFLINE="1")
        finish(process, tmp_path, status=1)
    message = (tmp_path / "stderr").read_text()
    assert f"the model {PYTHIA} is not kept on this machine" in message
    assert f"no text of {TEXT}@{TEXT_REVISION} is kept on this machine" in message
    assert "Traceback" not in message
    assert not re.search("training step|first-letter", (tmp_path / "stdout").read_text())
