"""Unfinished work: one process at a time, found again by what it depends on, removed when old."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import ROOT, hundred_steps, tiny_world

import experiment
import lab.identity
import lab.work
from lab.process import ExperimentError
from lab.scales import SCALES, Scale
from lab.storage import json_text
from lab.work import Work, remove_abandoned, remove_work, training_identity, work_root

# ── Claiming ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


IDENTITY = {"run_name": "run_1", "seed": 3}


def test_work_lives_in_the_cache_under_its_identity(cache):
    work = Work(IDENTITY)
    assert work.folder == cache / "training" / work.name
    assert work.name.isalnum()
    assert Work({"seed": 3, "run_name": "run_1"}).folder == work.folder, "in any order"
    assert Work(IDENTITY | {"seed": 4}).folder != work.folder
    with work.claimed():
        assert json.loads((work.folder / "identity.json").read_text()) == IDENTITY


def test_work_that_is_claimed_is_refused_to_others_and_free_again_after_it():
    with Work(IDENTITY).claimed():
        refused = pytest.raises(ExperimentError, match="another process is training the same run")
        with refused, Work(IDENTITY).claimed():
            pass
        with Work(IDENTITY | {"seed": 4}).claimed():
            pass  # another run is not in the way
    with pytest.raises(KeyError), Work(IDENTITY).claimed():
        raise KeyError
    with Work(IDENTITY).claimed():
        pass


CLAIM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from lab.work import Work
with Work({IDENTITY!r}).claimed():
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_another_process_cannot_claim_it_and_a_killed_one_has_let_go():
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "claimed\n"
        with pytest.raises(ExperimentError, match="another process"), Work(IDENTITY).claimed():
            pass
        process.kill()
        process.wait(timeout=60)
        with Work(IDENTITY).claimed():
            pass
    finally:
        process.kill()
        process.communicate()


def test_what_was_there_stays_when_it_is_claimed_again_and_goes_when_it_is_finished():
    work = Work(IDENTITY)
    with work.claimed():
        (work.folder / "training_log.jsonl").write_text("{}\n")
    with work.claimed():
        assert (work.folder / "training_log.jsonl").read_text() == "{}\n"
        remove_work(work.name)
        assert work.folder.exists(), "it may be the same run's in another folder"
        work.mark_finished()
        remove_work(work.name)
        assert not work.folder.exists()
    remove_work(work.name)  # twice does no harm
    remove_work("0123456789abcdef")


# ── Removing what nobody comes back to ──────────────────────────────────────────────────────────


def left(name: str, size: int, age_in_days: float) -> Path:
    """Work of so many bytes that was last written to so long ago."""
    folder = work_root() / name
    (folder / "sae").mkdir(parents=True)
    now = time.time()
    for i, path in enumerate((folder / "step_1.pt", folder / "sae" / "weights")):
        path.write_bytes(b"x" * (size // 2))
        # One file is much older: what counts is when it was last worked on.
        os.utime(path, (now - 86400 * (age_in_days + 50 * i),) * 2)
    return folder


def names() -> set[str]:
    return {path.name for path in work_root().iterdir() if path.is_dir()}


def test_the_oldest_work_is_removed_until_the_rest_is_small_enough_and_it_is_said(capsys):
    for name, age in (("b", 2), ("a", 1), ("d", 4), ("c", 3)):
        left(name, 1000, age)
    remove_abandoned("own", limit=2500)
    assert names() == {"a", "b"}
    said = capsys.readouterr().out.splitlines()
    assert ["d" in line.split("MB, ")[1] for line in said] == [True, False]
    assert said[0].startswith("removed unfinished work of 4 days ago (0 MB, d)")
    assert said[1].startswith("removed unfinished work of 3 days ago (0 MB, c)")
    remove_abandoned("own", limit=2000)
    assert names() == {"a", "b"} and capsys.readouterr().out == "", "what fits stays"
    remove_abandoned("own", limit=1999)
    assert names() == {"a"}


def test_ones_own_work_and_that_of_living_processes_is_never_removed(capsys):
    for name, age in (("own", 9), ("old", 2), ("new", 1)):
        left(name, 1000, age)
    claimed = Work(IDENTITY)
    with claimed.claimed():
        big = claimed.folder / "step_1.pt"
        big.write_bytes(b"x" * 5000)
        for path in claimed.folder.iterdir():
            os.utime(path, (0, 0))
        remove_abandoned("own", limit=0)
        assert names() == {"own", claimed.name} and big.exists()
    assert "own)" not in capsys.readouterr().out
    remove_abandoned("own", limit=0)
    assert names() == {"own"}, "its process is gone"
    remove_abandoned("another", limit=0)
    assert names() == set()


def test_who_claims_work_removes_what_was_abandoned_above_the_limit(monkeypatch, capsys):
    left("old", 1000, 3)
    with Work(IDENTITY).claimed():
        assert "old" in names()
    assert lab.work.LIMIT == 20e9
    monkeypatch.setattr(lab.work, "LIMIT", 900)
    with Work(IDENTITY).claimed():
        assert names() == {Work(IDENTITY).name}
    assert "all of it together took over 9e-07 GB" in capsys.readouterr().out


def test_work_that_vanishes_while_it_is_looked_at_is_passed_over(monkeypatch):
    """Its own process may finish it at any moment."""
    left("old", 1000, 3)
    left("vanishing", 1000, 9)
    rglob = Path.rglob

    def found(self, pattern):
        paths = list(rglob(self, pattern))
        if self.name == "vanishing":
            remove_work("vanishing")
        return paths

    monkeypatch.setattr(Path, "rglob", found)
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    remove_abandoned("own", limit=500)
    assert names() == set()


# ── What training depends on ────────────────────────────────────────────────────────────────────

LM = SimpleNamespace(identity={"model": "tiny", "torch": "2"})
RUN, RECIPE = experiment.RUNS["run_1"], experiment.Recipe()


def identity(
    run=RUN, recipe=RECIPE, scale: Scale | None = None, name="run_1", lm=LM, code="0123"
) -> str:
    settings = {"run": asdict(run), "recipe": asdict(recipe)}
    found = training_identity(name, scale or hundred_steps(), lm, settings, code)
    assert json.loads(json_text(found)), "it is written down"
    return json_text(found)


def another(config: object, name: str) -> dict:
    """The field of a configuration with another value that is valid."""
    value = getattr(config, name)
    values = {
        "schedule": "fixed", "name": "other", "title": "other", "text": "a/b@c",
        "language_model": "other", "layers": (0, 1), "tasks": ("code",), "k_values": (1, 3),
        "readout_alphas": (0.25,), "training_dtype": "float32", "evaluation_dtype": "float32",
        "absorption_words": 100, "batch_tokens": 20, "lanes": 1,
        "target_l0s": (4.0, 8.0),
    }  # fmt: skip
    if name in values:
        new = values[name]
    elif isinstance(value, bool):
        new = not value
    else:
        new = value * 2 if isinstance(value, int) else value * 0.5 + 0.01
    assert new != value
    if name == "norm_restored":  # of a cosine alone
        return {name: new, "alpha_start": 0.0, "alpha_end": 0.0, "readout_alphas": ()}
    return {name: new}


SCORED = {"title", "readout_alphas", "k_values"}  # read after training alone
HANDLED = {"checkpoint_seconds", "keep_activations"}  # the same numbers, sooner or later


@pytest.mark.parametrize(
    ("what", "name"),
    [(what, f.name) for what in (RUN, RECIPE, hundred_steps()) for f in fields(what)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_training_is_another_with_every_setting_but_those_it_does_not_read(what, name):
    changed = replace(what, **another(what, name))
    kind = {"Run": "run", "Recipe": "recipe", "Scale": "scale"}[type(what).__name__]
    alike = identity(**{kind: changed}) == identity()
    assert alike == (name in SCORED | HANDLED)


def test_a_world_is_trained_in_by_the_code_of_its_truth_and_a_model_by_that_of_its_words():
    world, model = (
        json.loads(identity(scale=scale))["code"].keys()
        for scale in (tiny_world(), hundred_steps())
    )
    assert world - model == {"lab.ground_truth"}
    assert model - world == {"lab.online_absorption"}


def test_the_tasks_belong_to_the_training_only_where_their_texts_are_left_out_of_its_text():
    hub = replace(hundred_steps(), text="a/b@c")
    for name in ("tasks", "probe_train_set_size", "probe_test_set_size"):
        changed = replace(hub, **another(hub, name))
        assert identity(scale=changed) == identity(scale=hub), name
    for name in ("absorption_words", "evaluation_seed", "evaluation_dtype", "online_words"):
        changed = replace(hub, **another(hub, name))
        assert identity(scale=changed) != identity(scale=hub), f"{name}: absorption is measured"


def test_training_is_another_of_another_run_model_or_experiment():
    found = {
        identity(),
        identity(name="run_2"),
        identity(lm=SimpleNamespace(identity={"model": "tiny", "torch": "3"})),
        identity(code="4567"),
    }
    assert len(found) == 4


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_the_work_of_every_scale_and_run_is_its_own(scale):
    found = {
        Work(json.loads(identity(run, experiment.RECIPES[scale], SCALES[scale], name))).name
        for name, run in experiment.RUNS.items()
    }
    assert len(found) == len(experiment.RUNS)


def behind_training(monkeypatch, edited: str | None) -> dict:
    """The fingerprints in a training's identity, as if a room had been edited."""
    fingerprint = lab.identity.fingerprint

    def of(*paths: Path) -> str:
        found = fingerprint(*paths)
        return f"{found} edited" if any(path.stem == edited for path in paths) else found

    settings = {"run": asdict(RUN), "recipe": asdict(RECIPE)}
    with monkeypatch.context() as patch:
        patch.setattr(lab.identity, "fingerprint", of)
        return training_identity("run_1", hundred_steps(), LM, settings, "0123")["code"]


@pytest.mark.parametrize(
    "room",
    ["activations", "language_model", "text", "packaged_text", "seeds", "smollm2", "scales",
     "online_absorption", "absorption", "bench", "state", "checkpoints"],
)  # fmt: skip
def test_work_of_other_code_of_what_trains_is_not_taken_up(room, monkeypatch):
    assert behind_training(monkeypatch, room) != behind_training(monkeypatch, None)


@pytest.mark.parametrize(
    "room",
    ["evaluation", "probing", "fidelity", "metrics", "results", "summary", "folders", "preflight"],
)
def test_training_is_kept_when_what_only_scores_or_says_it_is_edited(room, monkeypatch):
    """After a mistake there, the same command goes on with the trained SAEs."""
    assert behind_training(monkeypatch, room) == behind_training(monkeypatch, None)
