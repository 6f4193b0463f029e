"""The weight average, the sparsity controller, the adaptive pace."""

import math
import random
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tiny import RECIPE, randn

import experiment
from lab.activations import calibrate
from lab.devices import Ranks
from lab.process import ExperimentError
from lab.scales import Scale

# ── Weight average ──────────────────────────────────────────────────────────────────────────────


def averaged(decays: list[list[float]], start_seed: int = 0) -> tuple[list, torch.Tensor]:
    """A WeightAverage over made-up weights [S, 3, 2] and [S, 4]: (its averages, the weights)."""
    S = len(decays[0])
    first = torch.nn.Parameter(randn(S, 3, 2, seed=start_seed))
    second = torch.nn.Parameter(randn(S, 4, seed=start_seed + 1))
    average = experiment.WeightAverage([first, second])
    weights = randn(len(decays), S, 10, seed=99)
    for decay, w in zip(decays, weights, strict=True):
        with torch.no_grad():
            first.copy_(w[:, :6].reshape(S, 3, 2))
            second.copy_(w[:, 6:])
        average.update_(torch.tensor(decay))
    return average.average, weights


def check_average(decays: list[list[float]], expected: torch.Tensor) -> None:
    """`expected` [S, 10]: what averaged(decays) must come to, whatever the average started from."""
    for start_seed in (0, 50):
        first, second = averaged(decays, start_seed)[0]
        torch.testing.assert_close(first.flatten(1), expected[:, :6].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second, expected[:, 6:].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9, 0.999])
def test_a_constant_decay_gives_the_textbook_bias_corrected_average(decay):
    decays = [[decay]] * 40
    m = torch.zeros(1, 10, dtype=torch.float64)
    for w in averaged(decays)[1].double():
        m = decay * m + (1 - decay) * w
    check_average(decays, m / (1 - decay**40))


def test_a_decay_of_1_is_the_plain_mean_and_not_frozen_at_its_start():
    decays = [[1.0, 1.0]] * 25
    check_average(decays, averaged(decays)[1].double().mean(0))


def test_a_decay_of_0_is_the_current_weights():
    decays = [[1.0], [0.9], [0.9], [0.0]]
    (first, _), weights = averaged(decays)
    assert torch.equal(first.flatten(1), weights[-1][:, :6])


def test_changing_decays_give_the_weighted_sum_they_stand_for_in_each_seed():
    r = random.Random(0)
    decays = [[r.random(), r.random() ** 0.1, 1.0] for _ in range(30)]
    d, w = torch.tensor(decays, dtype=torch.float64), averaged(decays)[1].double()
    # Step t enters with weight 1 and is multiplied by the decay of every later step.
    weight = torch.stack([d[t + 1 :].prod(0) for t in range(30)])[..., None]
    check_average(decays, (weight * w).sum(0) / weight.sum(0))


def test_the_first_update_is_the_weights_whatever_the_decay():
    for decay in (0.0, 0.3, 1.0):
        check_average([[decay]], averaged([[decay]])[1][0].double())


def test_updating_the_average_leaves_the_weights_and_the_graph_alone():
    p = torch.nn.Parameter(torch.ones(1, 2))
    average = experiment.WeightAverage([p])
    average.update_(torch.tensor([0.5]))
    assert torch.equal(p, torch.ones(1, 2))
    assert not average.average[0].requires_grad
    with torch.no_grad():
        p.add_(1)
    assert torch.equal(average.average[0], torch.ones(1, 2)), "it shares no memory"


@pytest.mark.parametrize("fails", [False, True])
def test_the_average_is_swapped_in_and_the_weights_come_back_even_after_an_error(fails):
    p = torch.nn.Parameter(torch.tensor([[1.0, 2.0]]))
    average = experiment.WeightAverage([p])
    average.update_(torch.tensor([1.0]))
    with torch.no_grad():
        p.copy_(torch.tensor([[3.0, 6.0]]))
    average.update_(torch.tensor([1.0]))
    with torch.no_grad():
        p.copy_(torch.tensor([[7.0, 8.0]]))
    try:
        with average.applied():
            assert p.tolist() == [[2.0, 4.0]]
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert p.tolist() == [[7.0, 8.0]]
    assert average.average[0].tolist() == [[2.0, 4.0]]
    assert p.requires_grad


def test_the_decay_follows_alpha_over_the_horizon():
    assert experiment.ema_decay_at(0.3, 1.0) == pytest.approx(0.3), "one step: alpha itself"
    assert experiment.ema_decay_at(0.25, 2.0) == pytest.approx(0.5)
    assert experiment.ema_decay_at(0.1, 10.0) == pytest.approx(0.7943282)
    assert experiment.ema_decay_at(0.0, 8.0) == 0.0
    assert experiment.ema_decay_at(1.0, 8.0) == 1.0
    tensor = experiment.ema_decay_at(torch.tensor([0.25, 1.0]), 2.0)
    torch.testing.assert_close(tensor, torch.tensor([0.5, 1.0]))


# ── Sparsity controller ─────────────────────────────────────────────────────────────────────────


def one_lambda(lam: float, error: float, change: float = 0.0) -> float:
    values = (torch.tensor([v]) for v in (lam, error, change))
    return experiment.next_lambda(*values).item()


def test_lambda_rises_when_too_many_latents_fire_falls_when_too_few_and_rests_on_target():
    assert one_lambda(0.04, math.log(1.5)) == pytest.approx(0.04 * 1.5**0.15, rel=1e-5)
    assert one_lambda(0.04, -math.log(1.5)) == pytest.approx(0.04 * 1.5**-0.15, rel=1e-5)
    assert one_lambda(0.04, 0.0) == pytest.approx(0.04)


def test_lambda_follows_the_error_to_be_expected_in_5_steps():
    """0.2 too many and 0.04 fewer a step: nothing to do."""
    assert one_lambda(0.04, 0.2, -0.04) == pytest.approx(0.04)
    assert one_lambda(0.04, 0.2, -0.08) == pytest.approx(0.04 * math.exp(-0.15 * 0.2))
    assert one_lambda(0.04, 0.0, 0.04) == pytest.approx(0.04 * math.exp(0.15 * 0.2))


@pytest.mark.parametrize("error", [-30.0, -1.0, 0.0, 0.3, 1.0, 17.0])
@pytest.mark.parametrize("change", [-9.0, -0.05, 0.0, 0.05, 2.0])
def test_lambda_moves_by_at_most_a_factor_e_to_the_0_15_a_step(error, change):
    moved = abs(math.log(one_lambda(0.04, error, change) / 0.04))
    assert moved <= 0.15 + 1e-6
    if abs(change) > 1:
        assert moved == pytest.approx(0.15, rel=1e-4), "far off it moves as fast as it may"
    if change == 0.0:
        assert moved <= 0.075 + 1e-6, "however far off it is, unless it also moves"


def test_lambda_stays_between_its_bounds():
    assert one_lambda(1e-6, -9.0) == pytest.approx(1e-6)
    assert one_lambda(1e3, 9.0) == pytest.approx(1e3)


def test_each_seed_has_its_own_lambda():
    lambdas, more = torch.tensor([0.04, 0.04, 0.1]), math.log(1.5)
    found = experiment.next_lambda(lambdas, torch.tensor([0.0, more, more]), torch.zeros(3))
    factor = 1.5**0.15
    torch.testing.assert_close(found, torch.tensor([0.04, 0.04 * factor, 0.1 * factor]))


def simulated_l0(power: float, lag: float, ratio: float = 1.0, steps: int = 800) -> list[float]:
    """L0 under the controller: its logarithm follows -power log(lambda), `lag` steps behind.

    The target tightens from 1152 to 36 in the first half of the steps, as it does in training.
    """
    scale = Scale(
        "plant", "none", "sae-probes", (0,), steps, 1, target_l0s=(36.0,), lanes=1, tasks=("news",)
    )
    recipe = experiment.Recipe(initial_l0_fraction=0.5, tightening_fraction=0.5)
    assert (scale.d_sae, experiment.l0_target_at(scale, recipe, 0.0, 36.0)) == (2304, 1152)
    trainer = SimpleNamespace(
        lambda_S=torch.tensor([0.04]),
        smoothed_l0_S=torch.tensor([math.nan]),
        l0_error_S=torch.tensor([math.nan]),
        l0_ratio_S=torch.tensor([ratio]),
    )
    log_l0, found = math.log(1152), []
    for step in range(steps):
        goal = math.log(1152) - power * math.log(trainer.lambda_S.item() / 0.04)
        log_l0 = min(log_l0 + (goal - log_l0) / lag, math.log(2304))
        found.append(math.exp(log_l0))
        target = experiment.l0_target_at(scale, recipe, step / (steps - 1), 36.0)
        experiment.Trainer.control_sparsity(
            trainer, torch.tensor([found[-1]]), torch.tensor([target])
        )
    return found


@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("lag", [1.0, 10.0, 20.0])
def test_l0_is_tightened_from_1152_to_36_and_never_more_than_a_tenth_below(power, lag):
    found = simulated_l0(power, lag)
    assert found[0] > 1000
    assert min(found) > 0.9 * 36
    assert all(abs(l0 / 36 - 1) < 0.02 for l0 in found[-50:])


def test_it_is_the_l0_on_held_out_rows_that_is_held_at_the_target():
    """There half as many again fire: then the weights are held at 36 / 1.5 on their batches."""
    assert all(abs(l0 / 24 - 1) < 0.1 for l0 in simulated_l0(1.0, 10.0, ratio=1.5)[-50:])


def test_the_controller_sees_l0_times_its_ratio_smoothed_over_steps():
    trainer = SimpleNamespace(
        lambda_S=torch.tensor([0.04, 0.04]),
        smoothed_l0_S=torch.tensor([math.nan, math.nan]),
        l0_error_S=torch.tensor([math.nan, math.nan]),
        l0_ratio_S=torch.tensor([1.0, 1.4]),
    )
    target = torch.tensor([10.0, 10.0])
    experiment.Trainer.control_sparsity(trainer, torch.tensor([10.0, 10.0]), target)
    assert trainer.smoothed_l0_S.tolist() == pytest.approx([10.0, 14.0]), "the first as it is"
    assert trainer.lambda_S.tolist() == pytest.approx([0.04, 0.04 * 1.4**0.15])
    experiment.Trainer.control_sparsity(trainer, torch.tensor([11.0, 11.0]), target)
    smoothed = [0.9 * 10 + 0.1 * 11, 0.9 * 14 + 0.1 * 1.4 * 11]
    assert trainer.smoothed_l0_S.tolist() == pytest.approx(smoothed)
    # Either grew by 1%, and five times that is what is expected to come.
    moves = [0.15 * (math.log(1.01) * 6), 0.15 * (math.log(1.4 * 1.01) + 5 * math.log(1.01))]
    before = [0.04, 0.04 * 1.4**0.15]
    expected = [lam * math.exp(move) for lam, move in zip(before, moves, strict=True)]
    assert trainer.lambda_S.tolist() == pytest.approx(expected)


# ── L0 on held-out rows ─────────────────────────────────────────────────────────────────────────


def trainer_of(run: experiment.Run, **changes) -> experiment.Trainer:
    values = {
        "training_tokens": 20 * 64, "batch_tokens": 64, "d_sae": 32, "n_seeds": 2, "lanes": 4,
        "target_l0s": (4.0,), "training_dtype": "float32", "online_every": 3, "k_values": (1,),
        "tasks": ("news",),
    }  # fmt: skip
    scale = Scale("tiny", "none", "sae-probes", (1,), **values | changes)
    recipe = replace(
        RECIPE,
        learning_rate=0.05,
        warmup_steps=0,
        initial_l0_fraction=0.5,
        ema_horizon_fraction=0.5,
        heldout_every=3,
    )
    trainer = experiment.Trainer(scale, recipe, run, 1, calibrate(batch(0), Ranks()), Ranks())
    trainer.heldout_ND = torch.cat([batch(100), batch(101)])[:100].to(trainer.device)
    return trainer


def batch(seed: int) -> torch.Tensor:
    return 5 * randn(64, 8, seed=seed) + 1


@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("name", ["run_1", "run_3", "run_9"])
def test_the_measured_l0_is_what_the_evaluated_weights_do_on_held_out_rows(name, falling):
    """Of the average, unless it only lags behind; the ratio to a batch's is averaged over two."""
    trainer = trainer_of(experiment.RUNS[name])
    for seed in range(8):
        trainer.step(batch(seed))
    own = [p.detach().clone() for p in trainer.sae.parameters()]
    x = trainer.heldout_ND * trainer.units.scale
    alphas, l0_S = [0.4, 0.7], torch.tensor([2.0, 5.0]).to(trainer.device)
    inputs, before = (x, alphas, trainer.lambda_S), trainer.l0_ratio_S
    found = trainer.measure_heldout(alphas, l0_S, falling)
    expected = trainer.sae(*inputs).l0_S
    if trainer.average:
        with trainer.average.applied():
            average = trainer.sae(*inputs).l0_S
        assert not torch.allclose(average, expected, rtol=1e-3), "not the weights' own"
        expected = average if falling else torch.maximum(expected, average)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(trainer.l0_ratio_S, 0.5 * before + 0.5 * expected / l0_S)
    for p, kept in zip(trainer.sae.parameters(), own, strict=True):
        assert torch.equal(p, kept)
    assert trainer.sae.training


def test_an_average_that_only_lags_behind_is_passed_over():
    trainer = trainer_of(experiment.RUNS["run_1"])
    for seed in range(3):
        trainer.step(batch(seed))
    for kept, p in zip(trainer.average.average, trainer.sae.parameters(), strict=True):
        if p is trainer.sae.b_enc:
            kept.fill_(-100.0)  # fires nothing
    own = trainer.sae(trainer.heldout_ND * trainer.units.scale, [0.5, 0.5], trainer.lambda_S).l0_S
    assert own.min() > 0
    torch.testing.assert_close(trainer.measure_heldout([0.5, 0.5], own, False), own)
    assert trainer.measure_heldout([0.5, 0.5], own, True).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["run_1", "run_7"])
def test_l0_is_measured_on_held_out_rows_now_and_then_and_held_there_in_between(name):
    trainer, seen = trainer_of(experiment.RUNS[name]), []
    control = trainer.control_sparsity
    trainer.control_sparsity = lambda l0_S, target_S: (
        seen.append(trainer.l0_ratio_S.clone()),
        control(l0_S, target_S),
    )
    measure, lately = trainer.measure_heldout, []
    trainer.measure_heldout = lambda *args: (lately.append(args[2]), measure(*args))[1]
    records = [trainer.step(batch(seed)) for seed in range(20)]
    assert lately == [False] * 6 + [True] * 2, "the rate falls from step 16 on"
    measured = [r["step"] for r in records if r["l0_heldout"] is not None]
    assert measured == [0, 3, 6, 9, 12, 15, 18, 19]
    torch.testing.assert_close(seen[0], records[0]["l0_heldout"] / records[0]["l0"])
    for step in range(1, 20):
        if step in measured:
            now = records[step]["l0_heldout"] / records[step]["l0"]
            torch.testing.assert_close(seen[step], 0.5 * seen[step - 1] + 0.5 * now)
        else:  # the last ratio that was measured
            assert torch.equal(seen[step], seen[step - 1])
    assert max((ratio - 1).abs().max() for ratio in seen) > 0.02, "there was something to hold"


def test_without_held_out_rows_the_weights_own_l0_is_held():
    trainer = trainer_of(experiment.RUNS["run_1"])
    trainer.heldout_ND = None
    records = [trainer.step(batch(seed)) for seed in range(4)]
    assert {r["l0_heldout"] for r in records} == {None}
    assert trainer.l0_ratio_S.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trainer_computes_in_the_dtype_of_its_scale(dtype):
    trainer, seen = trainer_of(experiment.RUNS["run_1"], training_dtype=dtype), []
    encode = trainer.sae.encode
    trainer.sae.encode = lambda x, alphas, dtype: (seen.append(dtype), encode(x, alphas, dtype))[1]
    record = trainer.step(batch(0))
    assert set(seen) == {getattr(torch, dtype)}
    assert record["loss"].dtype == torch.float32
    assert {p.dtype for p in trainer.sae.parameters()} == {torch.float32}


# ── A step ──────────────────────────────────────────────────────────────────────────────────────


def test_every_group_of_the_optimiser_keeps_its_own_rate_times_the_schedules_factor():
    trainer = trainer_of(experiment.RUNS["run_7"])
    trainer.recipe = replace(trainer.recipe, warmup_steps=4, decay_fraction=0.5)
    gate = trainer.sae.gate
    others = [p for p in trainer.sae.parameters() if p.requires_grad and p is not gate]
    groups = [{"params": others}, {"params": [gate], "lr": 0.2}]
    trainer.optimizer = torch.optim.Adam(groups, lr=0.05)
    rates = []
    for seed in range(20):
        record = trainer.step(batch(seed))
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        assert record["learning_rate"] == rates[-1][0]
    factors = [min((i + 1) / 4, 1.0, (20 - i) / 10) for i in range(20)]
    for factor, (first, second) in zip(factors, rates, strict=True):
        assert (first, second) == (pytest.approx(0.05 * factor), pytest.approx(0.2 * factor))


def test_a_parameter_without_seeds_in_front_is_refused_by_name(monkeypatch):
    class WithScalar(experiment.BlendedSAE):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.temperature = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setattr(experiment, "BlendedSAE", WithScalar)
    with pytest.raises(ExperimentError, match=r"BlendedSAE\.temperature has shape \(1,\)"):
        trainer_of(experiment.RUNS["run_1"])


@pytest.mark.parametrize("name", ["run_1", "run_7", "run_10"])
def test_steps_leave_decoder_rows_unit_and_what_is_not_trained_alone(name):
    trainer = trainer_of(experiment.RUNS[name])
    fixed = {n: p.clone() for n, p in trainer.sae.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in trainer.sae.named_parameters() if p.requires_grad}
    for seed in range(5):
        trainer.step(batch(seed))
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=-1), torch.ones(2, 32))
    now = dict(trainer.sae.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in fixed.items())
    assert not any(torch.equal(now[n], p) for n, p in trained.items())


# ── Adaptive pace ───────────────────────────────────────────────────────────────────────────────


def pace(absorption: float, best: float, before: float, tolerance: float = 0.02) -> float:
    return experiment.adaptive_rate(absorption, best, before, tolerance)


@pytest.mark.parametrize(
    ("above_best", "rate"),
    [(0.0, 2.0), (0.01, 1.5), (0.02, 1.0), (0.03, 0.5), (0.04, 0.0), (0.5, 0.0)],
)
def test_the_pace_settles_where_absorption_says(above_best, rate):
    found = 1.0
    for _ in range(4):
        found = pace(0.3 + above_best, 0.3, found)
    assert found == pytest.approx(rate, abs=1e-9)


@pytest.mark.parametrize("tolerance", [0.02, 0.15])
def test_the_pace_stalls_two_tolerances_above_the_best_and_doubles_at_it(tolerance):
    assert pace(0.3 + 2 * tolerance, 0.3, 0.4, tolerance) == pytest.approx(0.0)
    assert pace(0.3 + tolerance, 0.3, 0.9, tolerance) == pytest.approx(1.0)
    assert pace(0.3, 0.3, 1.6, tolerance) == pytest.approx(2.0)


def test_the_pace_never_rises_with_absorption():
    for before in (0.0, 0.7, 1.0, 2.0):
        rates = [pace(0.2 + i / 1000, 0.2, before) for i in range(100)]
        assert all(a >= b for a, b in pairwise(rates))
        assert rates[0] > rates[-1]


def test_the_pace_changes_by_at_most_a_half_at_a_time():
    assert pace(0.9, 0.3, 2.0) == pytest.approx(1.5)
    assert pace(0.3, 0.3, 0.0) == pytest.approx(0.5)


def test_the_pace_is_never_negative_and_never_above_2_whatever_is_measured():
    r, rate, best = random.Random(0), 1.0, math.inf
    for _ in range(2000):
        absorption = r.random()
        best = experiment.recent_best(best, absorption)
        before, rate = rate, experiment.adaptive_rate(absorption, best, rate)
        assert 0 <= rate <= 2
        assert abs(rate - before) <= 0.5


def test_the_recent_best_falls_at_once_and_gives_way_to_a_rise_by_its_leak():
    assert experiment.recent_best(math.inf, 0.4) == 0.4, "the first measurement"
    assert experiment.recent_best(0.3, 0.1, leak=0.5) == pytest.approx(0.1)
    assert experiment.recent_best(0.2, 0.4, leak=0.5) == pytest.approx(0.3)
    assert experiment.recent_best(0.2, 0.4, leak=0.25) == pytest.approx(0.25)
    assert experiment.recent_best(0.2, 0.4, leak=0.0) == pytest.approx(0.2), "never forgets"


def test_a_level_of_absorption_is_forgotten_and_a_rise_is_not():
    """The pace answers to rises: an untrained SAE absorbs nothing, and that 0 must not bind."""
    r, best = random.Random(0), math.inf
    for _ in range(500):
        absorption = r.random()
        best = experiment.recent_best(best, absorption)
        assert best <= absorption, "it is a best"
    best, rate, rates = 0.0, 1.0, []
    for absorption in [0.0, *[0.6] * 12]:
        best = experiment.recent_best(best, absorption)
        rate = experiment.adaptive_rate(absorption, best, rate)
        rates.append(rate)
    assert min(rates) < 0.6, "it braked at the rise"
    assert rates[-1] == pytest.approx(2.0, abs=0.1), "and let go of the level"


def test_paced_progress_has_the_values_worked_out_by_hand():
    assert experiment.paced_progress(0.2, 1.5, 0.3, 0.1) == pytest.approx(0.35)
    assert experiment.paced_progress(0.2, 0.0, 0.3, 0.1) == pytest.approx(0.2), "stalled"
    assert experiment.paced_progress(0.2, 0.0, 0.8, 0.1) == pytest.approx(0.6), "on the floor"
    assert experiment.paced_progress(0.95, 2.0, 0.6, 0.1) == 1.0, "clamped"


PATTERNS = {
    "any": lambda r, step: r.random(),
    "always at its best": lambda r, step: -float(step),
    "ever worse": lambda r, step: float(step),
    "good, then bad": lambda r, step: float(step > 50),
    "bad from the second measurement on": lambda r, step: float(step > 0),
    "small changes": lambda r, step: 0.3 + 0.03 * r.random(),
}


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
@pytest.mark.parametrize("steps", [2, 3, 17, 200])
def test_paced_progress_is_monotone_bounded_and_always_arrives(pattern, steps):
    for seed in range(20):
        r, done, rate, best = random.Random(seed), 0.0, 1.0, math.inf
        for step in range(1, steps + 1):
            progress, before = step / steps, done
            done = experiment.paced_progress(done, rate, progress, 1 / steps)
            assert done >= before, "monotone"
            assert done <= min(1.0, 2 * progress + 1e-9), "at most twice the linear schedule"
            assert done - before <= 2 / steps + 1e-9, "and never faster than that"
            assert done >= 2 * progress - 1, "never so late that it could not arrive"
            absorption = PATTERNS[pattern](r, step)
            best = experiment.recent_best(best, absorption)
            rate = experiment.adaptive_rate(absorption, best, rate)
        assert done == pytest.approx(1.0)


def test_good_measurements_arrive_early_and_bad_ones_late():
    def halfway(absorption: float) -> float:
        done, rate = 0.0, 1.0
        for step in range(1, 51):
            done = experiment.paced_progress(done, rate, step / 100, 0.01)
            rate = pace(absorption, 0.0, rate, tolerance=0.02)
        return done

    assert halfway(1.0) < 0.05
    assert halfway(0.02) == pytest.approx(0.5)
    assert halfway(0.0) > 0.95
