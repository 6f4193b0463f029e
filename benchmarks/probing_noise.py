"""How far sparse probing's own noise goes: the same SAEs on other texts, and read in bfloat16.

    python benchmarks/probing_noise.py run_7 run_1     # some ten minutes, after both runs

The best latents of a task are chosen by near ties, and its accuracy is counted on a few hundred
texts: an SAE's score moves without the SAE.  Here the texts of every class are drawn again with
replacement, training and test texts apart and alike for all SAEs, and the probe on the best latent
is fitted anew; then the language model and the SAEs read in the other dtype.  Of all tasks and all
seeds of two laptop runs, the second compared with the first.

Writes measure_noise.json beside the runs, where plot.py finds it.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import HERE

sys.path.insert(0, str(HERE.parent))
import experiment
import lab.bench
from lab.language_model import load_language_model
from lab.metrics import rounded
from lab.probing import evaluate_probing
from lab.quick_probing import ProbesOnActivations
from lab.scales import SCALES
from lab.seeds import seed_for
from lab.storage import json_text, write_atomically

RESAMPLES = 200
Means = dict[str, torch.Tensor]  # {class: mean latents of its texts [texts, F]}


class Kept(ProbesOnActivations):
    """Keeps what the probes on one latent are fitted to, SAE after SAE, task after task."""

    kept: list[tuple[Means, Means]]

    def __call__(self, train: Means, test: Means, select_top_k: int | None = None, **how) -> tuple:
        if select_top_k == 1 and next(iter(train.values())).shape[1] == self.d_sae:
            self.kept.append(
                tuple({k: m.clone() for k, m in part.items()} for part in (train, test))
            )
        return super().__call__(train, test, select_top_k, **how)


def means_of(saved: dict[str, Path], dtype: str) -> dict[tuple[str, str], tuple[Means, Means]]:
    """{(task, name of an SAE): mean latents of its training and test texts}."""
    scale = replace(SCALES["laptop"], evaluation_dtype=dtype)
    lm, (layer,) = load_language_model(scale), scale.layers
    Kept.kept, Kept.d_sae, usual = [], scale.d_sae, lab.bench.quick_probing.ProbesOnActivations
    lab.bench.quick_probing.ProbesOnActivations = Kept
    try:
        with tempfile.TemporaryDirectory() as folder:
            evaluate_probing(scale, lm, {layer: saved}, Path(folder))
    finally:
        lab.bench.quick_probing.ProbesOnActivations = usual
    asked = [(task, name) for task in scale.tasks for name in saved]
    return dict(zip(asked, Kept.kept, strict=True))


def accuracy(train: Means, test: Means, seed: int) -> float:
    """Of the probe on one latent, mean over the classes of a task."""
    torch.manual_seed(seed)
    _, by_class = ProbesOnActivations(None)(train, test, select_top_k=1)
    return statistics.fmean(by_class.values())


def again(means: Means, generator: torch.Generator) -> Means:
    """The same number of texts of every class, drawn with replacement."""
    return {
        label: m[torch.randint(len(m), (len(m),), generator=generator)]
        for label, m in means.items()
    }


def resampled(found: dict[tuple[str, str], tuple[Means, Means]]) -> dict[tuple[str, str], list]:
    """Accuracies of every task and SAE, over RESAMPLES draws that are the same for all SAEs."""
    scores: dict[tuple[str, str], list[float]] = {key: [] for key in found}
    for draw in range(RESAMPLES):
        for (task, name), parts in found.items():
            seed = seed_for("probing noise", task, draw)
            generator = torch.Generator().manual_seed(seed)
            train, test = (again(part, generator) for part in parts)
            scores[task, name].append(accuracy(train, test, seed))
    return scores


def sd(values: np.ndarray) -> float:
    return float(values.std(axis=-1, ddof=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("control", type=Path)
    parser.add_argument("other", type=Path)
    runs = parser.parse_args()
    experiment.register_with_sae_lens()
    saved = {
        f"{run.name} {folder.name}": folder
        for run in (runs.control, runs.other)
        for folder in sorted(run.glob("sae/layer_*"))
    }
    names, tasks = list(saved), SCALES["laptop"].tasks
    n_seeds = len(names) // 2
    exact = means_of(saved, "float32")
    scores = resampled(exact)
    # [SAEs, tasks, draws]
    drawn = np.array([[scores[task, name] for task in tasks] for name in names])
    difference = drawn[n_seeds:].mean((0, 1)) - drawn[:n_seeds].mean((0, 1))
    spread = drawn.std(axis=1, ddof=1)  # over tasks: [SAEs, draws]
    difference_of_spread = spread[n_seeds:].mean(0) - spread[:n_seeds].mean(0)
    rough = means_of(saved, "bfloat16")
    seed = seed_for("probing noise", "dtype")
    moved = np.array(
        [
            [
                accuracy(*rough[task, name], seed) - accuracy(*exact[task, name], seed)
                for task in tasks
            ]
            for name in names
        ]
    )
    result = {
        "saes": names,
        "tasks": tasks,
        "draws": RESAMPLES,
        "probing_top_1": {
            "sd_of_one_sae_one_task": rounded(sd(drawn)),
            "sd_of_mean_over_tasks": rounded(sd(drawn.mean(axis=1))),
            "sd_of_sd_over_tasks": rounded(sd(spread)),
            "sd_of_difference_of_means": rounded(sd(difference)),
            "sd_of_difference_of_sd_over_tasks": rounded(sd(difference_of_spread)),
            "bfloat16": {
                "sd_of_one_sae_one_task": rounded(float(moved.std(ddof=1))),
                "largest_of_one_sae_one_task": rounded(float(np.abs(moved).max())),
                "largest_of_mean_over_tasks": rounded(float(np.abs(moved.mean(1)).max())),
            },
        },
    }
    write_atomically(runs.control.parent / "measure_noise.json", json_text(result))
    print(json_text(result))


if __name__ == "__main__":
    main()
