"""The numbers of a run: statistics of a training curve, of seeds, of SAE-Bench's results."""

import math
from collections.abc import Callable

import numpy as np
import torch


def finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def mean_or_none(values: list[float | None]) -> float | None:
    """Mean; a missing value makes it missing, never 0."""
    return None if not values or None in values else float(np.mean(values))


def stderr_or_none(values: list[float | None]) -> float | None:
    """sd(ddof=1) / sqrt(n); missing for fewer than two values."""
    if len(values) < 2 or None in values:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def rounded(value: float | None, digits: int = 4) -> float | None:
    """To so many significant digits."""
    return None if value is None else float(f"{value:.{digits}g}")


def sd_or_none(values: list[float | None]) -> float | None:
    return None if len(values) < 2 or None in values else float(np.std(values, ddof=1))


def running_median(values: np.ndarray, window: int = 51) -> np.ndarray:
    """Centred running median; at the ends the window is cut, not padded."""
    half = window // 2
    return np.array(
        [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    )


def roughness(curve: list[float]) -> float | None:
    """sd of a curve's logarithm around its centred running median, last 80% of steps."""
    around = (np.log(curve) - np.log(running_median(np.asarray(curve))))[len(curve) // 5 :]
    return float(np.std(around, ddof=1)) if len(around) > 1 else None


def stability(
    loss: list[float], mse: list[float], grad_norm: list[float]
) -> dict[str, float | None]:
    """Training-curve stability of one seed, on the raw loss: an averaged one is smooth anyway.

    loss_roughness, mse_roughness: roughness() of either; the mse is what all arms have in common,
    whatever they add to the loss.
    loss_spikes: steps of the last 80% whose loss is over 1.5 times the running median.
    grad_norm_cv: sd / mean of the gradient norm there.
    """
    start, median = len(loss) // 5, running_median(np.asarray(loss))
    grads = np.asarray(grad_norm)[start:]
    return {
        "loss_roughness": roughness(loss),
        "mse_roughness": roughness(mse),
        "loss_spikes": float((np.asarray(loss) > 1.5 * median)[start:].sum()),
        "grad_norm_cv": float(np.std(grads, ddof=1) / grads.mean())
        if len(grads) > 1 and grads.mean() > 0
        else None,
    }


def rank_correlation(a: list[float], b: list[float]) -> float | None:
    """Spearman's; missing where one side does not vary."""
    from scipy.stats import spearmanr

    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return float(spearmanr(a, b).statistic)


def pairwise_mcc(W_dec_a: torch.Tensor, W_dec_b: torch.Tensor) -> float:
    """PW-MCC (arXiv 2505.20254): mean |cosine| of the best one-to-one matching of decoder rows."""
    from scipy.optimize import linear_sum_assignment

    cos = (W_dec_a @ W_dec_b.T).abs().numpy()
    return float(cos[linear_sum_assignment(cos, maximize=True)].mean())


def between_seeds(values: list, compare: Callable) -> list[float | None]:
    """For each seed, the mean of compare() with every other seed; missing for a single seed."""
    n = len(values)
    table = {(i, j): compare(values[i], values[j]) for i in range(n) for j in range(i)}
    return [
        mean_or_none([table[max(i, j), min(i, j)] for j in range(n) if j != i]) for i in range(n)
    ]


def _of_top_k(its: dict, k_values: tuple[int, ...]) -> dict[str, float]:
    sae = its["eval_result_metrics"]["sae"]
    return {f"probing_top_{k}": sae[f"sae_top_{k}_test_accuracy"] for k in k_values}


def _sd_over_tasks(its: dict) -> dict[str, float | None]:
    top_1 = [task["sae_top_1_test_accuracy"] for task in its["eval_result_details"]]
    return {"probing_top_1_sd_over_tasks": sd_or_none(top_1)}


def probing_metrics(found: dict, k_values: tuple[int, ...]) -> dict[str, float]:
    """One SAE's sparse-probing numbers, of evaluate_probing()."""
    its = found["sae_bench"]
    sae, llm = its["eval_result_metrics"]["sae"], its["eval_result_metrics"]["llm"]
    metrics = _of_top_k(its, k_values)
    metrics |= {f"lm_top_{k}": llm[f"llm_top_{k}_test_accuracy"] for k in k_values}
    metrics["probing_all_latents"] = sae["sae_test_accuracy"]
    metrics["lm_all_channels"] = llm["llm_test_accuracy"]
    return metrics | _sd_over_tasks(its) | found["texts"]


def readout_metrics(found: dict, k_values: tuple[int, ...]) -> dict[str, float]:
    """The same numbers as far as a read-out is scored: probes on k latents."""
    return _of_top_k(found, k_values) | (_sd_over_tasks(found) if 1 in k_values else {})


ABSORPTION_NAMES = {  # ours -> (SAE-Bench's mean, its per-letter value)
    "absorption_full": ("mean_full_absorption_score", "full_absorption_rate"),
    "absorption_fraction": ("mean_absorption_fraction_score", "mean_absorption_fraction"),
}


# What becomes of the scored words (lab/quick_absorption.py has their definitions).
WORDS = (
    "absorption_main_fires",
    "absorption_absorbed",
    "absorption_absorbed_by_its_letter",
    "absorption_lost",
    "l0_on_words",
    "fvu_on_words",
)


def absorption_metrics(found: dict) -> dict[str, float | None]:
    """One SAE's absorption numbers, of evaluate_absorption(); None where SAE-Bench gave none."""
    its = found["sae_bench"]
    if its is None:
        names = [f"{name}{end}" for name in ABSORPTION_NAMES for end in ("", "_sd_over_letters")]
        return dict.fromkeys([*names, "absorption_letters", "absorption_split_latents", *WORDS])
    mean, letters = its["eval_result_metrics"]["mean"], its["eval_result_details"]
    metrics = {name: found["words"][name] for name in WORDS}
    for name, (score, detail) in ABSORPTION_NAMES.items():
        metrics[name] = mean[score]
        metrics[f"{name}_sd_over_letters"] = sd_or_none([letter[detail] for letter in letters])
    metrics["absorption_letters"] = float(len(letters))
    metrics["absorption_split_latents"] = mean["mean_num_split_features"]
    return metrics
