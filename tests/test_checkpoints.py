"""The log and the checkpoints of a run: whole, its own, and one after the other."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lab.checkpoints import Checkpoints, TrainingLog

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
        state = {"step": step, "best": [math.inf, 0.1], "lanes": {3: {"pending": [5, 6]}}}
        checkpoints.save(step, {"x": torch.full((4,), float(step))}, state, log)
    return checkpoints, log


def read(folder: Path, identity: dict = IDENTITY) -> tuple[int | None, list[int]]:
    """(step of the checkpoint a new process goes on from, steps of its log)."""
    log = TrainingLog(folder / "log", "run_1", {})
    found = Checkpoints(folder / "checkpoint", identity).read(log)
    if found is None:
        return None, [r["step"] for r in log.records]
    tensors, state = found
    assert tensors["x"].tolist() == [float(state["step"])] * 4
    assert state["best"] == [math.inf, 0.1] and state["lanes"] == {"3": {"pending": [5, 6]}}
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
    "another file under its name": lambda path: save_file({"x": torch.zeros(4)}, path),
    "a name without a checksum": lambda path: path.rename(
        path.with_name("step_00000030.safetensors")
    ),
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
            checkpoints.save(40, {"x": torch.zeros(4)}, {}, log)
    assert read(tmp_path) == (30, [10, 20, 30])
    checkpoints.save(50, {"x": torch.zeros(4)}, {}, log)
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2, "its leftover is gone"


def test_a_process_that_does_not_write_saves_nothing(tmp_path):
    log = TrainingLog(tmp_path / "log", "run_1", {}, writes=False)
    Checkpoints(tmp_path / "checkpoint", IDENTITY, writes=False).save(1, {}, {}, log)
    assert list(tmp_path.iterdir()) == []
