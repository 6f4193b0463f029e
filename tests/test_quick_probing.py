"""The probes that stand for SAE-Bench's sparse probing find what its own find, from the same random
numbers."""

from unittest import mock

import pytest
import torch

from lab import quick_probing


def sparse_acts(n: int, d: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """[n, d] of four classes, mostly zero; a class has a few latents of its own."""
    g, found = torch.Generator().manual_seed(n), {}
    for i, label in enumerate("abcd"):
        acts = torch.randn(n, d, generator=g).relu() * (torch.rand(n, d, generator=g) < 0.1)
        own = (torch.arange(d) % 23 == i) * torch.rand(n, 1, generator=g)
        found[label] = (acts + 0.4 * own).to(dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probe_on_all_latents_is_sae_benchs_own_and_leaves_the_generator_where_that_does(dtype):
    from sae_bench.evals.sparse_probing import probe_training as theirs

    arguments = sparse_acts(120, 300, dtype), sparse_acts(80, 300, dtype)
    how = {"use_sklearn": False, "batch_size": 100, "epochs": 60, "lr": 1e-2}
    torch.manual_seed(0)
    probes, expected = theirs.train_probe_on_activations(*arguments, **how)
    state = torch.get_rng_state()
    with mock.patch.object(theirs, "train_probe_gpu", quick_probing.train_probe_gpu):
        torch.manual_seed(0)
        ours, found = theirs.train_probe_on_activations(*arguments, **how)
    assert found == expected
    assert 0.6 < min(found.values()) <= max(found.values()) <= 1
    assert torch.equal(state, torch.get_rng_state())
    for label, probe in probes.items():
        for p, q in zip(probe.parameters(), ours[label].parameters(), strict=True):
            assert torch.equal(p, q), "on a CPU to the bit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_k_sparse_probes_are_sae_benchs_own_and_leave_the_generator_where_those_do(dtype):
    from sae_bench.evals.sparse_probing import probe_training as theirs

    train, test = sparse_acts(121, 300, dtype), sparse_acts(80, 300, dtype)
    found = {}
    for ours in (False, True):
        where = theirs.train_probe_on_activations
        where = quick_probing.ProbesOnActivations(where) if ours else where
        torch.manual_seed(0)
        found[ours] = [where(train, test, select_top_k=k)[1] for k in (1, 2, 20)]
        found[ours].append(torch.get_rng_state().tolist())
    assert found[True] == found[False]
    assert 0.5 < min(found[True][0].values()) < max(found[True][2].values()) < 1


def test_k_sparse_probes_are_fitted_on_sae_benchs_own_rows_in_its_order():
    """To the bit: the latents that are chosen hang on the order in which means are summed."""
    from sae_bench.evals.sparse_probing import probe_training as theirs
    from sklearn.linear_model import LogisticRegression

    train, test, fitted = sparse_acts(121, 300), sparse_acts(80, 300), []

    def fit(self, x, y):
        fitted.append((x.tolist(), y.tolist()))
        return real(self, x, y)

    real = LogisticRegression.fit
    with mock.patch.object(LogisticRegression, "fit", fit):
        torch.manual_seed(0)
        theirs.train_probe_on_activations(train, test, select_top_k=5)
        torch.manual_seed(0)
        quick_probing.ProbesOnActivations(None)(train, test, select_top_k=5)
    assert len(fitted) == 2 * 4
    assert fitted[:4] == fitted[4:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_latents_are_asked_on_the_texts_drawn_before_as_sae_bench_would(dtype):
    """Its own function finds the same, if its generator stands where the first one's stood."""
    from sae_bench.evals.sparse_probing import probe_training as theirs

    train, test = sparse_acts(121, 300, dtype), sparse_acts(80, 300, dtype)
    others = [{label: acts.flip(1).sqrt() for label, acts in of.items()} for of in (train, test)]
    probes = quick_probing.ProbesOnActivations(None)
    torch.manual_seed(0)
    first = [probes(train, test, select_top_k=k)[1] for k in (1, 2, 20)]
    state = torch.get_rng_state()
    found = [probes.again(*others, k) for k in (2, 1)][::-1]
    assert torch.equal(state, torch.get_rng_state()), "nothing is drawn"
    torch.manual_seed(0)
    expected = [theirs.train_probe_on_activations(*others, select_top_k=k)[1] for k in (1, 2)]
    assert found == expected != first[:2]
    assert [probes.again(train, test, k) for k in (1, 2, 20)] == first
