"""lab/comparison.py: every number worked out by hand or by counting all cases."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import permutation_test

from lab import comparison
from lab.comparison import (
    Difference,
    difference_at,
    holm,
    overlap,
    paired_difference,
    read_off,
    sd,
    sign_flip_p,
    within_noise,
)

NOTHING = [0.0] * 20


def test_three_seeds_have_the_exact_p_of_their_eight_sign_flips_and_no_interval():
    # 1 + 2 + 3 = 6: of the sums +-1 +-2 +-3 (6, 4, 2, 0, 0, -2, -4, -6) two are as far from 0.
    found = paired_difference([1.0, 2.0, 3.0], NOTHING)
    assert found[:2] == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert np.isnan(found[2:4]).all()
    assert found[4:] == (pytest.approx(2 / 8), 3)
    # -1 + 2 + 3 = 4: four of the eight, 6, 4, -4 and -6.
    assert paired_difference([-1.0, 2.0, 3.0], NOTHING).p == pytest.approx(4 / 8)


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (2, 0.5), (6, 2 / 64), (10, 2 / 1024)])
def test_of_seeds_that_all_agree_only_two_flips_are_as_far_from_0(n, p):
    assert paired_difference(range(1, n + 1), NOTHING).p == pytest.approx(p)


def test_equal_runs_do_not_differ():
    assert paired_difference([0.5] * 8, [0.5] * 8) == Difference(0.0, 0.0, 0.0, 0.0, 1.0, 8)


def plain_bca(found: list[float], level: float = 0.95) -> tuple[float, float]:
    """Efron's (1987) formula over all n^n resamples, each once: nothing is drawn."""
    n, normal = len(found), NormalDist()
    means = np.sort([sum(draw) / n for draw in itertools.product(found, repeat=n)])
    mean = sum(found) / n
    below = ((means < mean - 1e-9).sum() + (means < mean + 1e-9).sum()) / 2  # a tie counts half
    z0 = normal.inv_cdf(below / len(means))
    left_out = np.array([(sum(found) - x) / (n - 1) for x in found])
    away = left_out.mean() - left_out
    a = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = z0 + normal.inv_cdf(tail)
        ends.append(np.quantile(means, normal.cdf(z0 + z / (1 - a * z))))
    return tuple(ends)


@pytest.mark.parametrize(
    "found", [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.1, 0.2, 0.2, 0.3, 0.5, 2.0]], ids=str
)
def test_the_interval_is_the_bca_bootstraps_of_all_resamples(found):
    """The second is skewed: its interval is none that is symmetric or taken as it comes."""
    low, high = plain_bca(found)
    got = paired_difference([x + 5 for x in found], [5.0] * 6)
    assert (got.low, got.high) == (pytest.approx(low, abs=0.05), pytest.approx(high, abs=0.05))
    assert got.low < got.mean < got.high


def test_a_skewed_interval_is_not_the_percentile_bootstraps():
    """What the test above would not see if the two were alike."""
    found = [0.1, 0.2, 0.2, 0.3, 0.5, 2.0]
    means = [sum(draw) / 6 for draw in itertools.product(found, repeat=6)]
    assert plain_bca(found)[1] > np.quantile(means, 0.975) + 0.1


def test_the_interval_is_the_same_every_time_and_leaves_the_global_generator_alone():
    ours = [0.3, 0.1, 0.25, 0.4, 0.2, 0.35, 0.15]
    np.random.seed(3)  # noqa: NPY002
    first = paired_difference(ours, NOTHING)
    drawn = np.random.rand()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    assert drawn == np.random.rand()  # noqa: NPY002
    assert paired_difference(ours, NOTHING) == first


def test_only_seeds_that_both_have_are_compared():
    found = paired_difference([1.0, 2.0, 9.0], [0.0, 0.0])
    assert (found.mean, found.n) == (1.5, 2)
    assert paired_difference([], [1.0]).n == 0


def test_a_missing_seed_makes_the_difference_missing():
    found = paired_difference([1.0, None, 3.0], NOTHING)
    assert np.isnan(found[:5]).all()


def test_seeds_beyond_an_exact_test_have_an_interval_and_no_p():
    found = paired_difference(range(comparison.MOST_SEEDS + 1), [0.5] * 30)
    assert math.isnan(found.p)
    assert math.isfinite(found.low)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_the_exact_p_is_scipys(n):
    found = np.random.default_rng(n).normal(0.5, 1, n)
    how = {"permutation_type": "samples", "n_resamples": np.inf, "vectorized": True}
    assert sign_flip_p(found) == permutation_test((found,), np.mean, **how).pvalue
    tied = np.array([0.1, 0.2, 0.3, -0.3, 0.1])[:n]  # sums that only rounding tells apart
    assert sign_flip_p(tied) == permutation_test((tied,), np.mean, **how).pvalue


def test_the_noise_of_the_control_is_the_sd_over_its_seeds():
    control = [1.0, 2.0, 3.0]  # sd 1
    assert sd(control) == 1.0
    assert [within_noise(x, control) for x in (0.99, -0.99, 1.01, -1.01)] == [True] * 2 + [
        False
    ] * 2
    assert not within_noise(0.0, [1.0])
    assert not within_noise(0.0, [1.0, None])
    assert not within_noise(math.nan, control)


def test_holm_by_hand():
    # .01 x 3 = .03; .02 x 2 = .04; .03 x 1 = .03, but no less than the one before it.
    found = holm({"b": 0.02, "c": 0.03, "a": 0.01})
    assert found == {"b": pytest.approx(0.04), "c": pytest.approx(0.04), "a": pytest.approx(0.03)}
    assert list(found) == ["b", "c", "a"]
    assert holm({"a": 0.5, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.5])
def test_holm_is_of_all_that_was_declared_or_not_at_all(wrong):
    with pytest.raises(ValueError, match="no p of b"):
        holm({"a": 0.01, "b": wrong})


def test_a_curve_is_read_off_on_a_straight_line_over_log_x():
    curve = ([8.0, 2.0, 32.0], [0.4, 0.8, -0.2])  # in any order
    assert read_off(curve, 4.0) == pytest.approx(0.6)  # half way from 2 to 8
    assert read_off(curve, 16.0) == pytest.approx(0.1)
    assert read_off(curve, 2.0) == pytest.approx(0.8)
    assert read_off(curve, 32.0) == pytest.approx(-0.2)


@pytest.mark.parametrize("x", [1.99, 32.01, math.nan])
def test_a_curve_is_not_continued_beyond_its_points(x):
    assert read_off(([2.0, 8.0, 32.0], [0.8, 0.4, -0.2]), x) is None


@pytest.mark.parametrize(
    "curve", [([], []), ([1.0, 2.0], [0.5, None]), ([0.0, 2.0], [0.5, 1.0]), ([1.0, None], [1, 1])]
)
def test_a_curve_with_a_point_missing_is_not_read_off(curve):
    assert read_off(curve, 1.0) is None


def test_the_overlap_is_what_every_curve_reaches():
    a, b, c = ([1.0, 4.0], [0, 0]), ([5.0, 2.0], [0, 0]), ([6.0, 7.0], [0, 0])
    assert overlap(a, b) == (2.0, 4.0)
    assert overlap(a, b, c) is None
    assert overlap(a) == (1.0, 4.0)


def test_two_runs_are_compared_at_equal_x_seed_by_seed():
    # At x = 4 run a's seeds read .5 and .7, run b's .3 and .4.
    a = [([2.0, 8.0], [0.4, 0.6]), ([1.0, 16.0], [0.5, 0.9])]
    b = [([4.0, 8.0], [0.3, 0.9]), ([2.0, 4.0], [0.9, 0.4])]
    found = difference_at(a, b, 4.0)
    assert (found.mean, found.n, found.p) == (pytest.approx(0.25), 2, 0.5)
    assert difference_at(a, b, 5.0) is None  # the last curve ends at 4
    assert difference_at([], b, 4.0) is None


def test_an_interval_needs_as_many_seeds_as_a_test_that_can_reach_a_twentieth():
    n = comparison.SEEDS_FOR_AN_INTERVAL
    assert paired_difference(range(1, n + 1), NOTHING).p < 0.05
    assert paired_difference(range(1, n), NOTHING).p > 0.05
    assert math.isfinite(paired_difference(range(n), NOTHING).low)
    assert math.isnan(paired_difference(range(n - 1), NOTHING).low)
