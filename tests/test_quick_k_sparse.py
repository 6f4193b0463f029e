"""The k-sparse probes that stand for SAE-Bench's own find what those find, from the same random
numbers."""

import math

import numpy as np
import pytest
import torch

from lab import quick_k_sparse
from lab.saved_sae import load_sae


def spelt(n: int, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [n, 300] of words and their letters [n]: a letter has two latents of its own."""
    g = torch.Generator().manual_seed(n)
    letters = torch.arange(n) % 26
    acts = torch.rand(n, 300, generator=g) * (torch.rand(n, 300, generator=g) < density)
    for i in range(2):
        fires = torch.rand(n, generator=g) < 0.7
        acts[torch.arange(n), 2 * letters + i] += fires * torch.rand(n, generator=g)
    return acts, letters


def l1_probes(acts: torch.Tensor, letters: torch.Tensor) -> tuple:
    """(SAE-Bench's, ours), and the generator after each."""
    from sae_bench.evals.absorption import k_sparse_probing as theirs

    found, cpu = [], torch.device("cpu")
    for where in (theirs, quick_k_sparse):
        torch.manual_seed(5)
        how = {"batch_size": 300, "num_epochs": 20, "device": cpu}
        found.append(
            where.train_sparse_multi_probe(acts, torch.nn.functional.one_hot(letters), **how)
        )
        found.append(torch.get_rng_state())
    return *found[::2], *found[1::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_l1_probe_is_sae_benchs_own_to_the_bit_where_many_latents_fire(dtype):
    acts, letters = spelt(700, density=0.4)
    theirs, ours, *states = l1_probes(acts.to(dtype), letters)
    assert torch.equal(*states)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_l1_probe_of_few_latents_differs_by_rounding_and_ranks_them_as_sae_benchs_own():
    acts, letters = spelt(700, density=0.04)
    theirs, ours, *states = l1_probes(acts, letters)
    assert torch.equal(*states)
    assert not torch.equal(theirs.weights, ours.weights), "sums in another order"
    # Adam divides a gradient by its own size: of one near 0 rounding is much, as a step is small.
    torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=1e-3)
    for expected, found in zip(theirs.weights, ours.weights, strict=True):
        assert found.topk(4).indices.tolist() == expected.topk(4).indices.tolist()


@pytest.mark.parametrize("k", [1, 3])
def test_a_fit_without_the_words_that_have_none_of_its_latents_is_the_fit_of_all(k):
    from sklearn.linear_model import LogisticRegression

    acts, letters = spelt(2000, density=0.04)
    x, y = acts[:, [2, 3, 50][:k]].numpy(), (letters == 1).numpy()
    assert 0.5 < (x == 0).all(1).mean() < 1
    fit = LogisticRegression(max_iter=500, class_weight="balanced").fit(x, y)
    weight, bias = quick_k_sparse.fit_balanced(x, y)
    assert weight == pytest.approx(fit.coef_[0], rel=1e-3)
    assert bias == pytest.approx(fit.intercept_[0], rel=1e-3)


def test_f1_is_that_of_scikit_learn_also_where_nothing_is_found():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.9):
        y, found = rng.random(200) < 0.2, rng.random(200) < share
        assert quick_k_sparse.f1(y, found) == f1_score(y, found, zero_division=0.0)
    nothing = np.zeros(5, bool)
    assert quick_k_sparse.f1(nothing, nothing) == 0


@pytest.mark.parametrize("n", [50, 33])
def test_batches_taken_whole_hold_the_rows_of_torchs_own_in_the_same_order(n):
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.arange(n).float()[:, None], torch.arange(n))
    torch.manual_seed(3)
    expected = [*DataLoader(data, 16, shuffle=True), *DataLoader(data, 16, shuffle=True)]
    state = torch.get_rng_state()
    torch.manual_seed(3)
    loaders = (quick_k_sparse.in_whole_batches(data, 16, shuffle=True) for _ in range(2))
    found = [batch for loader in loaders for batch in loader]
    assert torch.equal(state, torch.get_rng_state())
    assert len(found) == len(expected) == 2 * math.ceil(n / 16)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def k_sparse(trained):
    """Both ways' tables for one SAE: (scores of words, latents of probes, metrics with splits)."""
    from sae_bench.evals.absorption import k_sparse_probing as theirs
    from sae_bench.evals.absorption.probing import LinearProbe

    g = torch.Generator().manual_seed(0)
    sae, probe = load_sae(next(iter(trained.saved.values()))), LinearProbe(64, 26)
    centres = 3 * torch.randn(26, 64, generator=g)

    def words(n: int) -> tuple[list, torch.Tensor]:
        labels = [(f"word{i}", i % 26) for i in range(n)]
        letters = torch.tensor([letter for _, letter in labels])
        return labels, centres[letters] + torch.randn(n, 64, generator=g)

    train, test = words(26 * 12), words(26 * 6)
    found = {}
    for where in (theirs, quick_k_sparse):
        torch.manual_seed(1)
        how = {"ks": [1, 2, 3, 4], "precalc_sae_acts": True, "num_epochs": 30}
        probes = where.train_k_sparse_probes(sae, *train, **how)
        state = torch.get_rng_state()
        raw = where.eval_probe_and_sae_k_sparse_raw_scores(sae, probe, probes, *test, 64)
        about = where.sae_k_sparse_metadata(sae, probe, probes, "sae", 1)
        metrics = where.build_metrics_df(raw, about, max_k_value=4)
        theirs.add_feature_splits_to_metrics_df(metrics, max_k_value=4)
        found[where] = raw, about, metrics, state
    return found[theirs], found[quick_k_sparse]


def test_word_scores_are_sae_benchs_own_cell_by_cell_as_far_as_it_looks(k_sparse):
    (expected, _, metrics, state), (found, *_, our_state) = k_sparse
    assert torch.equal(state, our_state)
    read = 0
    for row in metrics.itertuples():
        looked_at = min(4, row.num_split_features + 2)
        for name in [f"score_sparse_sae_{row.letter}_k_{k}" for k in range(1, looked_at + 1)]:
            assert found[name].to_numpy() == pytest.approx(expected[name].to_numpy(), abs=1e-4)
            read += 1
        name = f"score_probe_{row.letter}"
        assert found[name].to_numpy() == pytest.approx(expected[name].to_numpy(), abs=1e-4)
    assert found["token"].tolist() == expected["token"].tolist()
    assert found["answer_letter"].tolist() == expected["answer_letter"].tolist()
    columns = [name for name in found if name.startswith("score_sparse_sae_")]
    assert len(columns) == read < 4 * 26, "and no others are made"


def test_the_latents_that_letters_split_into_are_sae_benchs_own(k_sparse):
    (*_, expected, _), (*_, found, _) = k_sparse
    assert found["letter"].tolist() == expected["letter"].tolist()
    assert found["split_feats"].tolist() == expected["split_feats"].tolist()
    assert found["num_split_features"].tolist() == expected["num_split_features"].tolist()
    assert max(found["num_split_features"]) > min(found["num_split_features"])
    for name in ["f1_probe", *(f"f1_sparse_sae_{k}" for k in range(1, 5))]:
        made = found[name].notna()
        assert found[name][made].tolist() == expected[name][made].tolist(), "to the bit"
        assert made.sum() == 26 or name.endswith(("3", "4"))
