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
