"""What a process says, what several share, and what a signal does to it."""

import errno
import importlib.util
import io
import itertools
import signal
import sys
import threading
import time

import pytest
import torch
from tiny import stop_me

from lab.devices import Ranks, device_kind
from lab.process import ExperimentError, Interrupted, Signals, progress_bar, told
from lab.storage import remembered, save_tensors

# ── Progress ────────────────────────────────────────────────────────────────────────────────────


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_progress_is_plain_lines_on_stdout_and_nothing_on_stderr(
    monkeypatch, capsys
):
    ticks = itertools.count(step=20)  # seconds: a line is due at every second item
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    assert list(progress_bar(range(6), 6, "step")) == list(range(6))
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("step: ") and lines[0].endswith("/6")
    assert "\r" not in out


def test_on_a_terminal_progress_is_a_bar_on_stderr_and_nothing_on_stdout(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress_bar(range(6), 6, "step")) == list(range(6))
    assert "step" in terminal.getvalue() and "\r" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_progress_that_was_begun_before_goes_on_counting_where_it_stood(monkeypatch, capsys):
    ticks = itertools.count(step=40)
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    assert list(progress_bar("de", 5, "step", done=3)) == ["d", "e"]
    assert capsys.readouterr().out.splitlines() == ["step: 4/5", "step: 5/5"]
    monkeypatch.undo()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress_bar("de", 5, "step", done=3)
    next(bar)
    assert "| 3/5 " in terminal.getvalue()


# ── One process, or several ─────────────────────────────────────────────────────────────────────


def test_a_process_that_is_alone_has_all_lanes_and_nobody_to_ask():
    ranks, x = Ranks(), torch.tensor([1.0, 2.0])
    assert (ranks.rank, ranks.world) == (0, 1)
    assert ranks.lanes(16) == range(16)
    ranks.average_(x)
    ranks.largest_(x)
    assert x.tolist() == [1.0, 2.0]
    assert ranks.smallest(7) == 7
    assert ranks.joined(x) is x
    assert ranks.gathered("mine") == ["mine"]
    assert ranks.first("mine") == "mine"


def test_several_processes_share_the_lanes_without_gaps_or_are_told_how_many_can():
    shares = []
    for rank in range(4):
        ranks = Ranks()
        ranks.rank, ranks.world = rank, 4
        shares.append(list(ranks.lanes(16)))
        with pytest.raises(ExperimentError, match="4 processes cannot share 6 lanes"):
            ranks.lanes(6)
    assert shares == [list(range(4 * rank, 4 * rank + 4)) for rank in range(4)]


def test_more_processes_than_gpus_is_a_sentence_and_a_gpu_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    for name, value in {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_RANK": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ExperimentError, match="it has 2 GPUs: start one a GPU, torchrun") as error:
        Ranks()
    assert "3 processes or more share this machine" in str(error.value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_kind() == "cuda card 1"


# ── Signals ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_raised_at_once_or_kept_for_later(signals, number):
    with pytest.raises(Interrupted) as stop:
        stop_me(number)
    assert stop.value.signal_number == signals.received == number
    assert not isinstance(stop.value, Exception), "nothing that suppresses errors swallows it"
    signals.received, reached = None, False
    with signals.kept():
        with signals.kept():
            stop_me(number)
        assert signals.received == number
        stop_me(number)  # still inside the outer one
        reached = True
    assert reached
    with pytest.raises(Interrupted):
        stop_me(number)


def test_signals_are_raised_again_after_an_error_inside():
    signals = Signals.__new__(Signals)
    signals.received, signals.keep = None, False
    with pytest.raises(KeyError), signals.kept():
        raise KeyError
    with pytest.raises(Interrupted):
        signals._handle(signal.SIGTERM, None)


def test_a_thread_that_is_not_the_main_one_leaves_the_handlers_alone():
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=Signals)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


# ── How a run ends ──────────────────────────────────────────────────────────────────────────────

SCRIPT = """
def work(call, *arguments):
    call(*arguments)  # a line of the experiment's own
"""


@pytest.fixture
def script(tmp_path):
    """An experiment.py that does what it is asked to."""
    path = tmp_path / "experiment.py"
    path.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location("experiment_of_this_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def raised(error: BaseException) -> None:
    """What a library does: its file is neither the experiment's nor the laboratory's."""
    raise error.with_traceback(None)  # less that of another raise


def caught(script, error: BaseException, in_the_laboratory: bool, tmp_path) -> BaseException:
    """An error as it arrives at main()."""
    try:
        if in_the_laboratory:
            script.work(remembered, tmp_path / "part.json", lambda: raised(error))
        else:
            script.work(raised, error)
    except BaseException as found:
        return found
    raise AssertionError("nothing was raised")


NO_SPACE = OSError(errno.ENOSPC, "No space left on device", "run_7/x")
# As shutil.copyfile has it: from where, and to where.
NO_SPACE_FOR_A_COPY = OSError(errno.ENOSPC, "No space left on device", "cache/x", None, "run_7/x")
TORCH_SAVE = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
NO_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NO_SPACE, "error: No space left on device at run_7/x: free space or fix the folder"),
        (NO_SPACE_FOR_A_COPY, "error: No space left on device at run_7/x: free space"),
        (TORCH_SAVE, "error: a file could not be written: free space"),
        (FileNotFoundError(2, "No such file", "x.pt"), "error: No such file at x.pt: free space"),
        (ConnectionError("gone\nfor long"), "error: gone: check the network, then run the same"),
        (ConnectionResetError(104, "reset"), "error: reset: check the network"),
        (TimeoutError(), "error: TimeoutError: check the network"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_of_disk_or_network_is_one_sentence_in_the_laboratory_and_raised_in_the_experiment(
    script, tmp_path, capsys, error, said
):
    assert told(caught(script, error, True, tmp_path), script.__file__) == 1
    out, err = capsys.readouterr()
    assert err.startswith(said) and len(err.splitlines()) == 1 and not out
    assert "run the same command again" in err
    own = caught(script, error, False, tmp_path)
    with pytest.raises(type(error)) as found:
        told(own, script.__file__)
    assert found.value is error, "with its traceback"
    assert capsys.readouterr() == ("", ""), "and without advice"


@pytest.mark.parametrize("error", [MemoryError(), NO_MEMORY, torch.OutOfMemoryError("CUDA")])
def test_memory_that_is_full_is_said_and_the_experiments_own_line_with_it(
    script, tmp_path, capsys, error
):
    assert told(caught(script, error, True, tmp_path), script.__file__) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "memory is full: free " in line and "run the same command again" in line
    assert told(caught(script, error, False, tmp_path), script.__file__) == 1
    *traceback, last = capsys.readouterr().err.splitlines()
    assert last == line
    assert any("# a line of the experiment's own" in shown for shown in traceback)


@pytest.mark.parametrize("in_the_laboratory", [True, False])
@pytest.mark.parametrize("error", [KeyError("seed"), RuntimeError("sizes do not match")])
def test_an_error_that_nobody_foresaw_keeps_its_traceback(
    script, tmp_path, capsys, error, in_the_laboratory
):
    found = caught(script, error, in_the_laboratory, tmp_path)
    with pytest.raises(type(error)) as again:
        told(found, script.__file__)
    assert again.value is error
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("in_the_laboratory", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ExperimentError("mend this"), 1, "error: mend this"),
        (Interrupted(signal.SIGTERM), 75, "error: stopped by SIGTERM: run the same command again"),
        (Interrupted(signal.SIGINT), 130, "error: stopped by SIGINT: run the same command again"),
    ],
)
def test_what_can_be_mended_and_a_signal_are_one_sentence_wherever_they_are_raised(
    script, tmp_path, capsys, error, status, said, in_the_laboratory
):
    assert told(caught(script, error, in_the_laboratory, tmp_path), script.__file__) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


def test_an_error_of_a_file_of_tensors_names_the_file(script, tmp_path, capsys):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "weights.safetensors"
    with pytest.raises(OSError) as error:
        script.work(save_tensors, {"w": torch.ones(2)}, path)
    assert told(error.value, script.__file__) == 1
    assert str(path) in capsys.readouterr().err
