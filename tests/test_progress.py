"""Progress: bars on a terminal, plain lines elsewhere: nothing drowns an error on stderr."""

import io
import itertools
import sys
import time

import lab.process


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_progress_is_plain_lines_on_stdout_and_nothing_on_stderr(
    monkeypatch, capsys
):
    ticks = itertools.count(step=20)  # seconds: a line is due at every second item
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    assert list(lab.process.progress_bar(range(6), 6, "step")) == list(range(6))
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("step: ") and lines[0].endswith("/6")
    assert "\r" not in out


def test_on_a_terminal_progress_is_a_bar_on_stderr_and_nothing_on_stdout(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(lab.process.progress_bar(range(6), 6, "step")) == list(range(6))
    assert "step" in terminal.getvalue() and "\r" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_progress_that_was_begun_before_goes_on_counting_where_it_stood(monkeypatch, capsys):
    ticks = itertools.count(step=40)
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    assert list(lab.process.progress_bar("de", 5, "step", done=3)) == ["d", "e"]
    assert capsys.readouterr().out.splitlines() == ["step: 4/5", "step: 5/5"]
    monkeypatch.undo()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = lab.process.progress_bar("de", 5, "step", done=3)
    next(bar)
    assert "| 3/5 " in terminal.getvalue()
