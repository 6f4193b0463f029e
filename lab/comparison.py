"""What a few seeds say of two runs: their difference, how sure it is, curves read off alike.

Promises that a difference is paired by seed and never comes alone: interval, exact p, number of
seeds.  A missing value makes it missing.  Needs numpy and scipy, and neither torch nor matplotlib.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# With fewer seeds no sign flip test reaches p < .05 (2 / 2^5 = .0625), and a bootstrap's interval
# is too narrow: it would call differences real that the test beside it does not.
SEEDS_FOR_AN_INTERVAL = 6
MOST_SEEDS = 22  # 4 million sign flips are still all tried
# Named as in lab/seeds.py, which needs torch: the same differences always get the same interval.
RESAMPLING = int.from_bytes(b"bootstrap of a difference", "big")

Value = tuple[float, float]  # mean and standard error, NaN where missing
Curve = tuple[Sequence[float], Sequence[float]]  # x and y of each point


def mean_and_error(values) -> Value | tuple[np.ndarray, np.ndarray]:
    """Over the last axis, the seeds.  A None makes both NaN; a single seed has no error."""
    values = np.array(values, dtype=float)
    n = values.shape[-1]
    mean = values.mean(-1) if n else np.full(values.shape[:-1], math.nan)
    error = values.std(-1, ddof=1) / math.sqrt(n) if n > 1 else np.full_like(mean, math.nan)
    return mean, error


def sd(values: Sequence[float | None]) -> float:
    """Over seeds, ddof=1; NaN for fewer than two or where one is missing."""
    values = np.array(values, dtype=float)
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


class Difference(NamedTuple):
    """Of two runs, seed by seed; NaN where missing."""

    mean: float
    error: float  # sd(ddof=1) / sqrt(n)
    low: float  # of the 95% BCa bootstrap interval; missing below SEEDS_FOR_AN_INTERVAL
    high: float
    p: float  # two-sided, of all 2^n ways to flip the signs; missing above MOST_SEEDS
    n: int  # seeds that both runs have

    @property
    def bar(self) -> tuple[float, float]:
        """How far below and above the mean to draw: to the interval's ends, or the error."""
        if math.isfinite(self.low):
            return self.mean - self.low, self.high - self.mean
        return self.error, self.error


def paired_difference(a: Sequence[float | None], b: Sequence[float | None]) -> Difference:
    """Seed s of `a` minus seed s of `b`, over the seeds that both have.

    Seed s starts from the same weights and sees the same batches in every run, so what the seeds
    differ by drops out.  The interval is the BCa bootstrap's (Efron 1987), the p of an exact sign
    flip test: if the runs do not differ, a seed's difference is as likely the other way round.
    """
    n = min(len(a), len(b))
    found = np.array(a[:n], dtype=float) - np.array(b[:n], dtype=float)
    mean, error = map(float, mean_and_error(found))
    if not math.isfinite(mean):
        return Difference(mean, error, math.nan, math.nan, math.nan, n)
    return Difference(mean, error, *_interval(found), sign_flip_p(found), n)


def _interval(found: np.ndarray) -> tuple[float, float]:
    from scipy.stats import bootstrap

    if len(found) < SEEDS_FOR_AN_INTERVAL:
        return math.nan, math.nan
    if np.ptp(found) <= 1e-12 * np.abs(found).max():  # every resample is the same: BCa divides by 0
        return float(found.mean()), float(found.mean())
    rng = np.random.default_rng(RESAMPLING)
    low, high = bootstrap((found,), np.mean, method="BCa", rng=rng).confidence_interval
    return float(low), float(high)


def sign_flip_p(found: Sequence[float]) -> float:
    """Share of all 2^n ways to flip the signs whose sum is as far from 0: scipy's permutation_test
    of one sample, which builds every flip on its own and takes a thousand times as long."""
    if len(found) > MOST_SEEDS:
        return math.nan
    sums = np.zeros(1)
    for x in found:
        sums = np.concatenate([sums + x, sums - x])
    rounding = 1e-12 * np.abs(found).sum()
    return float((np.abs(sums) >= abs(np.sum(found)) - rounding).mean())


def missed_target(means: dict[str, float | None], tolerance: float = 0.02) -> str:
    """A warning where a run ended elsewhere than at its target L0 by more than so much of it; from
    the means of an entry.  Sparser SAEs reconstruct worse and absorb more, whatever the arm."""
    l0, target = means.get("l0"), means.get("l0_target")
    if l0 is None or not target or abs(l0 / target - 1) <= tolerance:
        return ""
    return f"L0 MISSED: {l0:.4g} where {target:g} was asked ({l0 / target - 1:+.1%})"


def within_noise(mean: float, control: Sequence[float | None]) -> bool:
    """Whether a difference to the control is smaller than what the control's own seeds differ by,
    their sd; not where that is unknown."""
    return abs(mean) < sd(control)


def holm(ps: dict[str, float]) -> dict[str, float]:
    """Each p as it stands among all of them (Holm 1979): the k-th smallest of m counts m - k + 1
    times, at least as much as those before it and at most 1.  Below .05 it is significant with a
    chance of at most 5% that any of them is by accident.  Raises ValueError for what is no p."""
    if wrong := [name for name, p in ps.items() if not 0 <= p <= 1]:
        raise ValueError(f"no p of {', '.join(wrong)}: Holm's method needs all that were declared")
    adjusted, worst = {}, 0.0
    for k, name in enumerate(sorted(ps, key=ps.__getitem__)):
        worst = max(worst, min(1.0, (len(ps) - k) * ps[name]))
        adjusted[name] = worst
    return {name: adjusted[name] for name in ps}


def overlap(*curves: Curve) -> tuple[float, float] | None:
    """The x that all of them reach, (lowest, highest); None where there are none."""
    low, high = max(min(x) for x, _ in curves), min(max(x) for x, _ in curves)
    return (low, high) if low <= high else None


def read_off(curve: Curve, x: float) -> float | None:
    """y of a curve at x > 0, a straight line over log x between its two nearest points; None
    outside of what it reaches.  y itself is not logged: a score may be 0, and a gap below it."""
    xs, ys = (np.array(side, dtype=float) for side in curve)
    known = len(xs) and np.isfinite([xs, ys]).all() and xs.min() > 0
    if not (known and xs.min() <= x <= xs.max()):
        return None
    order = np.argsort(xs, kind="stable")
    return float(np.interp(math.log(x), np.log(xs[order]), ys[order]))


def difference_at(a: Sequence[Curve], b: Sequence[Curve], x: float) -> Difference | None:
    """paired_difference() of two runs at equal x, from a curve of each seed; None unless every
    curve reaches x: some seeds only would be a choice among them."""
    n = min(len(a), len(b))
    at_x = [[read_off(curve, x) for curve in curves[:n]] for curves in (a, b)]
    return None if not n or None in at_x[0] + at_x[1] else paired_difference(*at_x)
