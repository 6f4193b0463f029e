"""Compiled blocks are used for one shape, if they agree, and else nothing changes but a line."""

from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch

import lab.compiled
from lab.language_model import LanguageModel, load_language_model

SHAPE = (4, 12)


@pytest.fixture
def lm(tiny_model) -> LanguageModel:
    return load_language_model(tiny.tiny_scale(tiny_model, layers=(0, 2)), torch.float32)


def tokens(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(4, 100, (rows, length), generator=generator)


def counted(monkeypatch, change: float = 0.0) -> list[torch.Size]:
    """torch.compile that compiles nothing, notes the shapes that it is given and adds `change`."""
    shapes = []

    def compile(forward, dynamic):
        def fast(hidden, *args, **kwargs):
            shapes.append(hidden.shape)
            return forward(hidden, *args, **kwargs) * (1 + change)

        return fast

    monkeypatch.setattr(torch, "compile", compile)
    return shapes


def test_a_compiled_block_reads_its_one_shape_and_the_plain_one_all_others(lm, monkeypatch, capsys):
    shapes = counted(monkeypatch)
    expected = {rows: lm.residuals(tokens(rows, 12)) for rows in (3, 4)}
    lm.compile(*SHAPE)
    assert lm.identity["compiled"] is True
    assert "the language model is compiled" in capsys.readouterr().out
    assert shapes == [(4, 12, 64)] * 3, "the blocks up to the last layer, once, to compare"
    for rows, found in expected.items():
        again = lm.residuals(tokens(rows, 12))
        assert all(torch.equal(again[layer], found[layer]) for layer in (0, 2))
    assert shapes == [(4, 12, 64)] * 6
    lm.cross_entropy(tokens(3, 12))
    assert len(shapes) == 6


def test_blocks_that_compute_something_else_are_not_used(lm, monkeypatch, capsys):
    shapes, expected = counted(monkeypatch, change=1e-3), lm.residuals(tokens(*SHAPE))
    lm.compile(*SHAPE)
    assert "runs as it is: its residuals would be 0.00" in capsys.readouterr().out
    assert lm.identity["compiled"] is False
    shapes.clear()
    assert all(torch.equal(x, expected[n]) for n, x in lm.residuals(tokens(*SHAPE)).items())
    assert not shapes


@pytest.mark.parametrize("off", [0.0, 1e-5, 0.2, torch.nan, torch.inf])
def test_agreement_is_the_relative_distance_at_the_worst_position(off):
    x = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 2.0], [1.0, 1.0]]])
    found = x.clone()
    found[0, 0, 0] += 5 * off  # of one of two contexts
    expected = off / 2 if off < 1 else torch.inf
    assert lab.compiled.difference(found, x) == pytest.approx(expected, rel=1e-2)


def test_without_a_compiler_the_plain_model_runs(lm, monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler\nand a traceback of many lines")

    expected = lm.residuals(tokens(*SHAPE))
    monkeypatch.setattr(torch, "compile", no_compiler)
    lm.compile(*SHAPE)
    said = capsys.readouterr().out
    assert "runs as it is: it could not be compiled (no C++ compiler)" in said
    assert all(torch.equal(x, expected[n]) for n, x in lm.residuals(tokens(*SHAPE)).items())


def test_torchs_own_compiler_traces_the_blocks_of_a_scale_that_asks_for_it(tiny_model, monkeypatch):
    """Its front end, which needs no C++ compiler; soft-capping and hooks stay."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    scale = tiny.tiny_scale(tiny_model, layers=(0, 2), lm_batch=4, context_length=12)
    plain = load_language_model(scale)
    lm = load_language_model(replace(scale, compiled=True))
    assert lm.identity == plain.identity | {"compiled": True}
    found, expected = lm.residuals(tokens(*SHAPE)), plain.residuals(tokens(*SHAPE))
    assert all(torch.equal(found[layer], expected[layer]) for layer in (0, 2))
