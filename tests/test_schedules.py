"""Schedules against numbers worked out by hand; what Run refuses and RUNS promises."""

import math
from dataclasses import asdict
from itertools import pairwise

import pytest
from tiny import hundred_steps

import experiment
from lab.process import ExperimentError

# progress: alpha, worked out by hand for alpha_start 0.1 and alpha_end 0.9
BY_HAND = {
    "linear": {0.0: 0.1, 0.25: 0.3, 0.5: 0.5, 0.75: 0.7, 1.0: 0.9},
    "fixed": {0.0: 0.1, 0.25: 0.1, 0.5: 0.1, 0.75: 0.1, 1.0: 0.1},
    "fast": {0.0: 0.1, 0.25: 0.5, 0.4: 0.74, 0.5: 0.9, 0.75: 0.9, 1.0: 0.9},
    # (1 - cos(pi / 4)) / 2 = 0.1464466
    "cosine": {0.0: 0.1, 0.25: 0.2171573, 0.5: 0.5, 0.75: 0.7828427, 1.0: 0.9},
    # (1 - e^-1.25) / (1 - e^-5) = 0.7183352, (1 - e^-2.5) / (1 - e^-5) = 0.9241418
    "exponential": {0.0: 0.1, 0.25: 0.6746682, 0.5: 0.8393135, 1.0: 0.9},
    "adaptive": {0.0: 0.1, 0.25: 0.3, 0.5: 0.5, 1.0: 0.9},
}


# ── Alpha schedules ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("schedule", "progress", "alpha"),
    [(name, progress, alpha) for name, row in BY_HAND.items() for progress, alpha in row.items()],
)
def test_alpha_has_the_value_worked_out_by_hand(schedule, progress, alpha):
    run = experiment.Run("", schedule=schedule, alpha_start=0.1, alpha_end=0.9)
    assert experiment.alpha_at(run, progress) == pytest.approx(alpha, abs=1e-6)


@pytest.mark.parametrize("schedule", sorted(BY_HAND))
def test_alpha_rises_monotonically_between_its_ends(schedule):
    run = experiment.Run("", schedule=schedule, alpha_start=0.1, alpha_end=0.9)
    alphas = [experiment.alpha_at(run, i / 500) for i in range(501)]
    assert all(a <= b for a, b in pairwise(alphas))
    assert min(alphas) >= 0.1 - 1e-12 and max(alphas) <= 0.9 + 1e-12
    if schedule not in ("fixed", "fast"):
        assert all(a < b for a, b in pairwise(alphas)), "it never rests"


def test_alpha_falls_when_it_starts_above_its_end():
    run = experiment.Run("", alpha_start=0.8, alpha_end=0.2)
    assert experiment.alpha_at(run, 0.25) == pytest.approx(0.65)
    assert experiment.alpha_at(run, 1.0) == pytest.approx(0.2)


def test_the_learned_blend_has_no_alpha():
    run = experiment.RUNS["run_10"]
    assert [experiment.alpha_at(run, p) for p in (0.0, 0.5, 1.0)] == [0.0, 0.0, 0.0]


def test_every_schedule_name_has_a_function_and_no_function_is_unreachable():
    assert set(experiment.ALPHA_SCHEDULES) == set(experiment.SCHEDULES)
    assert set(BY_HAND) | {"learned"} == set(experiment.SCHEDULES), "a schedule without a test"


@pytest.mark.parametrize("progress", [-1e-9, 1 + 1e-9, -1.0, 2.0, math.nan])
def test_progress_outside_0_to_1_is_refused(progress):
    with pytest.raises(ExperimentError, match="progress"):
        experiment.alpha_at(experiment.METHOD, progress)


# ── L0 target and learning rate ─────────────────────────────────────────────────────────────────


def test_l0_target_falls_geometrically_and_rests_at_the_target():
    s = hundred_steps()  # 64 -> 4 over the first half: a factor 2 every eighth
    found = [experiment.l0_target_at(s, i / 8) for i in range(9)]
    assert found == pytest.approx([64, 32, 16, 8, 4, 4, 4, 4, 4])


def test_l0_target_is_the_target_from_tightening_fraction_on():
    s = hundred_steps(tightening_fraction=0.3)
    assert experiment.l0_target_at(s, 0.29) > 4.2
    assert experiment.l0_target_at(s, 0.3) == pytest.approx(4.0)
    assert experiment.l0_target_at(s, 1.0) == pytest.approx(4.0)


def test_learning_rate_warms_up_linearly_from_the_first_step():
    s = hundred_steps()
    found = [experiment.learning_rate_at(s, step) for step in (0, 1, 4, 8, 9)]
    assert found == pytest.approx([0.05, 0.1, 0.25, 0.45, 0.5])


def test_learning_rate_is_constant_between_warm_up_and_decay():
    s = hundred_steps()
    assert {experiment.learning_rate_at(s, step) for step in range(9, 81)} == {0.5}


def test_learning_rate_falls_linearly_is_positive_at_the_last_step_and_0_just_after():
    s = hundred_steps()
    found = [experiment.learning_rate_at(s, step) for step in (85, 90, 95, 99, 100)]
    assert found == pytest.approx([0.375, 0.25, 0.125, 0.025, 0.0])
    assert experiment.learning_rate_at(s, s.total_steps - 1) > 0


def test_learning_rate_without_warm_up_and_decay_is_one_constant():
    s = hundred_steps(warmup_steps=0, decay_fraction=0.0)
    assert {experiment.learning_rate_at(s, step) for step in range(100)} == {0.5}


def test_learning_rate_never_exceeds_its_setting_even_if_warm_up_outlasts_training():
    s = hundred_steps(warmup_steps=1000)
    rates = [experiment.learning_rate_at(s, step) for step in range(100)]
    assert all(0 < rate <= 0.5 for rate in rates)


# ── What a configuration refuses ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "quadratic"),
        ("schedule", ""),
        ("alpha_start", -0.1),
        ("alpha_start", 1.1),
        ("alpha_start", math.nan),
        ("alpha_end", -1e-9),
        ("alpha_end", math.inf),
        ("alpha_end", math.nan),
        ("readout_alphas", (0.0, 1.5)),
        ("readout_alphas", (-0.5,)),
        ("readout_alphas", (math.nan,)),
    ],
)
def test_a_bad_value_of_a_run_is_refused_by_name(field, value):
    with pytest.raises(ExperimentError, match=field):
        experiment.Run("bad", **{field: value})


@pytest.mark.parametrize(("start", "end"), [(0.1, 0.9), (0.0, 0.5), (1.0, 1.0)])
def test_a_learned_blend_with_an_alpha_is_refused(start, end):
    with pytest.raises(ExperimentError, match="alpha_start=alpha_end=0"):
        experiment.Run("bad", schedule="learned", alpha_start=start, alpha_end=end)


def test_a_configuration_cannot_change_behind_its_own_check():
    with pytest.raises(AttributeError):
        hundred_steps().training_tokens = 0
    with pytest.raises(AttributeError):
        experiment.RUNS["run_7"].ema = True


# ── The plan ────────────────────────────────────────────────────────────────────────────────────

METHOD = {"schedule": "linear", "alpha_start": 0.1, "alpha_end": 0.9, "ema": True}
# What each run changes of the method.
PLAN = {
    "run_1": {},
    "run_2": {"schedule": "adaptive"},
    "run_3": {"schedule": "fixed", "alpha_start": 0.5, "alpha_end": 0.5},
    "run_4": {"schedule": "fast"},
    "run_5": {"schedule": "cosine"},
    "run_6": {"schedule": "exponential"},
    "run_7": {"schedule": "fixed", "alpha_start": 1.0, "alpha_end": 1.0, "ema": False},
    "run_8": {"schedule": "fixed", "alpha_start": 0.0, "alpha_end": 0.0, "ema": False},
    "run_9": {"ema": False},
    "run_10": {"schedule": "learned", "alpha_start": 0.0, "alpha_end": 0.0, "ema": False},
}
# What a row's title says, for each field it may change.
WORDS = {
    "run_1": ("alpha 0.1 -> 0.9 linearly", "EMA on"),
    "run_2": ("absorption",),
    "run_3": ("fixed at 0.5",),
    "run_4": ("half the time",),
    "run_5": ("cosine annealing",),
    "run_6": ("exponential",),
    "run_7": ("vanilla", "alpha = 1", "no EMA"),
    "run_8": ("cosine only", "alpha = 0", "no EMA"),
    "run_9": ("without the EMA",),
    "run_10": ("learned blend", "2606.15054"),
}


def test_the_plan_is_run_1_to_run_10_in_order():
    assert list(experiment.RUNS) == [f"run_{i}" for i in range(1, 11)]


@pytest.mark.parametrize("name", sorted(PLAN))
def test_a_run_differs_from_the_method_only_in_what_its_title_names(name):
    found = asdict(experiment.RUNS[name])
    title, readout = found.pop("title"), found.pop("readout_alphas")
    assert found == METHOD | PLAN[name]
    assert all(words in title for words in WORDS[name])
    # The read-out check happens after training, on the method and its control alone.
    assert readout == ((0.0, 1.0) if name in ("run_1", "run_7") else ())


def test_the_control_is_the_ordinary_linear_encoder_from_start_to_end():
    run = experiment.RUNS["run_7"]
    assert not run.ema
    assert {experiment.alpha_at(run, i / 10) for i in range(11)} == {1.0}


def test_titles_tell_the_runs_apart():
    assert len({run.title for run in experiment.RUNS.values()}) == len(experiment.RUNS)
