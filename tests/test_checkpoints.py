"""The log and the checkpoints of a run: whole, its own, and one after the other."""

import json
import math
import os
import shutil
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import stop_me

from lab.checkpoints import Checkpoints, Keeper
from lab.devices import Ranks
from lab.process import ExperimentError, Interrupted
from lab.training_log import TrainingLog, settled

# ── The log ─────────────────────────────────────────────────────────────────────────────────────


def written_log(path: Path, steps: int = 3) -> TrainingLog:
    log = TrainingLog(path, "run_1", {})
    for step in range(steps):
        log([{"layer": 1, "step": step, "loss": [0.5 / (step + 1)]}])
    return log


def mark(log: TrainingLog) -> tuple[int, str]:
    """What a checkpoint holds of a log."""
    return log.size, log.digest.hexdigest()


@pytest.mark.parametrize("after", [b"", b'{"step": 2}\n{"step": 3}\n', b'{"st', b"\xff\x00"])
def test_the_log_goes_on_after_what_a_checkpoint_knows_of_it(tmp_path, after):
    first = written_log(tmp_path / "log", 2)
    known = (tmp_path / "log").read_bytes()
    assert mark(first)[0] == len(known)
    with (tmp_path / "log").open("ab") as file:
        file.write(after)
    log = TrainingLog(tmp_path / "log", "run_1", {})
    assert log.take_up(*mark(first))
    assert (tmp_path / "log").read_bytes() == known, "what follows is cut off"
    assert log.records == [json.loads(line) for line in known.splitlines()]
    log([{"layer": 1, "step": 2, "loss": [0.1]}])
    first([{"layer": 1, "step": 2, "loss": [0.1]}])  # as if it had never stopped
    assert mark(log) == mark(first)
    assert log.records == first.records


def test_a_log_that_is_not_the_one_that_was_written_is_not_taken_up_and_stays(tmp_path):
    size, digest = mark(written_log(tmp_path / "log", 2))
    text = (tmp_path / "log").read_bytes()
    for other in (text[:-1], text.replace(b"0.5", b"0.6"), b"", b"x" + text):
        (tmp_path / "log").write_bytes(other)
        log = TrainingLog(tmp_path / "log", "run_1", {})
        assert not log.take_up(size, digest)
        assert (tmp_path / "log").read_bytes() == other
        assert (log.records, log.size) == ([], 0)
    (tmp_path / "log").unlink()
    assert not TrainingLog(tmp_path / "log", "run_1", {}).take_up(size, digest)


def test_a_process_that_does_not_write_reads_the_log_and_changes_nothing(tmp_path):
    size, digest = mark(written_log(tmp_path / "log", 2))
    with (tmp_path / "log").open("ab") as file:
        file.write(b'{"step"')
    before = (tmp_path / "log").read_bytes()
    log = TrainingLog(tmp_path / "log", "run_1", {}, writes=False)
    assert log.take_up(size, digest)
    log([{"layer": 1, "step": 2}])
    assert [r["step"] for r in log.records] == [0, 1, 2]
    assert (tmp_path / "log").read_bytes() == before


# ── Checkpoints ─────────────────────────────────────────────────────────────────────────────────

IDENTITY = {"run_name": "run_1", "scale": {"d_sae": 8}}


def saved(folder: Path, steps: tuple[int, ...] = (10, 20, 30)) -> tuple[Checkpoints, TrainingLog]:
    """A checkpoint every ten steps, each after one line more of the log."""
    checkpoints = Checkpoints(folder / "checkpoint", IDENTITY)
    log = TrainingLog(folder / "log", "run_1", {})
    for step in steps:
        log([{"layer": 1, "step": step}])
        state = {"x": torch.full((4,), float(step)), "best": [math.inf, 0.1], "lanes": {3: [5, 6]}}
        checkpoints.save(step, state, log)
    return checkpoints, log


def read(folder: Path, identity: dict = IDENTITY) -> tuple[int | None, list[int]]:
    """(step of the checkpoint a new process goes on from, steps of its log)."""
    log = TrainingLog(folder / "log", "run_1", {})
    state = Checkpoints(folder / "checkpoint", identity).read(log)
    if state is None:
        return None, [r["step"] for r in log.records]
    assert state["x"].tolist() == [float(state["step"])] * 4
    assert state["best"] == [math.inf, 0.1] and state["lanes"] == {3: [5, 6]}
    assert (folder / "log").read_text().splitlines() == [json.dumps(r) for r in log.records]
    return state["step"], [r["step"] for r in log.records]


def test_the_newest_two_checkpoints_are_kept_and_the_newest_is_read(tmp_path, capsys):
    checkpoints, _ = saved(tmp_path)
    names = [path.name.split("_")[1] for path in checkpoints.newest_first()]
    assert names == ["00000030", "00000020"]
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2, "and nothing beside them"
    assert read(tmp_path) == (30, [10, 20, 30])
    assert capsys.readouterr().out == ""


def test_without_a_checkpoint_there_is_none_to_read(tmp_path):
    assert read(tmp_path) == (None, [])


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit of a weight": flip,
    "a bit of the header": lambda path: flip(path, 20),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "another file under its name": lambda path: torch.save({"x": torch.zeros(4)}, path),
    "the one before under its name": lambda path: path.write_bytes(
        sorted(path.parent.glob("step_*"))[0].read_bytes()
    ),
    "a name without a checksum": lambda path: path.rename(path.with_name("step_00000030.pt")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, damage, capsys):
    checkpoints, _ = saved(tmp_path)
    DAMAGES[damage](checkpoints.newest_first()[0])
    assert read(tmp_path) == (20, [10, 20]), "with the log as it was then"
    out = capsys.readouterr().out
    assert "checkpoint step_00000030" in out and "not used" in out and "step_00000020" not in out
    for path in checkpoints.newest_first():
        path.write_bytes(b"")
    assert read(tmp_path)[0] is None


def test_a_damaged_checkpoint_is_not_even_opened(tmp_path, monkeypatch):
    """Reading one can execute code."""
    checkpoints, _ = saved(tmp_path)
    monkeypatch.setattr("lab.checkpoints.load_state", lambda path: pytest.fail("it was opened"))
    for path in checkpoints.newest_first():
        flip(path)
    assert read(tmp_path) == (None, [])
    assert read(tmp_path, IDENTITY | {"run_name": "run_2"}) == (None, [])


class OfThen:
    """Something in a checkpoint whose class is no longer found where it was."""


@pytest.mark.parametrize("gone", ["class", "module"])
def test_a_checkpoint_that_cannot_be_read_is_named_and_the_one_before_it_is_used(
    gone, tmp_path, monkeypatch, capsys
):
    """Of the same identity and whole: written when the script had another name, say."""
    checkpoints, log = saved(tmp_path)
    module = types.ModuleType("module_of_then")
    monkeypatch.setitem(sys.modules, "module_of_then", module)
    module.OfThen = OfThen
    monkeypatch.setattr(OfThen, "__module__", "module_of_then")
    checkpoints.save(40, {"x": OfThen()}, log)
    if gone == "class":
        del module.OfThen
    else:
        monkeypatch.delitem(sys.modules, "module_of_then")
    assert read(tmp_path) == (30, [10, 20, 30])
    assert "checkpoint step_00000040" in capsys.readouterr().out


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, capsys):
    saved(tmp_path)
    before = (tmp_path / "log").read_bytes()
    assert read(tmp_path, IDENTITY | {"scale": {"d_sae": 9}}) == (None, [])
    assert capsys.readouterr().out.count("not of this run: not used") == 2
    assert (tmp_path / "log").read_bytes() == before
    assert read(tmp_path)[0] == 30


def test_a_checkpoint_whose_part_of_the_log_was_changed_cannot_be_used(tmp_path):
    saved(tmp_path)
    lines = (tmp_path / "log").read_text().splitlines(keepends=True)
    (tmp_path / "log").write_text("".join([*lines[:2], lines[2].replace("30", "31")]))
    assert read(tmp_path) == (20, [10, 20]), "the older one's part is as it was"
    (tmp_path / "log").write_text("".join([lines[0].replace("10", "11"), *lines[1:]]))
    assert read(tmp_path) == (None, [])


def test_a_write_that_was_killed_is_no_checkpoint(tmp_path, monkeypatch):
    checkpoints, log = saved(tmp_path)

    def killed(descriptor: int):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(40, {"x": torch.zeros(4)}, log)
    assert read(tmp_path) == (30, [10, 20, 30])
    checkpoints.save(50, {"x": torch.zeros(4)}, log)
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2, "its leftover is gone"


def test_a_process_that_does_not_write_saves_nothing(tmp_path):
    log = TrainingLog(tmp_path / "log", "run_1", {}, writes=False)
    Checkpoints(tmp_path / "checkpoint", IDENTITY, writes=False).save(1, {}, log)
    assert list(tmp_path.iterdir()) == []


def test_a_log_whose_folder_was_emptied_meanwhile_is_written_again_whole(tmp_path):
    (tmp_path / "work").mkdir()
    log = written_log(tmp_path / "work" / "log", 2)
    shutil.rmtree(tmp_path / "work")
    log([{"layer": 1, "step": 2, "loss": [0.1]}])
    lines = (tmp_path / "work" / "log").read_text().splitlines()
    assert [json.loads(line) for line in lines] == log.records and len(lines) == 3
    again = TrainingLog(tmp_path / "work" / "log", "run_1", {})
    assert again.take_up(*mark(log)) and again.records == log.records


# ── Which one to go on from ─────────────────────────────────────────────────────────────────────


def test_going_on_is_said_with_the_step(tmp_path, capsys):
    checkpoints, _ = saved(tmp_path)
    log = TrainingLog(tmp_path / "log", "run_1", {})
    assert checkpoints.newest(log, Ranks())["step"] == 30
    assert capsys.readouterr().out == "going on from the checkpoint of step 30\n"


def test_where_there_is_nothing_to_go_on_from_what_lies_about_is_removed(tmp_path):
    checkpoints, _ = saved(tmp_path)
    folder = tmp_path / "checkpoint"
    (folder / "identity.json").write_text("{}")
    (folder / "evaluated_0123").mkdir()
    (folder / "evaluated_0123" / "part.json").write_text("{}")
    (folder / "partial").write_bytes(b"half")
    assert checkpoints.newest(TrainingLog(tmp_path / "log", "run_1", {}), Ranks())
    assert (folder / "evaluated_0123" / "part.json").exists(), "it belongs to the checkpoint"
    for path in checkpoints.newest_first():
        path.write_bytes(b"")
    assert checkpoints.newest(TrainingLog(tmp_path / "log", "run_1", {}), Ranks()) is None
    assert [path.name for path in folder.iterdir()] == ["identity.json"]


def test_a_process_that_does_not_write_removes_nothing(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "partial").write_bytes(b"half")
    checkpoints = Checkpoints(folder, IDENTITY, writes=False)
    log = TrainingLog(tmp_path / "log", "run_1", {}, writes=False)
    assert checkpoints.newest(log, Ranks()) is None
    assert (folder / "partial").exists()


def test_processes_that_do_not_see_the_same_checkpoint_are_stopped(tmp_path):
    checkpoints, _ = saved(tmp_path)
    two = SimpleNamespace(gathered=lambda step: [step, None])
    with pytest.raises(ExperimentError, match="COSINE_SAE_CACHE"):
        checkpoints.newest(TrainingLog(tmp_path / "log", "run_1", {}), two)


# ── The keeper of both ──────────────────────────────────────────────────────────────────────────


def record(step: int, loss: float = 0.5) -> dict:
    names = ("loss", "mse", "l1", "lambda", "grad_norm")
    return {"layer": 1, "step": step} | {n: torch.tensor([0.25, loss]) for n in names}


class Clock:
    """time.monotonic() that a test moves; by itself it moves a little."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("lab.checkpoints.time.monotonic", self.read)

    def read(self) -> float:
        self.now += 1e-9
        return self.now


@pytest.fixture
def keeper(tmp_path, signals, monkeypatch):
    """A keeper with a checkpoint a minute, one process alone."""
    clock = Clock(monkeypatch)
    log = TrainingLog(tmp_path / "log", "run_1", {})
    checkpoints = Checkpoints(tmp_path / "checkpoint", IDENTITY)
    found = Keeper(log, checkpoints, signals, Ranks(), seconds=60)
    found.clock = clock
    return found


def state_at(step: int):
    return lambda: {"x": torch.full((4,), float(step))}


def test_records_are_written_every_tenth_step_and_in_order(keeper):
    for step in range(1, 25):
        keeper.clock.now += 0.5
        keeper.note(step, 100, [record(step - 1)])
    assert [r["step"] for r in keeper.log.records] == list(range(20))
    first = keeper.log.records[0]
    assert (first["loss"], first["tokens_per_second"]) == ([0.25, 0.5], 200)
    keeper.flush()
    assert [r["step"] for r in keeper.log.records] == list(range(24))
    lines = keeper.log.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == keeper.log.records


def test_a_checkpoint_is_written_when_it_is_due_with_the_records_up_to_it(keeper, tmp_path):
    for step in range(1, 4):
        keeper.clock.now += 25
        keeper.note(step, 100, [record(step - 1)])
        keeper.look(step, state_at(step))
    (path,) = keeper.checkpoints.newest_first()
    assert path.name.startswith("step_00000003_")
    assert [r["step"] for r in keeper.log.records] == [0, 1, 2]
    keeper.clock.now += 59
    keeper.look(4, state_at(4))
    assert len(keeper.checkpoints.newest_first()) == 1, "a minute after the last one, not before"
    keeper.clock.now += 1
    keeper.look(5, state_at(5))
    state = keeper.checkpoints.read(TrainingLog(tmp_path / "log", "run_1", {}))
    assert state["step"] == 5 and state["x"].tolist() == [5.0] * 4


def test_a_signal_is_looked_for_after_a_step_and_waits_for_a_checkpoint_to_be_whole(keeper):
    with keeper.signals.kept():
        stop_me()
    with pytest.raises(Interrupted):
        keeper.look(1, state_at(1))
    keeper.signals.received = None

    def state():
        stop_me()
        return state_at(2)()

    keeper.checkpoint(2, state)
    assert keeper.signals.received and len(keeper.checkpoints.newest_first()) == 1
    with pytest.raises(Interrupted):
        keeper.look(2, state_at(2))


def test_several_processes_agree_now_and_then_and_all_do_what_one_of_them_wants(keeper):
    asked, theirs = [], (0, False)

    def gathered(mine: tuple) -> list:
        asked.append(mine)
        return [mine, theirs]

    keeper.ranks = SimpleNamespace(world=2, gathered=gathered)
    for step in range(1, 10):
        keeper.look(step, state_at(step))
    assert asked == [], "not every step: it is a synchronisation point"
    keeper.look(10, state_at(10))
    assert asked == [(0, False)] and keeper.checkpoints.newest_first() == []
    theirs = (0, True)
    keeper.look(20, state_at(20))
    assert len(keeper.checkpoints.newest_first()) == 1
    theirs = (15, False)
    with pytest.raises(Interrupted) as stop:
        keeper.look(30, state_at(30))
    assert stop.value.signal_number == 15


def test_of_several_processes_none_is_stopped_in_the_middle_of_a_step(keeper, signals):
    several = SimpleNamespace(world=2)
    Keeper(keeper.log, keeper.checkpoints, signals, several, seconds=60)
    stop_me()  # raises nothing: training asks
    assert signals.received


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_with_step_layer_seed_and_values(keeper, loss, tmp_path):
    keeper.note(1, 100, [record(0)])
    keeper.checkpoint(1, state_at(1))
    keeper.note(2, 100, [record(1, loss)])
    with pytest.raises(ExperimentError, match=f"loss is {loss} at step 1, layer 1, SAE 1") as error:
        keeper.flush()
    assert all(f"{name}=" in str(error.value) for name in ("mse", "l1", "lambda", "grad_norm"))
    log = TrainingLog(tmp_path / "log", "run_1", {})
    assert keeper.checkpoints.read(log)["step"] == 1, "the last good one is kept"
    assert [r["step"] for r in log.records] == [0]


def test_a_record_is_settled_into_plain_numbers_without_changing_it():
    own = record(3) | {"alpha": [0.1, 0.2], "l0_heldout": None, "own": torch.tensor([[7], [9]])}
    found, second = settled([own, record(4)])
    assert json.loads(json.dumps(found)) == found
    assert list(found) == list(own)
    assert (found["loss"], found["alpha"], found["l0_heldout"]) == ([0.25, 0.5], [0.1, 0.2], None)
    assert found["own"] == [[7], [9]], "whole numbers stay whole, whatever their shape"
    assert second == settled([record(4)])[0]
    assert isinstance(own["loss"], torch.Tensor)
