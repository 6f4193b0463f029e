"""SAE-Bench's absorption really runs, and counts latents in residual-stream units."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from lab.absorption import evaluate_absorption
from lab.metrics import absorption_metrics


def test_absorption_really_runs_on_at_least_20_letters(evaluated):
    for _, absorption in evaluated.scores:
        metrics = absorption_metrics(absorption)
        assert metrics["absorption_letters"] >= 20
        assert None not in metrics.values()
        assert 0 < metrics["absorption_fraction"] < 1
        assert metrics["absorption_fraction_sd_over_letters"] > 0


def test_what_becomes_of_the_words_goes_with_the_score(evaluated, trained):
    for _, absorption in evaluated.scores:
        found = absorption_metrics(absorption)
        shares = [found[f"absorption_{name}"] for name in ("main_fires", "absorbed", "lost")]
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0
        assert found["absorption_absorbed"] == pytest.approx(found["absorption_full"], abs=1e-12)
        assert 0 <= found["absorption_absorbed_by_its_letter"] <= found["absorption_absorbed"]
        assert 1 < found["l0_on_words"] < trained.scale.d_sae
        assert 0 < found["fvu_on_words"] < 2


def test_absorption_would_score_latents_in_training_units_differently(evaluated, trained, tmp_path):
    """Why a saved SAE converts its latents to residual-stream units (pitfalls, 3.1 A)."""
    folder = next(iter(trained.saved.values()))
    unfolded = tmp_path / "unfolded"
    shutil.copytree(folder, unfolded)
    weights, scale = load_file(folder / "sae_weights.safetensors"), trained.trainer.units.scale
    for parameter in ("gate", "b_enc"):  # what every latent is proportional to
        weights[f"trained.{parameter}"] *= scale
    save_file(weights, unfolded / "sae_weights.safetensors")
    (found,) = evaluate_absorption(
        trained.scale, trained.lm, 1, {"unfolded": unfolded}, tmp_path / "eval"
    )
    wrong, right = map(absorption_metrics, (found, evaluated.scores[0][1]))
    assert right["absorption_fraction"] - wrong["absorption_fraction"] > 0.02
