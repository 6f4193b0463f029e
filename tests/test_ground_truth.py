"""lab/ground_truth.py: the gap by hand, its controls, and a run of the script in a small world.

Positive control: an SAE whose encoder's directions are its decoder's absorbs little.  Negative: of
the same features without trees there is nothing to absorb.
"""

import json
import math
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tiny import run_script, tiny_world

import experiment
from lab.activations import calibrate
from lab.devices import Ranks
from lab.ground_truth import LEAST, OnlineTruth, edges_of, f1_of, truth_of
from lab.metrics import pairwise_mcc
from lab.saved_sae import load_sae
from lab.synthetic import World, directions, load_world, sample

EYE = torch.eye(3)  # a parent, its child, and a feature in no tree


def on_of(*counts: tuple[int, tuple[int, int, int]]) -> torch.Tensor:
    """So many rows with these features on."""
    return torch.cat([torch.tensor([on] * n) for n, on in counts]).bool()


ROWS = on_of((100, (1, 0, 0)), (60, (1, 1, 0)), (40, (0, 0, 1)))


def test_the_gap_of_an_edge_is_the_difference_of_two_rates():
    fires = torch.zeros(200, 4, dtype=torch.bool)
    fires[:80, 2] = True  # of the parent alone 80%
    fires[100:115, 2] = True  # with its child 25%
    fires[:, 0] = True  # another latent's business
    W_dec = torch.tensor([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0], [0.8, 0.6, 0.0], [-1.0, 0.0, 0.0]])
    found = edges_of(fires, W_dec, ROWS, EYE, [(0, 1)])
    assert found == pytest.approx((0.8 - 0.25, 0.8, 0.8, 1))


def test_the_mean_is_over_edges_and_the_cosine_over_parents():
    # Features 0 and 3 are parents: 0 of 1 and 2 (gaps 1 and 0), 3 of 4 (gap 1).
    on = on_of(
        (60, (1, 0, 0, 0, 0)), (60, (1, 1, 0, 0, 0)), (60, (1, 0, 1, 0, 0)),
        (60, (0, 0, 0, 1, 0)), (60, (0, 0, 0, 1, 1)),
    )  # fmt: skip
    fires = torch.zeros(300, 2, dtype=torch.bool)
    fires[:60, 0] = fires[120:180, 0] = fires[180:240, 1] = True
    W_dec = torch.zeros(2, 5)
    W_dec[0, 0], W_dec[1, 3] = 1.0, 0.5
    found = edges_of(fires, W_dec, on, torch.eye(5), [(0, 1), (0, 2), (3, 4)])
    # (0, 1): alone it fires in 120 of 120; with 1 in none.  (0, 2): 60 of 120; with 2 in all.
    assert found.gap == pytest.approx(((1 - 0) + (0.5 - 1) + (1 - 0)) / 3)
    assert found.cosine == pytest.approx(0.75)
    assert found.count == 3


@pytest.mark.parametrize("rare", [0, 1])
def test_an_edge_with_too_few_samples_on_a_side_is_not_counted(rare):
    counts = [LEAST, LEAST]
    counts[rare] -= 1
    on = on_of((counts[0], (1, 0, 0)), (counts[1], (1, 1, 0)), (50, (1, 0, 1)))
    on[-50:, 0] = False
    fires = on.clone()
    found = edges_of(fires, EYE, on, EYE, [(0, 1)])
    assert math.isnan(found.gap)
    assert found.count == 0
    on = on_of((LEAST, (1, 0, 0)), (LEAST, (1, 1, 0)))
    assert edges_of(on, EYE, on, EYE, [(0, 1)])[::3] == (0.0, 1)


def test_f1_is_that_of_saelens_synthetic_evaluation():
    from sae_lens.synthetic.evals import compute_classification_metrics

    made = torch.Generator().manual_seed(5)
    on = torch.rand(500, 6, generator=made) < 0.3
    latents = torch.randn(500, 9, generator=made).relu() + on[:, :1]
    latents[:, 4] = 0  # a dead one
    W_dec = torch.nn.functional.normalize(torch.randn(9, 6, generator=made), dim=-1)
    expected = compute_classification_metrics(latents, on.float(), W_dec, torch.eye(6)).f1_score
    assert f1_of(latents > 0, W_dec, on, torch.eye(6)) == pytest.approx(expected, abs=1e-6)


def test_mcc_is_that_of_saelens_synthetic_evaluation():
    from sae_lens.synthetic.evals import mean_correlation_coefficient

    W_dec = torch.randn(9, 6, generator=torch.Generator().manual_seed(5))
    W_dec = torch.nn.functional.normalize(W_dec, dim=-1)
    expected = mean_correlation_coefficient(W_dec, torch.eye(6))
    assert pairwise_mcc(W_dec, torch.eye(6)) == pytest.approx(expected, abs=1e-6)


def test_an_oracle_knows_all_and_absorbs_nothing():
    world = World(roots=4, free=4, width=24, noise=0.0)
    vectors = directions(world)
    rows = sample(world, vectors, 5000, "oracle")
    oracle = SimpleNamespace(
        W_dec=vectors,
        encode=lambda x: torch.where(x @ vectors.T > 0.5, x @ vectors.T, 0.0),
        decode=lambda f: f @ vectors,
    )
    lm = SimpleNamespace(directions_KD=vectors, world=world)
    found = truth_of(oracle, lm, rows.x_ND, rows.on_NK)
    assert found["fvu"] < 1e-4
    assert found["l0"] == pytest.approx(world.true_l0, abs=0.1)
    expected = {"absorption_gap": 0, "parent_fires_alone": 1, "parent_cosine": 1, "mcc": 1, "f1": 1}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert (found["edges"], found["dead"]) == (8.0, 0.0)


# ── Controls: a small world, two seeds ──────────────────────────────────────────────────────────

SMALL_WORLD = {"roots": 6, "free": 6, "width": 36}


class Tied(experiment.BlendedSAE):
    """The linear encoder with the decoder's directions."""

    def encode(self, x, alphas, dtype):
        weights = self.b_dec, self.W_dec.transpose(1, 2), self.gate, self.b_enc
        return experiment.pre_activations(x, *weights, 1.0, dtype=dtype).relu()


def gaps(kind=experiment.BlendedSAE, steps: int = 600, **changes) -> tuple[list[float], float]:
    """(gap of each seed, mean FVU) of run_7 after so many steps at the world's true L0; what
    OnlineTruth measures, on rows not trained on."""
    world, batch = World(**SMALL_WORLD | changes), 1024
    vectors = directions(world)
    scale = tiny_world(
        d_sae=len(world.parents), training_tokens=600 * batch, batch_tokens=batch,
        target_l0s=(world.true_l0,), online_every=10**6,
    )  # fmt: skip
    x = sample(world, vectors, 600 * batch, "train").x_ND
    recipe = experiment.Recipe(learning_rate=1e-2)
    with mock.patch.object(experiment, "BlendedSAE", kind):
        trainer = experiment.Trainer(
            scale, recipe, experiment.RUNS["run_7"], 0, calibrate(x[:20_000], Ranks()), Ranks()
        )
    for rows in x.split(batch)[:steps]:
        logged = trainer.step(rows)
    online = sample(world, vectors, 20_000, "online")
    lm = SimpleNamespace(
        online=online, directions_KD=vectors, world=world, device=torch.device("cpu"),
        spread=lambda x, log_norm, layer: x,
    )  # fmt: skip
    truth = OnlineTruth(lm, 0)
    found = truth.measure(trainer.sae, [1.0, 1.0], trainer.units.scale, torch.float32)
    return [gap for gap, _ in found], logged["mse"].mean().item() if steps else 1.0


def test_the_control_absorbs_and_a_tied_encoder_hardly():
    control, fvu = gaps()
    assert min(control) > 0.25
    assert fvu < 0.15, "it is trained"
    tied, _ = gaps(Tied)
    assert max(tied) < 0.5 * min(control)


def test_of_the_same_features_without_trees_nothing_is_absorbed():
    without, fvu = gaps(trees=False)
    assert max(map(abs, without)) < 0.05
    assert fvu < 0.2, "it is trained"


def test_an_untrained_sae_absorbs_nothing():
    untrained, _ = gaps(steps=0)
    assert max(map(abs, untrained)) < 0.15


# ── The script ──────────────────────────────────────────────────────────────────────────────────


def test_a_run_in_a_world_has_an_entry_for_each_spread_and_target_and_is_paced_by_the_gap(
    cache, tmp_path
):
    scale = tiny_world(layers=(0, 1), target_l0s=(6.0, 8.5), training_tokens=40 * 256)
    process = run_script("--out_dir=run_2", scale=scale, cache=cache, cwd=tmp_path, few_k=False)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "run_2/final_info.json").read_text("utf-8"))
    names = [f"tiny world layer {layer}, L0 {l0}" for layer in (0, 1) for l0 in (6, 8.5)]
    assert sorted(results) == names
    known = {"absorption_gap", "parent_fires_alone", "parent_cosine", "edges", "mcc", "f1"}
    known |= {"fvu", "l0", "dead", "mse_roughness", "decoder_pw_mcc"}
    for name, entry in results.items():
        assert known < set(entry["means"]), name
        assert entry["notes"]["norm_spread"] == (0.25 if "layer 1" in name else 0.0)
        assert [*map(len, entry["final_info_dict"].values())] == [2] * len(entry["final_info_dict"])
        assert all(math.isfinite(entry["means"][metric]) for metric in known)
        assert entry["means"]["edges"] == 32
    first = json.loads((tmp_path / "run_2/training_log.jsonl").read_text("utf-8").split("\n")[0])
    assert len(first["pace"]) == len(first["online_absorption_fraction"]) == 4
    assert "every saved SAE, loaded afresh, computes what was trained" in process.stdout
    # One number once more, from the saved SAE, each row's features looked up by its number.
    with mock.patch.dict(os.environ, COSINE_SAE_CACHE=str(cache)):
        lm = load_world(scale)
    experiment.register_with_sae_lens()
    sae = load_sae(tmp_path / "run_2/sae/layer_1_l0_8.5_seed_1")
    numbers = torch.arange(128 * 31)
    numbers = numbers[: len(numbers) - len(numbers) // 1017]  # EOS after each document
    found = truth_of(sae, lm, lm.residuals(numbers[None])[1][0], lm.on_NK[numbers])
    values = results["tiny world layer 1, L0 8.5"]["final_info_dict"]
    for name in ("absorption_gap", "f1", "fvu", "l0"):
        assert values[name][1] == pytest.approx(found[name], abs=2e-3), name
