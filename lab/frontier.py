"""Curves over target L0s: which arms belong to one, where they are read off, what was declared.

Absorption falls steeply with L0 and hides in a bad reconstruction, so two runs are compared where
they are equally sparse, and where they are equally faithful.  Promises that the places are chosen
from the control alone, that no curve is continued beyond its points, and that what a comparison is
decided by was said before (ENDPOINTS).  Needs numpy and scipy, and neither torch nor matplotlib.
"""

import math
from collections.abc import Sequence
from statistics import median_low
from typing import NamedTuple

import numpy as np

from lab.comparison import (
    Curve,
    Difference,
    difference_at,
    holm,
    overlap,
    paired_difference,
    read_off,
    within_noise,
)
from lab.runs import AT_L0, Arm

# The three questions and the score that answers each; in a world with known features there is no
# probing, and absorption is known.
ENDPOINTS = {
    "stability": "mse_roughness",
    "absorption": "absorption_absorbed",
    "probing": "probing_top_1_sd_over_tasks",
}
EQUAL = {"absorption": ("l0", "fvu"), "probing": ("l0",)}  # what is made equal for the question
ENDPOINTS_OF_A_WORLD = {"stability": "mse_roughness", "absorption": "absorption_gap"}

LEVELS = ("a quarter", "middle", "three quarters")
EVERY_L0 = ", every L0"  # in the name of a layer with several targets

ByTarget = dict[float | None, Arm]  # one run's arms, ascending; None: the only target there is


class Comparison(NamedTuple):
    """A run less the control, and what the control's own seeds are there."""

    found: Difference  # NaN where the two cannot be compared
    control: Sequence[float]
    x: str = ""  # what is equal, or nothing, the targets being all that is
    level: float = math.nan  # of x

    @property
    def in_noise(self) -> bool:
        return within_noise(self.found.mean, self.control)


UNKNOWN = Difference(*[math.nan] * 5, n=0)


def target_of(arm: Arm) -> float | None:
    """None in a run with one target, whose entries do not name it."""
    target = arm.key.partition(AT_L0)[2]
    return float(target) if target else None


def by_layer(groups: dict[str, list[Arm]]) -> dict[str, list[Arm]]:
    """The arms of each "<scale> layer <L>", of all its targets, from those of each entry.  Runs
    with one target stay apart from runs with several: they share no curve."""
    layers: dict[str, list[Arm]] = {}
    for key, arms in groups.items():
        layer, at_l0, _ = key.partition(AT_L0)
        layers.setdefault(layer + (EVERY_L0 if at_l0 else ""), []).extend(arms)
    return layers


def by_run(arms: list[Arm]) -> dict[str, ByTarget]:
    """In the order in which runs come first."""
    runs: dict[str, ByTarget] = {}
    for arm in sorted(arms, key=lambda arm: target_of(arm) or 0.0):
        runs.setdefault(arm.name, {})[target_of(arm)] = arm
    return {name: runs[name] for name in dict.fromkeys(arm.name for arm in arms)}


def several(run: ByTarget) -> bool:
    """Whether there is a curve, and not one point."""
    return None not in run


def at_middle(arms: list[Arm], control: str) -> list[Arm]:
    """Those of the control's middle target (of two, the lower); without it, of that of all."""
    targets = {target_of(a) for a in arms if a.name == control} or {target_of(a) for a in arms}
    middle = median_low(targets) if None not in targets else None
    return [arm for arm in arms if target_of(arm) == middle]


def of_seeds(arm: Arm, metric: str) -> np.ndarray:
    """One value per seed; the sd over probing tasks from the tasks themselves."""
    if metric == ENDPOINTS["probing"] and arm.tasks():
        tasks = list(arm.tasks().values())
        n = min(map(len, tasks))
        table = np.array([seeds[:n] for seeds in tasks], dtype=float)
        return table.std(0, ddof=1) if len(tasks) > 1 else np.full(n, math.nan)
    return arm.seeds(metric)


def measured_as(arms: list[Arm], quantity: str, metric: str) -> str:
    """The name under which "l0" or "fvu" is known on what `metric` is scored on: words, texts; that
    on held-out text where no arm has it."""
    group = {"absorption": "_on_words", "probing": "_on_texts"}.get(metric.partition("_")[0], "")
    known = any(np.isfinite(arm.seeds(quantity + group)).any() for arm in arms)
    return quantity + group if known else quantity


def _shared(runs: Sequence[ByTarget], metrics: Sequence[str]) -> np.ndarray:
    """[run, metric, target, seed], over the targets at which every run has every metric of every
    seed that all of them have: a line across a hole is another line than one through a point."""
    found = [
        [[of_seeds(run[target], metric) for metric in metrics] for run in runs]
        for target in runs[0]
        if all(target in run for run in runs)
    ]
    found = [at for at in found if all(len(seeds) for run in at for seeds in run)]
    n = min((len(seeds) for at in found for run in at for seeds in run), default=0)
    table = np.array([[[seeds[:n] for seeds in run] for run in at] for at in found])
    table = table.reshape(len(found), len(runs), len(metrics), n)
    return table[np.isfinite(table).all((1, 2, 3))].transpose(1, 2, 0, 3)


def n_targets(run: ByTarget, control: ByTarget, x: str, y: str) -> int:
    """How many targets a comparison of two curves rests on."""
    return _shared([run, control], (x, y)).shape[2]


def curves(runs: Sequence[ByTarget], x: str, y: str) -> list[list[Curve]]:
    """A curve of each seed of each run, over the targets and seeds that all of them have."""
    return [list(zip(xs.T, ys.T, strict=True)) for xs, ys in _shared(runs, (x, y))]


def levels(control: ByTarget, x: str) -> dict[str, float]:
    """Where curves over x are read off, by a rule that looks at the control's x alone: its mean at
    the middle target (of an even number, the geometric mean of the middle two), and a quarter and
    three quarters of the way, in log x, through what all its seeds reach.  NaN without a curve."""
    ((xs,),) = _shared([control], [x])
    reached = overlap(*((seed, seed) for seed in xs.T)) if len(xs) > 1 and xs.size else None
    if not reached or reached[0] <= 0:
        return dict.fromkeys(LEVELS, math.nan)
    low, high = np.log(reached)
    middle = np.median(np.log(xs.mean(1)))
    found = low + (high - low) / 4, middle, low + (high - low) * 3 / 4
    # Rounded: exp(log(8)) is a little off, and misses a curve that ends at 8.
    return {name: float(f"{math.exp(x):.10g}") for name, x in zip(LEVELS, found, strict=True)}


def at_level(run: ByTarget, control: ByTarget, x: str, y: str, level: float) -> Comparison:
    """Of y where both have this x; nothing unless every seed's curve of either reaches it."""
    ours, theirs = curves([run, control], x, y)
    found = difference_at(ours, theirs, level)
    if not found:
        return Comparison(UNKNOWN, (), x, level)
    return Comparison(found, [read_off(curve, level) for curve in theirs], x, level)


def over_targets(run: ByTarget, control: ByTarget, metric: str) -> Comparison:
    """Of the mean over the targets that both have; with one target, of that."""
    (ours,), (theirs,) = _shared([run, control], [metric])
    if not theirs.size:
        return Comparison(UNKNOWN, ())
    return Comparison(paired_difference(ours.mean(0), theirs.mean(0)), theirs.mean(0))


class Endpoint(NamedTuple):
    """What one of the questions is decided by."""

    metric: str
    readings: list[Comparison]
    p: float  # of the weakest reading; NaN where one is missing
    holm: float  # the same among all questions, of which a missing one counts as p = 1


def endpoints_of(control: ByTarget) -> dict[str, str]:
    """The metric that decides each question."""
    known = any(len(arm.seeds("absorption_gap")) for arm in control.values())
    return ENDPOINTS_OF_A_WORLD if known else ENDPOINTS


def endpoints(run: ByTarget, control: ByTarget) -> dict[str, Endpoint]:
    """The declared comparison of a run with the control, by question."""
    declared = endpoints_of(control)
    readings = {
        question: [over_targets(run, control, metric)]
        if question == "stability" or not several(control)
        else [at_middle_level(run, control, equal, metric) for equal in EQUAL[question]]
        for question, metric in declared.items()
    }
    ps = {question: _weakest(found) for question, found in readings.items()}
    adjusted = holm({question: 1.0 if math.isnan(p) else p for question, p in ps.items()})
    return {q: Endpoint(declared[q], readings[q], ps[q], adjusted[q]) for q in declared}


def at_middle_level(run: ByTarget, control: ByTarget, equal: str, metric: str) -> Comparison:
    """Where "l0" or "fvu", on what `metric` is scored on, is the control's at its middle target."""
    x = measured_as(list(control.values()), equal, metric)
    return at_level(run, control, x, metric, levels(control, x)["middle"])


def _weakest(readings: list[Comparison]) -> float:
    """The larger p, since all readings must hold; those that differ in sign hold nothing."""
    ps, signs = [r.found.p for r in readings], {np.sign(r.found.mean) for r in readings}
    if np.isnan(ps).any():
        return math.nan
    return max(ps) if len(signs) == 1 else 1.0
