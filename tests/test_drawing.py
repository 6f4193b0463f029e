"""lab/drawing.py: every run has one look, and the same runs give the same files."""

import numpy as np
from made_up_runs import LAPTOP

import plot
from lab import drawing


def test_every_run_has_its_own_look_and_the_control_is_black():
    names = [f"run_{i}" for i in range(20)] + ["run_x"]
    found = drawing.looks(names, "run_7")
    assert len({tuple(look.items()) for look in found.values()}) == len(names)
    assert found["run_7"]["color"] == "black"
    assert sum(look["color"] == "black" for look in found.values()) == 1


def test_positions_are_rounded_since_the_layout_varies_in_its_last_digits(alone, monkeypatch):
    drawn = []
    monkeypatch.setattr(drawing.plt, "close", drawn.append)
    drawing.draw((plot.probing,), plot.load(alone)[LAPTOP], "")
    (figure,) = drawn
    positions = [ax.get_position().bounds for ax in figure.axes]
    positions += [band.bbox_relative.bounds for band in figure.subfigs]
    assert np.allclose(positions, np.round(positions, 5), rtol=0, atol=1e-12)
