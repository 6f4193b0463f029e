"""What measuring absorption during training costs, as a share of training time.

    python benchmarks/online_absorption_cost.py

Times training steps of run_1 at the laptop scale's sizes on random activations, and one measurement
on random words, alternating; prints medians and the share at the default interval.
"""

import statistics
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import experiment
from lab.activations import calibrate
from lab.devices import Ranks
from lab.online_absorption import OnlineAbsorption
from lab.scales import SCALES, Scale


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made_up_words(scale: Scale, d_in: int) -> dict[str, torch.Tensor]:
    """What OnlineAbsorption takes: random words, all of which a random probe finds."""
    words = 2 * scale.online_words
    probe = {"weight": noise(26, d_in, seed=1), "bias": torch.full((26,), 1e3)}
    return probe | {
        "f1": torch.ones(26),
        "X": noise(words, d_in, seed=2),
        "y": torch.arange(words) % 26,
    }


def main() -> None:
    scale, d_in = SCALES["laptop"], 576
    units = calibrate(noise(20_000, d_in, seed=0), Ranks())
    with mock.patch.object(experiment, "training_device", lambda: torch.device("cpu")):
        recipe, run = experiment.RECIPES[scale.name], experiment.RUNS["run_1"]
        trainer = experiment.Trainer(scale, recipe, run, scale.layers[0], units, Ranks())
    online = OnlineAbsorption(made_up_words(scale, d_in), scale.online_words)
    batch = noise(scale.batch_tokens, d_in, seed=3)
    alphas = [0.5] * scale.n_seeds
    steps, measurements = [], []
    for repetition in range(12):
        start = time.perf_counter()
        trainer.step(batch)
        middle = time.perf_counter()
        online.measure(trainer.sae, alphas, units.scale, trainer.dtype)
        if repetition >= 2:  # the first ones warm up
            steps.append(middle - start)
            measurements.append(time.perf_counter() - middle)
    step, measurement = statistics.median(steps), statistics.median(measurements)
    print(f"training step: {1e3 * step:.0f} ms ({scale.n_seeds} seeds)")
    print(f"measurement: {1e3 * measurement:.0f} ms ({len(online.y)} words)")
    print(f"share of training time: {measurement / (scale.online_every * step):.1%}")


if __name__ == "__main__":
    main()
