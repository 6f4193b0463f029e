"""What a process says, what several share, and what a signal does to it."""

import io
import itertools
import signal
import sys
import threading
import time

import pytest
import torch
from tiny import stop_me

from lab.devices import Ranks
from lab.process import ExperimentError, Interrupted, Signals, progress_bar

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
