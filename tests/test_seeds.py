"""Random numbers have names, and go on where they stood."""

import copy
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import ROOT

from lab.seeds import generators, seed_everything, seed_for, set_generators
from lab.state import load_state, save_state


def drawn() -> list:
    """The next numbers of all global generators; an odd number of normal ones, which come in pairs:
    numpy and Python keep the second of a pair."""
    return [
        random.random(),
        random.gauss(0, 1),
        random.sample(range(1000), 5),
        np.random.rand(3).tolist(),  # noqa: NPY002
        np.random.randn(3).tolist(),  # noqa: NPY002
        np.random.permutation(10).tolist(),  # noqa: NPY002
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
        torch.randperm(20).tolist(),
    ]


@pytest.fixture(autouse=True)
def as_before():
    before = generators()
    yield
    set_generators(before)


@pytest.mark.parametrize("draws_before", [0, 1, 2, 400])
def test_generators_put_back_draw_the_same_numbers_again(draws_before):
    seed_everything("a test", 3)
    for _ in range(draws_before):
        drawn()
    state = generators()
    first, second = drawn(), drawn()
    assert first != second
    seed_everything("somebody else")
    assert drawn() != first
    for _ in range(2):  # it can be put back again
        set_generators(state)
        assert [drawn(), drawn()] == [first, second]


def test_generators_go_through_a_checkpoint(tmp_path):
    drawn()
    save_state({"generators": generators()}, tmp_path / "state")
    expected = drawn()
    drawn()
    set_generators(load_state(tmp_path / "state")["generators"])
    assert drawn() == expected


def test_looking_at_the_generators_does_not_move_them():
    seed_everything("a test")
    expected = drawn()
    seed_everything("a test")
    for _ in range(3):
        generators()
    assert drawn() == expected


def test_a_state_is_not_changed_by_what_is_drawn_after_it():
    state = generators()
    before = {name: repr(value) for name, value in state.items()}
    copies = copy.deepcopy((state["torch"], state["numpy"][1]))
    for _ in range(50):
        drawn()
    assert {name: repr(value) for name, value in state.items()} == before
    assert torch.equal(state["torch"], copies[0])
    assert np.array_equal(state["numpy"][1], copies[1])


def test_every_name_has_a_stream_of_its_own_in_all_three_libraries():
    streams = {}
    for names in [("a",), ("b",), ("a", 1), ("a", 2), ("a", 1, 2)]:
        seed_everything(*names)
        streams[names] = drawn()
    for kind in range(len(next(iter(streams.values())))):
        assert len({json.dumps(stream[kind]) for stream in streams.values()}) == len(streams)
    seed_everything("a", 1)
    assert drawn() == streams["a", 1], "whatever was drawn in between"


def test_a_seed_depends_on_its_names_alone_in_every_process():
    names = [("init", "laptop", 8, seed) for seed in range(100)] + [("batches", 0, 1), ("x",)]
    seeds = [seed_for(*one) for one in names]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**48 for seed in seeds)
    code = "from lab.seeds import seed_for; print(seed_for('init', 'laptop', 8, 3))"
    asked = [sys.executable, "-c", code]
    out = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(out) == seeds[3]
    # Pinned: the committed study was made with these.
    assert seed_for("init", "laptop", 8, 0) == 212_327_663_335_425


def test_the_order_of_names_matters_and_numbers_are_as_their_text():
    assert seed_for("a", "b") != seed_for("b", "a")
    assert seed_for("a", 1) == seed_for("a", "1")
