"""Schedules against numbers worked out by hand; what Run and Recipe refuse, and RUNS promises."""

import math
from dataclasses import asdict, fields
from itertools import pairwise

import pytest
from tiny import hundred_steps, recipe_of_hundred_steps

import experiment
from lab.process import ExperimentError
from lab.scales import SCALES

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


def test_every_schedule_name_has_a_function_and_no_function_is_unreachable():
    named = {run.schedule for run in experiment.RUNS.values()}
    assert set(experiment.ALPHA_SCHEDULES) == named, "and every row of RUNS names one of them"
    assert set(BY_HAND) == named, "a schedule without a test"


@pytest.mark.parametrize("progress", [-1e-9, 1 + 1e-9, -1.0, 2.0, math.nan])
def test_progress_outside_0_to_1_is_refused(progress):
    with pytest.raises(ExperimentError, match="progress"):
        experiment.alpha_at(experiment.RUNS["run_1"], progress)


@pytest.mark.parametrize("schedule", ["quadratic", "", "Linear"])
def test_an_unknown_schedule_is_refused_with_the_names_there_are(schedule):
    with pytest.raises(ExperimentError, match=f"schedule='{schedule}' is not one of") as error:
        experiment.check_schedule(experiment.Run("bad", schedule=schedule))
    assert all(name in str(error.value) for name in experiment.ALPHA_SCHEDULES)


@pytest.mark.parametrize(
    ("way", "found", "progress"),
    [
        (lambda p: 2 * p, "1.0008", "0.563"),  # 0.1 + 0.8 * 2 * 0.563
        (lambda p: p - 0.2, "-0.06", "0"),
        (lambda p: 9.0 if p == 0.5 else p, "7.3", "0.5"),  # at one moment alone
        (lambda p: math.nan, "nan", "0"),
    ],
    ids=["above", "below", "once", "no number"],
)
def test_a_schedule_that_leaves_0_to_1_is_refused_with_where_it_does(
    way, found, progress, monkeypatch
):
    monkeypatch.setitem(experiment.ALPHA_SCHEDULES, "mine", way)
    run = experiment.Run("mine", schedule="mine")
    with pytest.raises(ExperimentError, match=r"ALPHA_SCHEDULES\['mine'\]") as error:
        experiment.check_schedule(run)
    assert f"gives alpha = {found} at progress {progress}:" in str(error.value)
    with pytest.raises(ExperimentError, match="mine"):
        experiment.chosen_recipe(SCALES["laptop"], run)


def test_a_schedule_may_pass_its_end_as_long_as_alpha_stays_in_0_to_1(monkeypatch):
    monkeypatch.setitem(experiment.ALPHA_SCHEDULES, "mine", lambda p: 1.125 * p)
    experiment.check_schedule(experiment.Run("mine", schedule="mine"))  # 0.1 -> 1.0


@pytest.mark.parametrize("name", sorted(experiment.RUNS))
def test_every_run_of_the_plan_goes_with_the_recipe_of_every_scale(name):
    for scale in SCALES.values():
        recipe = experiment.chosen_recipe(scale, experiment.RUNS[name])
        assert recipe is experiment.RECIPES[scale.name]


# ── L0 target and learning rate ─────────────────────────────────────────────────────────────────


def l0_target(progress: float, **changes) -> float:
    return experiment.l0_target_at(
        hundred_steps(), recipe_of_hundred_steps(**changes), progress, 4.0
    )


def factor(step: int, **changes) -> float:
    """What the optimiser's rates are multiplied by."""
    recipe = recipe_of_hundred_steps(**changes)
    return experiment.learning_rate_factor(hundred_steps(), recipe, step)


def test_l0_target_falls_in_log_ever_more_slowly_and_rests_at_the_target():
    found = [l0_target(i / 8) for i in range(9)]
    # 64 -> 4 over the first half: 7, 5, 3 and 1 sixteenths of the way in log an eighth
    factors = [16 ** (n / 16) for n in (0, 7, 12, 15, 16)]
    assert found == pytest.approx([64 / f for f in factors] + [4] * 4)
    assert l0_target(0.0, initial_l0_fraction=0.25) == pytest.approx(16)


def test_l0_target_is_the_target_from_tightening_fraction_on():
    assert l0_target(0.29, tightening_fraction=0.3) > 4.01
    assert l0_target(0.3, tightening_fraction=0.3) == pytest.approx(4.0)
    assert l0_target(1.0, tightening_fraction=0.3) == pytest.approx(4.0)


def test_learning_rate_warms_up_linearly_from_the_first_step():
    assert [factor(step) for step in (0, 1, 4, 8, 9)] == pytest.approx([0.1, 0.2, 0.5, 0.9, 1.0])


def test_learning_rate_is_constant_between_warm_up_and_decay():
    assert {factor(step) for step in range(9, 81)} == {1.0}


def test_learning_rate_falls_linearly_is_positive_at_the_last_step_and_0_just_after():
    found = [factor(step) for step in (85, 90, 95, 99, 100)]
    assert found == pytest.approx([0.75, 0.5, 0.25, 0.05, 0.0])
    assert factor(hundred_steps().total_steps - 1) > 0


def test_learning_rate_without_warm_up_and_decay_is_one_constant():
    assert {factor(step, warmup_steps=0, decay_fraction=0.0) for step in range(100)} == {1.0}


def test_learning_rate_never_exceeds_its_setting_even_if_warm_up_outlasts_training():
    assert all(0 < factor(step, warmup_steps=1000) <= 1 for step in range(100))


def test_the_ema_horizon_is_a_fraction_of_the_steps_and_never_below_one():
    recipe = recipe_of_hundred_steps()
    assert experiment.ema_horizon(hundred_steps(), recipe) == 5.0
    short = hundred_steps(training_tokens=50)
    assert experiment.ema_horizon(short, recipe) == 1.0, "never below one step: decay = alpha"


# ── What a configuration refuses ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("field", "value"),
    [
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


@pytest.mark.parametrize(
    ("start", "end", "readouts"),
    [(0.1, 0.9, ()), (0.0, 0.5, ()), (1.0, 1.0, ()), (0.0, 0.0, (1.0,))],
)
def test_restoring_the_norm_of_what_still_has_it_is_refused(start, end, readouts):
    alphas = {"alpha_start": start, "alpha_end": end, "readout_alphas": readouts}
    with pytest.raises(ExperimentError, match="norm_restored is for the cosine"):
        experiment.Run("bad", norm_restored=True, **alphas)


NUMBERS = [field.name for field in fields(experiment.Recipe)]
MAY_BE_ZERO = {"warmup_steps", "decay_fraction"}


def test_the_numbers_of_a_recipe_are_all_found():
    assert {field.type for field in fields(experiment.Recipe)} == {int, float}
    assert set(NUMBERS) >= {
        "learning_rate", "warmup_steps", "decay_fraction", "gate_init", "initial_l0_fraction",
        "tightening_fraction", "initial_lambda", "ema_horizon_fraction",
    }  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, -math.inf])
def test_a_negative_or_unfinished_number_of_a_recipe_is_refused_by_name(name, value):
    with pytest.raises(ExperimentError, match=f"RECIPES: {name}="):
        experiment.Recipe(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_a_zero_of_a_recipe_is_refused_unless_it_makes_sense(name):
    if name in MAY_BE_ZERO:
        assert getattr(experiment.Recipe(**{name: 0}), name) == 0
    else:
        with pytest.raises(ExperimentError, match=f"{name}=0 must be above 0"):
            experiment.Recipe(**{name: 0})


@pytest.mark.parametrize("name", [n for n in NUMBERS if n.endswith("_fraction")])
def test_a_fraction_of_a_recipe_above_1_is_refused_by_name(name):
    with pytest.raises(ExperimentError, match=f"{name}=1.01 must be at most 1"):
        experiment.Recipe(**{name: 1.01})
    assert getattr(experiment.Recipe(**{name: 1.0}), name) == 1.0


@pytest.mark.parametrize("value", [4.0, 3.5, True, "4"])
def test_warm_up_is_a_whole_number_of_steps(value):
    with pytest.raises(ExperimentError, match=f"warmup_steps={value!r} must be a whole number"):
        experiment.Recipe(warmup_steps=value)


@pytest.mark.parametrize("target_l0", [32.0, 40.0])
def test_a_target_that_is_not_below_what_fires_at_the_start_is_refused(target_l0, monkeypatch):
    recipe = recipe_of_hundred_steps(initial_l0_fraction=0.5)  # 32 of 64
    monkeypatch.setitem(experiment.RECIPES, "tiny", recipe)
    run = experiment.RUNS["run_1"]
    with pytest.raises(ExperimentError, match=rf"target_l0s: {target_l0:g} .*= 32$"):
        experiment.chosen_recipe(hundred_steps(target_l0s=(4.0, target_l0)), run)
    assert experiment.chosen_recipe(hundred_steps(target_l0s=(31.0,)), run) is recipe


def test_a_scale_without_a_recipe_is_refused_by_its_name():
    with pytest.raises(ExperimentError, match="RECIPES has no row 'tiny'"):
        experiment.chosen_recipe(hundred_steps(), experiment.RUNS["run_1"])


def test_every_scale_has_a_recipe_and_no_recipe_is_without_its_scale():
    assert set(experiment.RECIPES) == set(SCALES)
    official = experiment.RECIPES["gemma-2-2b"]
    assert (official.learning_rate, official.warmup_steps) == (3e-4, 1000)
    assert {recipe.initial_lambda for recipe in experiment.RECIPES.values()} == {0.04}
    assert {recipe.gate_init for recipe in experiment.RECIPES.values()} == {0.2}


def test_a_configuration_cannot_change_behind_its_own_check():
    with pytest.raises(AttributeError):
        hundred_steps().training_tokens = 0
    with pytest.raises(AttributeError):
        experiment.RECIPES["laptop"].gate_init = 0.1
    with pytest.raises(AttributeError):
        experiment.RUNS["run_7"].ema = True


# ── The plan ────────────────────────────────────────────────────────────────────────────────────

METHOD = {
    "schedule": "linear",
    "alpha_start": 0.1,
    "alpha_end": 0.9,
    "ema": True,
    "norm_restored": False,
}
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
    "run_10": {
        "schedule": "fixed",
        "alpha_start": 0.0,
        "alpha_end": 0.0,
        "ema": False,
        "norm_restored": True,
    },
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
    "run_10": ("cosine decides what fires", "norm restored", "2606.15054"),
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
