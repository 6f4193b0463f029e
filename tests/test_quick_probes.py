"""The probes that stand for SAE-Bench's own find what those find, from the same random numbers."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from tiny import scores

from lab import quick_probes
from lab.results import without_times
from lab.saved_sae import load_sae


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
    with mock.patch.object(theirs, "train_probe_gpu", quick_probes.train_probe_gpu):
        torch.manual_seed(0)
        ours, found = theirs.train_probe_on_activations(*arguments, **how)
    assert found == expected
    assert 0.6 < min(found.values()) <= max(found.values()) <= 1
    assert torch.equal(state, torch.get_rng_state())
    for label, probe in probes.items():
        for p, q in zip(probe.parameters(), ours[label].parameters(), strict=True):
            assert torch.equal(p, q), "on a CPU to the bit"


@pytest.mark.parametrize("n", [50, 33])
def test_batches_taken_whole_hold_the_rows_of_torchs_own_in_the_same_order(n):
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.arange(n).float()[:, None], torch.arange(n))
    torch.manual_seed(3)
    expected = [*DataLoader(data, 16, shuffle=True), *DataLoader(data, 16, shuffle=True)]
    state = torch.get_rng_state()
    torch.manual_seed(3)
    loaders = (quick_probes.in_whole_batches(data, 16, shuffle=True) for _ in range(2))
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
    for where in (theirs, quick_probes):
        torch.manual_seed(1)
        how = {"ks": [1, 2, 3, 4], "precalc_sae_acts": True, "num_epochs": 30}
        probes = where.train_k_sparse_probes(sae, *train, **how)
        state = torch.get_rng_state()
        raw = where.eval_probe_and_sae_k_sparse_raw_scores(sae, probe, probes, *test, 64)
        about = where.sae_k_sparse_metadata(sae, probe, probes, "sae", 1)
        metrics = where.build_metrics_df(raw, about, max_k_value=4)
        theirs.add_feature_splits_to_metrics_df(metrics, max_k_value=4)
        found[where] = raw, about, metrics, state
    return found[theirs], found[quick_probes]


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
    assert len(columns) == 4 * 26
    assert sum(not np.isnan(found[name]).all() for name in columns) == read < 4 * 26


def test_the_latents_that_letters_split_into_are_sae_benchs_own(k_sparse):
    (*_, expected, _), (*_, found, _) = k_sparse
    assert found["letter"].tolist() == expected["letter"].tolist()
    assert found["split_feats"].tolist() == expected["split_feats"].tolist()
    assert found["num_split_features"].tolist() == expected["num_split_features"].tolist()
    assert max(found["num_split_features"]) > min(found["num_split_features"])
    assert found["f1_probe"].to_numpy() == pytest.approx(expected["f1_probe"].to_numpy())


def test_whole_evaluations_are_sae_benchs_own_to_the_last_digit(
    evaluated, trained, tmp_path, monkeypatch
):
    """With its own functions put back, from the same texts and first-letter probes."""
    from sae_bench.evals.absorption import k_sparse_probing
    from sae_bench.evals.sparse_probing import probe_training
    from torch.utils.data import DataLoader

    monkeypatch.setenv("COSINE_SAE_CACHE", str(evaluated.cache))
    own = {
        name: getattr(k_sparse_probing, name)
        for name in ("train_k_sparse_probes", "eval_probe_and_sae_k_sparse_raw_scores",
                     "sae_k_sparse_metadata", "build_metrics_df")
    }  # fmt: skip
    for name, function in own.items():
        monkeypatch.setattr(quick_probes, name, function)
    monkeypatch.setattr(quick_probes, "in_whole_batches", DataLoader)
    monkeypatch.setattr(quick_probes, "train_probe_gpu", probe_training.train_probe_gpu)
    name, folder = next(iter(trained.saved.items()))
    (found,) = scores(trained, {name: folder}, tmp_path / "theirs")
    for theirs, ours in zip(found, evaluated.scores[0], strict=True):
        assert without_times(theirs) == without_times(ours)
