"""The gemma-2-2b scale, start to finish, against a hub on this machine: everything but the weights.

A tiny random Gemma-2, OpenWebText and SAE-Bench's eight datasets in the official layout are served
over HTTP; the real script runs in processes of its own, is killed, stopped and started again.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from hub import MODEL, TEXT, TEXT_REVISION, LocalHub

from lab.scales import SCALES, Scale

LAYERS = (0, 1, 2)
OFFICIAL = json.loads((tiny.ROOT / "run_0" / "final_info.json").read_text(encoding="utf-8"))


def small(**changes) -> Scale:
    """The gemma-2-2b scale with its sizes cut down; names, tasks, text and layers' number stay."""
    sizes = tiny.SMALL | {
        "layers": LAYERS,
        "training_tokens": 24 * 256,
        "n_seeds": 1,
        "checkpoint_seconds": 0,
    }
    return replace(SCALES["gemma-2-2b"], **sizes | changes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def start(
    hub: LocalHub,
    cache: Path,
    cwd: Path,
    scale: Scale,
    patch: str = "",
    launcher: tuple[str, ...] = (),
    quick: bool = False,
    **environment: str,
) -> subprocess.Popen:
    """`python experiment.py --out_dir=run_2` in `cwd`, or under a launcher; prints into files.

    `quick`: nothing is scored."""
    driver, root = cwd / "driver.py", str(tiny.ROOT)
    values = {"scale": json.dumps(asdict(scale)), "recipe": json.dumps(asdict(tiny.RECIPE))}
    how = {"patch": patch, "few_k": True, "quick": quick}
    driver.write_text(tiny.DRIVER.format(root=root, script=root, **values, **how))
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("WANDB")}
    ours = {"EXPERIMENT_SCALE": scale.name, "COSINE_SAE_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, *launcher, str(driver), "--out_dir=run_2"],
        cwd=cwd,
        env=inherited | hub.environment | ours | environment,
        stdout=(cwd / "stdout").open("w"),
        stderr=(cwd / "stderr").open("w"),
        start_new_session=True,
    )


def finish(process: subprocess.Popen, cwd: Path, status: int = 0) -> str:
    """Wait; returns stdout after a look at the exit status, which must be `status`."""
    process.wait(timeout=900)
    out, err = (cwd / "stdout").read_text(), (cwd / "stderr").read_text()
    assert process.returncode == status, (process.returncode, out[-2000:], err[-2000:])
    return out


def work_of(cache: Path, pattern: str = "") -> list[Path]:
    """What unfinished runs have in the cache."""
    return sorted((cache / "training").glob(f"*/{pattern}"))


def log_of(folder: Path) -> list[dict]:
    """The training log less the speed, the one thing that may differ."""
    lines = (folder / "run_2" / "training_log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_second"} for x in lines]


@pytest.fixture(scope="module")
def undisturbed(hub, cache, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("undisturbed")
    out = finish(start(hub, cache, folder, small()), folder)
    text = (folder / "run_2" / "final_info.json").read_text(encoding="utf-8")
    return SimpleNamespace(folder=folder, out=out, text=text, results=json.loads(text))


def test_the_gemma_scale_runs_start_to_finish_on_all_three_layers(undisturbed):
    entries = [f"gemma-2-2b layer {layer}" for layer in LAYERS]
    assert list(undisturbed.results) == entries
    for entry in entries:
        means = undisturbed.results[entry]["means"]
        missing = {name for name, value in means.items() if value is None}
        between_seeds = ("_rank_correlation", "_mcc", "_mcc_null", "_over_seeds")
        assert all(name.endswith(between_seeds) for name in missing), "of which there is one here"
        assert means["absorption_letters"] >= 20
        assert len(undisturbed.results[entry]["per_task"]["probing_top_1"]) == 8
    config = json.loads((undisturbed.folder / "run_2" / "config.json").read_text())
    assert re.fullmatch("[0-9a-f]{40}", config["language_model"]["files"]), "the model's commit"
    assert {p.name for p in (undisturbed.folder / "run_2" / "sae").iterdir()} == {
        f"layer_{layer}_seed_0" for layer in LAYERS
    }


def test_every_layer_is_trained_in_the_same_pass_of_the_text(undisturbed):
    log = log_of(undisturbed.folder)
    assert [(r["step"], r["layer"]) for r in log] == [(s, x) for s in range(24) for x in LAYERS]
    assert len({json.dumps(r["loss"]) for r in log if r["step"] == 0}) == len(LAYERS)


def test_probing_is_configured_as_in_the_given_baseline(undisturbed):
    (given,) = OFFICIAL["gemma-2-2b layer 5"]["sae_bench"]["sparse_probing"]
    for entry in (f"gemma-2-2b layer {layer}" for layer in LAYERS):
        for found in undisturbed.results[entry]["sae_bench"]["sparse_probing"]:
            ours = found["eval_config"]
            cut_down = {"probe_train_set_size", "probe_test_set_size", "context_length", "k_values"}
            assert ours.keys() == given["eval_config"].keys()
            for name in ours.keys() - cut_down:
                assert ours[name] == given["eval_config"][name], name
    scale = SCALES["gemma-2-2b"]
    for name in ("probe_train_set_size", "probe_test_set_size", "context_length"):
        assert getattr(scale, name) == given["eval_config"][name]
    assert list(scale.k_values) == given["eval_config"]["k_values"]


def test_the_text_is_streamed_at_its_pinned_revision_and_no_dataset_is_kept(hub, undisturbed):
    asked = [path for _, path in hub.requests if f"/datasets/{TEXT}/resolve/" in path]
    assert asked
    assert all(f"/resolve/{TEXT_REVISION}/" in path for path in asked)


def test_no_code_is_fetched_from_the_hub_and_none_executed(hub, undisturbed):
    """One of SAE-Bench's eight datasets comes with a loading script of its own."""
    assert hub.asked("/datasets/codeparrot/github-code/resolve/", "GET")
    assert not hub.asked("github-code.py")
    assert (hub.folder / "datasets" / "codeparrot" / "github-code" / "github-code.py").exists()


def test_of_the_probing_texts_residuals_nothing_but_means_is_kept_on_disk(cache, undisturbed):
    """SAE-Bench's way would take 53 GB a layer at the full size."""
    kept = [p for kind in ("probing", "residuals") for p in (cache / kind).rglob("*.safetensors")]
    texts = 36 * (40 + 20) // 2  # classes, texts of each
    tokens, means = texts * 32 * 8, texts * len(LAYERS) * 64 * 2  # positions; width; bytes
    assert sum(path.stat().st_size for path in kept) < tokens + means + 300 * len(kept)


# ── Killed and started again ─────────────────────────────────────────────────────────────────────


def wait_for(process: subprocess.Popen, condition, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(process: subprocess.Popen, how: int = signal.SIGKILL) -> None:
    os.killpg(process.pid, how)
    process.wait(timeout=120)


def same_as_undisturbed(folder: Path, cache: Path, undisturbed) -> None:
    assert log_of(folder) == log_of(undisturbed.folder)
    assert (folder / "run_2" / "final_info.json").read_text() == undisturbed.text
    assert not work_of(cache)


def test_sigterm_in_training_and_a_kill_in_the_evaluation_change_nothing(
    hub, cache, undisturbed, tmp_path
):
    process = start(hub, cache, tmp_path, small())
    wait_for(process, lambda: len(work_of(cache, "step_*")) == 2)
    process.send_signal(signal.SIGTERM)
    finish(process, tmp_path, status=75)
    last = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert last == (
        "error: stopped by SIGTERM: run the same command again to go on from where it stood"
    )
    steps = [int(path.name.split("_")[1]) for path in work_of(cache, "step_*")]
    assert 0 < max(steps) <= 24

    process = start(hub, cache, tmp_path, small())
    wait_for(process, lambda: work_of(cache, "evaluated_*/fidelity_*.json"))
    kill(process)
    out = finish(start(hub, cache, tmp_path, small()), tmp_path)
    assert "going on from the checkpoint of step 24" in out
    same_as_undisturbed(tmp_path, cache, undisturbed)


@pytest.mark.faults
def test_ten_kills_at_random_moments_change_nothing(hub, cache, undisturbed, tmp_path):
    """From an empty cache of its own, so that preparing is hit as well."""
    r, own = random.Random(0), tmp_path / "cache"
    for _ in range(10):
        process = start(hub, own, tmp_path, small())
        time.sleep(r.uniform(3, 45))
        if process.poll() is None:
            kill(process)
        if r.random() < 0.3:  # as a loop that deletes what did not finish
            shutil.rmtree(tmp_path / "run_2", ignore_errors=True)
    finish(start(hub, own, tmp_path, small()), tmp_path)
    same_as_undisturbed(tmp_path, own, undisturbed)


# ── The text over a bad network ──────────────────────────────────────────────────────────────────

READ = """
import json, sys, time
sys.path.insert(0, {root!r})
from lab import scales, text
time.sleep = lambda s: None
found = list(text.streamed_documents(scales.OPENWEBTEXT, {start}))
print(json.dumps(found))
"""


def read_text(hub: LocalHub, start: int = 0) -> subprocess.CompletedProcess:
    code = READ.format(root=str(tiny.ROOT), start=start)
    environment = os.environ | hub.environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def documents(hub) -> list[str]:
    return json.loads(read_text(hub).stdout)


def test_the_text_can_be_taken_up_at_any_document(hub, documents):
    assert len(documents) > 300
    assert json.loads(read_text(hub, start=257).stdout) == documents[257:]


def test_a_network_that_fails_or_is_slow_in_the_stream_costs_no_document(hub, documents):
    hub.delay = 0.2
    hub.fail_next(8, containing=f"/api/datasets/{TEXT}")  # its client asks six times itself
    hub.cut_after(2000, times=3, containing="parquet")
    process = read_text(hub)
    hub.heal()
    assert json.loads(process.stdout.splitlines()[-1]) == documents
    assert "trying again from document" in process.stdout


def test_a_network_that_stays_away_is_an_error_that_says_what_to_do(hub):
    hub.fail_next(1000, containing=TEXT)
    process = read_text(hub)
    hub.heal()
    assert process.returncode != 0
    assert re.search(
        r"Skylion007/openwebtext could not be read at document 0, 6 times in a row .*check the "
        "network, then run the same command again",
        process.stderr.splitlines()[-1],
    )


# ── Before any work ──────────────────────────────────────────────────────────────────────────────


def refused(
    hub: LocalHub, folder: Path, text: str | None = None, **environment: str
) -> tuple[str, float]:
    """The message of a run that cannot start, and the seconds it took."""
    begun = time.monotonic()
    scale = SCALES["gemma-2-2b"]
    scale = replace(scale, text=text or scale.text)
    finish(start(hub, folder / "cache", folder, scale, **environment), folder, status=1)
    assert not (folder / "run_2" / "config.json").exists()
    return (folder / "stderr").read_text(), time.monotonic() - begun


def test_without_a_network_the_run_says_so_within_seconds(hub, tmp_path):
    message, seconds = refused(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub cannot be reached at http://127.0.0.1:9" in message
    assert message.splitlines()[-1].endswith("check the network")
    assert "Traceback" not in message
    assert seconds < 60  # most of it importing on a busy machine


def test_all_that_cannot_be_had_is_listed_in_one_message(hub, tmp_path):
    hub.gated.add(MODEL)
    hub.missing.update({"codeparrot/github-code", TEXT})
    try:
        message, _ = refused(hub, tmp_path)
    finally:
        hub.gated.clear()
        hub.missing.clear()
    assert f"accept the licence of {MODEL} at {hub.url}/{MODEL}, then set HF_TOKEN" in message
    assert f"the dataset {TEXT} is not at" in message
    assert "the dataset codeparrot/github-code is not at" in message
    assert "ag_news" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (f"{TEXT}@{'0' * 40}", f"the dataset {TEXT} has no revision {'0' * 40}: see"),
        ("codeparrot/github-code@main", "has no column 'text', but 'content', 'repo_name', 'pat"),
        ("Helsinki-NLP/europarl@main", "has no text in a layout that is known here (plain_text/"),
    ],
    ids=["revision", "column", "layout"],
)
def test_text_that_is_not_where_it_is_said_to_be_is_named_before_any_work(
    hub, tmp_path, text, complaint
):
    message, _ = refused(hub, tmp_path, text)
    assert complaint in message
    assert "network" not in message and "Traceback" not in message


# ── Several processes ────────────────────────────────────────────────────────────────────────────

# Training alone, in float32: gradients are added up in another order, and rounding shows.
TRAIN_ONLY = """
import torch
load = experiment.load_language_model
experiment.load_language_model = lambda scale: load(scale, torch.float32)
lab.preflight.not_enough_room = lambda *arguments: []
"""


def torchrun(n: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}")


@pytest.fixture(scope="module")
def one_process(hub, cache, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("one")
    scale = small(training_dtype="float32", checkpoint_seconds=600)
    finish(start(hub, cache, folder, scale, TRAIN_ONLY, quick=True), folder)
    return log_of(folder)


def same_curve(found: list[dict], expected: list[dict]) -> None:
    assert [(r["step"], r["layer"]) for r in found] == [(r["step"], r["layer"]) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "mse", "l1", "l0", "grad_norm", "lambda"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (ours["step"], name)
        assert ours["alpha"] == pytest.approx(theirs["alpha"], rel=1e-6)  # its pace is measured


def test_two_processes_follow_the_curve_of_one_also_when_they_are_stopped(
    hub, cache, one_process, tmp_path
):
    scale = small(training_dtype="float32", checkpoint_seconds=0)
    slowly = TRAIN_ONLY + "\n".join(
        [
            "import time",
            "step = experiment.Trainer.step",
            "experiment.Trainer.step = lambda self, x: (time.sleep(0.1), step(self, x))[1]",
        ]
    )
    two = {"launcher": torchrun(2), "quick": True, "OMP_NUM_THREADS": "1"}
    process = start(hub, cache, tmp_path, scale, slowly, **two)
    wait_for(process, lambda: work_of(cache, "step_*"))
    process.send_signal(signal.SIGTERM)  # torchrun hands it on to its processes
    process.wait(timeout=120)
    assert process.returncode != 0
    stopped_at = max(int(path.name.split("_")[1]) for path in work_of(cache, "step_*"))
    assert 0 < stopped_at < 24
    process = start(hub, cache, tmp_path, scale, TRAIN_ONLY, **two)
    out = finish(process, tmp_path)
    assert f"going on from the checkpoint of step {stopped_at}" in out
    assert out.count("going on from") == 1, "the processes speak with one voice"
    same_curve(log_of(tmp_path), one_process)


def test_a_number_of_processes_that_cannot_share_the_text_is_refused(hub, cache, tmp_path):
    process = start(hub, cache, tmp_path, small(), TRAIN_ONLY, torchrun(3), OMP_NUM_THREADS="1")
    process.wait(timeout=300)
    assert process.returncode != 0
    message = (tmp_path / "stderr").read_text()
    assert "3 processes cannot share 4 lanes of text evenly" in message
