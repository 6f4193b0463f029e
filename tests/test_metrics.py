"""Statistics, stability, agreement between seeds, and SAE-Bench's numbers under our names."""

import math
import random
import statistics

import numpy as np
import pytest
import torch

import lab.metrics
from lab.metrics import (
    WORDS,
    absorption_metrics,
    between_seeds,
    mean_or_none,
    pairwise_mcc,
    probing_metrics,
    rank_correlation,
    roughness,
    rounded,
    running_median,
    sd_or_none,
    stability,
    stderr_or_none,
)

# ── Means and their errors ──────────────────────────────────────────────────────────────────────


def test_mean_sd_and_stderr_have_the_values_worked_out_by_hand():
    values = [1.0, 2.0, 3.0, 4.0]  # squared deviations 2.25 + 0.25 + 0.25 + 2.25
    assert mean_or_none(values) == 2.5
    assert sd_or_none(values) == pytest.approx(math.sqrt(5 / 3))
    assert stderr_or_none(values) == pytest.approx(math.sqrt(5 / 3) / 2)


@pytest.mark.parametrize("name", ["mean_or_none", "sd_or_none", "stderr_or_none"])
@pytest.mark.parametrize("values", [[], [None], [0.1, None, 0.3], [None, None]])
def test_a_missing_value_makes_the_result_missing_and_never_0(name, values):
    assert getattr(lab.metrics, name)(values) is None


def test_one_value_has_a_mean_but_no_spread():
    assert mean_or_none([0.3]) == 0.3
    assert sd_or_none([0.3]) is None
    assert stderr_or_none([0.3]) is None


def test_a_value_of_0_is_not_missing():
    assert mean_or_none([0.0, 0.0]) == 0.0
    assert sd_or_none([0.0, 0.0]) == 0.0
    assert stderr_or_none([0.0, 0.0]) == 0.0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, 0.1235), (123456.0, 123500.0), (-2.00049, -2.0), (0.0, 0.0), (None, None),
        (1.23456e-7, 1.235e-7), (99999.0, 100000.0), (36, 36.0), (0.5, 0.5),
    ],
)  # fmt: skip
def test_numbers_are_shown_to_four_significant_digits(value, shown):
    assert rounded(value) == shown
    assert rounded(0.123456, digits=2) == 0.12


# ── Training-curve stability ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("n", "window"), [(1, 51), (7, 51), (60, 51), (200, 51), (40, 5), (9, 1)])
def test_the_running_median_is_centred_and_cut_at_the_ends(n, window):
    r = random.Random(n)
    values = [r.random() for _ in range(n)]
    slow = []
    for i in range(n):
        near = [values[j] for j in range(n) if abs(i - j) <= window // 2]
        slow.append(statistics.median(near))
    assert running_median(np.array(values), window).tolist() == pytest.approx(slow)


STEPS = 1000


def smooth_loss() -> np.ndarray:
    return 0.2 + 0.8 * np.exp(-np.arange(STEPS) / 200)


def of_loss(loss) -> dict:
    return stability(list(loss), [1.0] * len(loss), [1.0] * len(loss))


def test_a_smooth_curve_has_almost_no_roughness_and_no_spikes():
    found = of_loss(smooth_loss())
    assert found["loss_roughness"] < 2e-3
    assert found["loss_spikes"] == 0
    noisy = of_loss(smooth_loss() * np.exp(0.05 * np.sin(np.arange(STEPS) * 2.0)))
    assert noisy["loss_roughness"] > 10 * found["loss_roughness"]


def test_roughness_is_the_sd_of_log_loss_around_its_running_median():
    loss = np.ones(STEPS)
    loss[600] = math.e  # 799 zeros and a one: variance (1 - 1 / 800) / 799
    assert of_loss(loss)["loss_roughness"] == pytest.approx(1 / math.sqrt(800))
    assert of_loss(7 * loss)["loss_roughness"] == pytest.approx(1 / math.sqrt(800)), "no unit"


def test_the_mse_is_judged_as_the_loss_is_and_apart_from_it():
    """It is what all arms have in common, whatever they add to the loss."""
    smooth, rough = [2.0] * STEPS, [1.0] * STEPS
    rough[600] = math.e
    found = stability(smooth, rough, [1.0] * STEPS)
    assert found["mse_roughness"] == pytest.approx(1 / math.sqrt(800))
    assert (found["loss_roughness"], found["loss_spikes"]) == (0.0, 0.0)
    turned = stability(rough, smooth, [1.0] * STEPS)
    assert (turned["loss_roughness"], turned["mse_roughness"]) == (found["mse_roughness"], 0.0)
    assert roughness(rough) == found["mse_roughness"]
    assert turned["loss_spikes"] == 1.0


def test_spikes_are_steps_over_one_and_a_half_times_the_median():
    loss = smooth_loss()
    loss[[300, 301, 700]] *= 1.6
    loss[[400, 500]] *= 1.4
    assert of_loss(loss)["loss_spikes"] == 3


def test_the_first_fifth_of_training_does_not_count():
    loss, wild = smooth_loss(), smooth_loss()
    # The median of step 200 looks back to step 175.
    wild[:175] *= np.where(np.arange(175) % 2, 1.0, 40.0)
    assert of_loss(wild) == of_loss(loss)
    wild[200] *= 2
    assert of_loss(wild)["loss_spikes"] == 1, "step 200 is the first that counts"


def test_the_variation_of_the_gradient_norm_is_sd_over_mean_of_the_last_four_fifths():
    grads = [1e6, 1e-6] * 100 + [1.0, 3.0] * 400
    found = stability([1.0] * 1000, [1.0] * 1000, grads)["grad_norm_cv"]
    assert found == pytest.approx(math.sqrt(800 / 799) / 2)


def test_stability_of_a_single_step_is_missing_and_not_0():
    assert stability([1.0], [1.0], [1.0]) == {
        "loss_roughness": None,
        "mse_roughness": None,
        "loss_spikes": 0.0,
        "grad_norm_cv": None,
    }


# ── Agreement between seeds ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("a", "b", "rho"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 1000], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([1, 2, 3], [2, 3, 1], -0.5),  # 1 - 6 * 6 / (3 * 8)
    ],
)
def test_rank_correlation_is_spearmans(a, b, rho):
    assert rank_correlation(a, b) == pytest.approx(rho)


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0, 0, 0])]
)
def test_a_rank_correlation_that_means_nothing_is_missing(a, b):
    assert rank_correlation(a, b) is None


def dictionary(seed: int, n: int = 60, d: int = 12) -> torch.Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def test_a_permuted_and_sign_flipped_dictionary_is_the_same_one():
    W = dictionary(0)
    g = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (60, 1), generator=g) * 2.0 - 1
    turned = signs * W[torch.randperm(60, generator=g)]
    assert pairwise_mcc(W, turned) == pytest.approx(1.0, abs=1e-5)
    assert pairwise_mcc(W, dictionary(2)) < 0.9


def test_the_matching_is_one_to_one_and_the_best_one():
    # Greedy would match 0.9 and then 0.1; the best is 0.8 with 0.7.
    cos = torch.tensor([[0.9, 0.8], [-0.7, 0.1]])
    assert pairwise_mcc(torch.eye(2), cos.T) == pytest.approx(0.75)
    # Every row of one side is nearest to the same row of the other.
    assert pairwise_mcc(torch.eye(2), torch.tensor([[1.0, 0], [1, 0]])) == 0.5


def test_random_dictionaries_come_near_a_simulated_null():
    from scipy.optimize import linear_sum_assignment

    rng, null = np.random.default_rng(0), []
    for _ in range(10):
        a, b = rng.standard_normal((2, 60, 12))
        cos = abs(a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
        matching = zip(*linear_sum_assignment(-cos), strict=True)
        null.append(sum(cos[i, j] for i, j in matching) / 60)
    found = [pairwise_mcc(dictionary(2 * i), dictionary(2 * i + 1)) for i in range(10)]
    assert np.mean(found) == pytest.approx(np.mean(null), abs=0.02)
    assert 0.4 < np.mean(null) < 0.7, "far from 0: without its null the number says little"


def test_each_seed_is_compared_with_every_other_one():
    distance = between_seeds([1, 2, 4], lambda a, b: float(abs(a - b)))
    assert distance == [2.0, 1.5, 2.5]
    assert between_seeds([1], lambda a, b: 0.0) == [None]
    assert between_seeds([1, 1, 9], lambda a, b: None if 9 in (a, b) else 1.0) == [None, None, None]


# ── SAE-Bench's results ─────────────────────────────────────────────────────────────────────────


def probing(top_1: tuple[float, float], top_2: tuple[float, float], **more) -> dict:
    """Of tasks "code" and "news", as evaluate_probing() has it, as far as it is used."""
    details = [
        {
            "dataset_name": f"{task}_results",
            "sae_top_1_test_accuracy": one,
            "sae_top_2_test_accuracy": two,
        }
        for task, one, two in zip(("code", "news"), top_1, top_2, strict=True)
    ]
    sae = {
        "sae_test_accuracy": 0.95,
        "sae_top_1_test_accuracy": sum(top_1) / 2,
        "sae_top_2_test_accuracy": sum(top_2) / 2,
    }
    llm = {
        "llm_test_accuracy": 0.97,
        "llm_top_1_test_accuracy": 0.6,
        "llm_top_2_test_accuracy": 0.7,
    }
    metrics = {"sae": sae, "llm": llm}
    its = {"eval_result_metrics": metrics, "eval_result_details": details, **more}
    return {"sae_bench": its, "texts": {"l0_on_texts": 50.0, "fvu_on_texts": 0.3}}


def absorption(full: dict[str, float], fraction: dict[str, float], **more) -> dict:
    """Of some letters, as evaluate_absorption() has it; the means are SAE-Bench's, not remade."""
    mean = {
        "mean_full_absorption_score": 0.11,
        "mean_absorption_fraction_score": 0.22,
        "mean_num_split_features": 1.5,
    }
    details = [
        {
            "first_letter": letter,
            "full_absorption_rate": full[letter],
            "mean_absorption_fraction": fraction[letter],
        }
        for letter in full
    ]
    its = {"eval_result_metrics": {"mean": mean}, "eval_result_details": details, **more}
    words = dict(zip(WORDS, (0.7, 0.11, 0.07, 0.19, 90.0, 0.4), strict=True))
    return {"sae_bench": its, "words": words}


def test_probing_metrics_are_sae_benchs_numbers_under_our_names():
    found = probing_metrics(probing((0.6, 0.8), (0.7, 0.9)), (1, 2))
    assert found == {
        "l0_on_texts": 50.0,
        "fvu_on_texts": 0.3,
        "probing_top_1": pytest.approx(0.7),
        "probing_top_2": pytest.approx(0.8),
        "lm_top_1": 0.6,
        "lm_top_2": 0.7,
        "probing_all_latents": 0.95,
        "lm_all_channels": 0.97,
        "probing_top_1_sd_over_tasks": pytest.approx(0.1 * math.sqrt(2)),
    }


def test_absorption_metrics_are_sae_benchs_means_and_our_sd_over_letters():
    found = absorption_metrics(absorption({"a": 0.0, "b": 0.2}, {"a": 0.1, "b": 0.5}))
    assert found == {
        "absorption_full": 0.11,
        "absorption_full_sd_over_letters": pytest.approx(0.1 * math.sqrt(2)),
        "absorption_fraction": 0.22,
        "absorption_fraction_sd_over_letters": pytest.approx(0.2 * math.sqrt(2)),
        "absorption_letters": 2.0,
        "absorption_split_latents": 1.5,
        "absorption_main_fires": 0.7,
        "absorption_absorbed": 0.11,
        "absorption_absorbed_by_its_letter": 0.07,
        "absorption_lost": 0.19,
        "l0_on_words": 90.0,
        "fvu_on_words": 0.4,
    }


def test_missing_absorption_has_the_same_names_and_no_values():
    there = absorption_metrics(absorption({"a": 0.0}, {"a": 0.1}))
    missing = absorption_metrics({"sae_bench": None, "words": None})
    assert set(missing) == set(there)
    assert set(missing.values()) == {None}
