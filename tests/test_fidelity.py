"""Held-out fidelity is what its definition says, and what the language model says of it is kept."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import lab.fidelity
from lab.fidelity import HeldOut

LAYER = 1


class Halves:
    """Latents relu(x) and relu(-x), of which a decoder gives back `share`."""

    def __init__(self, d_in: int, share: float):
        self.cfg, self.share = SimpleNamespace(d_sae=2 * d_in), share

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, -x], dim=-1).relu()

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        positive, negative = f.chunk(2, dim=-1)
        return self.share * (positive - negative)


@pytest.fixture
def held(trained) -> HeldOut:
    return HeldOut(trained.lm, trained.heldout, LAYER, trained.trainer.units.outlier_norm, 4)


def scored_rows(trained) -> torch.Tensor:
    """Residuals of ordinary tokens, one by one."""
    lm, limit = trained.lm, trained.trainer.units.outlier_norm
    special = {getattr(lm.tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    rows = []
    for context in trained.heldout:
        for token, x in zip(context.tolist(), lm.residuals(context[None])[LAYER][0], strict=True):
            if token not in special and x.float().norm() <= limit:
                rows.append(x.float())
    return torch.stack(rows)


def test_fvu_l0_and_dead_are_sums_over_the_ordinary_tokens(trained, held):
    x = scored_rows(trained)
    assert len(x) < trained.heldout.numel()
    found = held.fidelity(Halves(x.shape[1], 0.5))
    expected = ((x / 2) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert found.fvu == pytest.approx(expected.item(), rel=1e-3)
    assert found.l0 == pytest.approx((x != 0).sum().item() / len(x), rel=1e-3)
    fires = torch.cat([(x > 0).any(0), (x < 0).any(0)])
    assert found.dead == pytest.approx(1 - fires.float().mean().item())


def test_the_model_itself_recovers_everything_and_zeros_nothing(held, trained):
    d_in = trained.lm.d_in
    assert held.fidelity(Halves(d_in, 1.0))[0::3] == (0.0, 1.0)
    assert held.fidelity(Halves(d_in, 0.0)).ce_recovered == 0.0
    assert held.ce != held.ce_zeros
    between = held.fidelity(Halves(d_in, 0.7)).ce_recovered
    assert between not in (0.0, 1.0)


def test_kept_is_what_would_be_read_and_the_model_is_not_asked_twice(trained, held, monkeypatch):
    lm = trained.lm
    asked = {"residuals": 0, "cross_entropy": 0}

    def counted(name: str, own: Callable, *args) -> object:
        asked[name] += 1
        return own(*args)

    for name in asked:
        monkeypatch.setattr(lm, name, partial(counted, name, getattr(lm, name)))
    limit, sae = trained.trainer.units.outlier_norm, Halves(lm.d_in, 0.7)
    found, counts = [], []
    for norm in (limit, limit, 0.9 * limit):
        kept = HeldOut(lm, trained.heldout, LAYER, norm, 4, keep=True)
        counts.append((asked["residuals"], asked["cross_entropy"]))
        found.append(kept.fidelity(sae))
    monkeypatch.undo()
    assert found[0] == found[1] == held.fidelity(sae)
    forwards = len(trained.heldout.split(4))
    assert counts[0] == (forwards, 2), "two: as it is, and zeros"
    assert counts[1] == (forwards, 3), "the SAE's own cross-entropy in between, nothing else"
    assert counts[2] == (2 * forwards, 6), "another limit is another entry"


def test_what_is_kept_goes_by_everything_that_it_depends_on(trained, monkeypatch):
    keys = []

    def cached(kind, key, build):
        keys.append((kind, repr(key)))
        raise LookupError

    monkeypatch.setattr(lab.fidelity, "cached", cached)
    lm, contexts = trained.lm, trained.heldout
    usual = {"contexts_NL": contexts, "layer": 1, "outlier_norm": 9.0, "batch": 4}
    others = {"contexts_NL": contexts + 1, "layer": 2, "outlier_norm": 8.0, "batch": 5}
    for change in ({}, *({name: value} for name, value in others.items())):
        with pytest.raises(LookupError):
            HeldOut(lm, **usual | change, keep=True)
    with pytest.raises(LookupError):
        monkeypatch.setattr(lm, "identity", lm.identity | {"model": "another"})
        HeldOut(lm, **usual, keep=True)
    assert len(set(keys)) == len(keys) == 6
    assert {kind for kind, _ in keys} == {"heldout"}
