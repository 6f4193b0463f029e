"""A saved SAE does to raw activations what the trained one did."""

import pytest
import torch

from lab.saved_sae import load_sae, read_out, register_with_sae_lens


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
def test_a_saved_sae_gives_the_training_saes_latents_in_residual_units(trained, seed):
    import sae_lens

    register_with_sae_lens()
    sae = sae_lens.SAE.load_from_disk(list(trained.saved.values())[seed])
    trainer, scale = trained.trainer, trained.trainer.units.scale
    x = trained.lm.residuals(trained.heldout)[1].float().flatten(0, 1)
    norms = x.norm(dim=-1)
    x = x[norms <= trainer.units.outlier_norm]
    alpha = trained.run.alpha_end
    assert sae.cfg.alpha == pytest.approx(alpha, abs=1e-12)
    with trainer.average.applied():
        # Averaged unit rows are shorter; SAE-Bench needs unit rows, so latents take up the norm.
        norm_F = trainer.sae.W_dec[seed].norm(dim=-1)
        f = trainer.sae.encode(x * scale, alpha, torch.float32)
        expected = f[seed] * norm_F / scale
        reconstruction = trainer.sae.decode(f)[seed] / scale
    found = sae.encode(x)
    assert norm_F.max() < 0.999
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6
    assert ((sae.decode(found) - reconstruction).norm() / reconstruction.norm()).item() < 1e-6
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(96), rtol=0, atol=1e-6)
    # Not in training units: those are at least twice smaller here, so a missing fold would show.
    assert scale < 0.5
    # Any leading shape will do.
    torch.testing.assert_close(sae.encode(x[:6].view(2, 3, -1)).view(6, -1), found[:6])


@torch.no_grad()
def test_reading_out_with_another_alpha_changes_alpha_alone(trained):
    folder = next(iter(trained.saved.values()))
    saved = load_sae(folder)
    swapped = read_out(saved, 1.0)
    assert (saved.cfg.alpha, swapped.cfg.alpha) == (pytest.approx(0.6), 1.0)
    assert swapped.W_enc is saved.W_enc
    x = trained.lm.residuals(trained.heldout[:1])[1].float()[0]
    z = (x - saved.b_dec) @ saved.W_enc * saved.gate + saved.b_enc
    torch.testing.assert_close(swapped.encode(x), z.relu(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(saved.encode(x), z.relu(), rtol=1e-2, atol=1e-2)


def test_a_saved_sae_can_be_differentiated_by_its_input_as_attributions_need(trained):
    sae = load_sae(next(iter(trained.saved.values()))).to(dtype=torch.float64)
    x = trained.lm.residuals(trained.heldout[:1])[1][0, 1:4].double().requires_grad_()
    assert (sae.encode(x) > 0).any()
    assert torch.autograd.gradcheck(sae.encode, (x,))
