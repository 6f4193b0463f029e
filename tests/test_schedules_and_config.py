"""Schedules against numbers worked out by hand; what Run, Scale and RUNS refuse and promise."""

import math
import shutil
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import experiment
import lab.preflight
import lab.process
import lab.scales

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


def scale(**changes) -> lab.scales.Scale:
    """100 steps of 10 tokens in 2 lanes, every number that a test uses written out."""
    values = {
        "name": "tiny",
        "language_model": "none",
        "text": "sae-probes",
        "layers": (0,),
        "training_tokens": 1000,
        "batch_tokens": 10,
        "d_sae": 64,
        "n_seeds": 2,
        "learning_rate": 0.5,
        "warmup_steps": 10,
        "decay_fraction": 0.2,
        "target_l0": 4.0,
        "initial_l0": 64.0,
        "tightening_fraction": 0.5,
        "ema_horizon_fraction": 0.05,
        "lanes": 2,
    }
    return lab.scales.Scale(**values | changes)


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
    with pytest.raises(lab.process.ExperimentError, match="progress"):
        experiment.alpha_at(experiment.METHOD, progress)


# ── L0 target and learning rate ─────────────────────────────────────────────────────────────────


def test_l0_target_falls_geometrically_and_rests_at_the_target():
    s = scale()  # 64 -> 4 over the first half: a factor 2 every eighth
    found = [experiment.l0_target_at(s, i / 8) for i in range(9)]
    assert found == pytest.approx([64, 32, 16, 8, 4, 4, 4, 4, 4])


def test_l0_target_is_the_target_from_tightening_fraction_on():
    s = scale(tightening_fraction=0.3)
    assert experiment.l0_target_at(s, 0.29) > 4.2
    assert experiment.l0_target_at(s, 0.3) == pytest.approx(4.0)
    assert experiment.l0_target_at(s, 1.0) == pytest.approx(4.0)


def test_learning_rate_warms_up_linearly_from_the_first_step():
    s = scale()
    found = [experiment.learning_rate_at(s, step) for step in (0, 1, 4, 8, 9)]
    assert found == pytest.approx([0.05, 0.1, 0.25, 0.45, 0.5])


def test_learning_rate_is_constant_between_warm_up_and_decay():
    s = scale()
    assert {experiment.learning_rate_at(s, step) for step in range(9, 81)} == {0.5}


def test_learning_rate_falls_linearly_is_positive_at_the_last_step_and_0_just_after():
    s = scale()
    found = [experiment.learning_rate_at(s, step) for step in (85, 90, 95, 99, 100)]
    assert found == pytest.approx([0.375, 0.25, 0.125, 0.025, 0.0])
    assert experiment.learning_rate_at(s, s.total_steps - 1) > 0


def test_learning_rate_without_warm_up_and_decay_is_one_constant():
    s = scale(warmup_steps=0, decay_fraction=0.0)
    assert {experiment.learning_rate_at(s, step) for step in range(100)} == {0.5}


def test_learning_rate_never_exceeds_its_setting_even_if_warm_up_outlasts_training():
    s = scale(warmup_steps=1000)
    rates = [experiment.learning_rate_at(s, step) for step in range(100)]
    assert all(0 < rate <= 0.5 for rate in rates)


def test_steps_and_ema_horizon_follow_from_the_token_budget():
    s = scale(training_tokens=1009)
    assert (s.total_steps, s.ema_horizon) == (100, 5.0)
    assert scale(training_tokens=50).ema_horizon == 1.0, "never below one step: decay = alpha"


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
    with pytest.raises(lab.process.ExperimentError, match=field):
        experiment.Run("bad", **{field: value})


@pytest.mark.parametrize(("start", "end"), [(0.1, 0.9), (0.0, 0.5), (1.0, 1.0)])
def test_a_learned_blend_with_an_alpha_is_refused(start, end):
    with pytest.raises(lab.process.ExperimentError, match="alpha_start=alpha_end=0"):
        experiment.Run("bad", schedule="learned", alpha_start=start, alpha_end=end)


NUMBERS = [
    f.name
    for f in fields(lab.scales.Scale)
    if f.type in (int, float, int | None) and f.name != "keep_activations"
]
MAY_BE_ZERO = {"warmup_steps", "decay_fraction", "evaluation_seed", "checkpoint_seconds"}


def test_the_numbers_of_a_scale_are_all_found():
    assert len(NUMBERS) >= 24, "the tests below cover only these"
    assert {"training_tokens", "absorption_words", "gate_init", "online_every"} < set(NUMBERS)
    assert {"lanes", "checkpoint_seconds"} < set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, -math.inf])
def test_a_negative_or_unfinished_number_of_a_scale_is_refused_by_name(name, value):
    with pytest.raises(lab.process.ExperimentError, match=rf"SCALES\['tiny'\]: {name}="):
        scale(**{name: value})


@pytest.mark.parametrize("name", [n for n in NUMBERS if n not in MAY_BE_ZERO])
def test_a_zero_that_makes_no_sense_is_refused_by_name(name):
    with pytest.raises(lab.process.ExperimentError, match=f"{name}=0 must be above 0"):
        scale(**{name: 0})


@pytest.mark.parametrize("name", sorted(MAY_BE_ZERO))
def test_a_zero_that_makes_sense_is_accepted(name):
    assert getattr(scale(**{name: 0}), name) == 0


@pytest.mark.parametrize("name", [n for n in NUMBERS if n.endswith("_fraction")])
def test_a_fraction_above_1_is_refused_by_name(name):
    with pytest.raises(lab.process.ExperimentError, match=f"{name}=1.01 must be at most 1"):
        scale(**{name: 1.01})
    assert getattr(scale(**{name: 1.0}), name) == 1.0


@pytest.mark.parametrize("name", [f.name for f in fields(lab.scales.Scale) if f.type is int])
@pytest.mark.parametrize("value", [4.0, 3.5, True, "4"])
def test_a_number_of_things_that_is_no_whole_number_is_refused_by_name(name, value):
    with pytest.raises(
        lab.process.ExperimentError, match=f"{name}={value!r} must be a whole number"
    ):
        scale(**{name: value})


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("layers", {"layers": ()}),
        ("layers", {"layers": (3, -1)}),
        ("layers", {"layers": (3, 3)}),
        ("k_values", {"k_values": ()}),
        ("k_values", {"k_values": (0, 1)}),
        ("batch_tokens=10 must be a multiple of lanes=4", {"lanes": 4}),
        ("block_contexts=12 must be a multiple of lanes=5", {"lanes": 5, "block_contexts": 12}),
        ("training_dtype", {"training_dtype": "float16"}),
        ("text='openwebtext' must be", {"text": "openwebtext"}),
        ("text='a/b@main@' must be", {"text": "a/b@main@"}),
        ("context_length", {"context_length": 1}),
        ("target_l0", {"target_l0": 64.0}),
        ("target_l0", {"target_l0": 100.0}),
        ("initial_l0", {"initial_l0": 65.0}),
        ("d_sae", {"d_sae": 32}),
        ("evaluation_dtype", {"evaluation_dtype": "float16"}),
    ],
)
def test_a_bad_value_of_a_scale_is_refused_by_name(named, changes):
    with pytest.raises(lab.process.ExperimentError, match=named):
        scale(**changes)


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_token_budget_below_one_batch_is_refused_and_says_what_to_raise(tokens):
    with pytest.raises(
        lab.process.ExperimentError, match=f"training_tokens={tokens} .*batch of 10"
    ):
        scale(training_tokens=tokens)
    assert scale(training_tokens=10).total_steps == 1


def test_a_configuration_cannot_change_behind_its_own_check():
    with pytest.raises(AttributeError):
        scale().training_tokens = 0
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


# ── Choosing the scale ──────────────────────────────────────────────────────────────────────────


def test_without_a_gpu_the_laptop_scale_is_chosen(monkeypatch):
    monkeypatch.delenv("EXPERIMENT_SCALE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lab.scales.choose_scale() is lab.scales.SCALES["laptop"]


def test_the_environment_overrides_the_machine(monkeypatch):
    monkeypatch.setitem(lab.scales.SCALES, "tiny", scale())
    monkeypatch.setenv("EXPERIMENT_SCALE", "tiny")
    assert lab.scales.choose_scale() == scale()


def test_with_a_gpu_the_large_scale_is_chosen(monkeypatch):
    monkeypatch.delenv("EXPERIMENT_SCALE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert lab.scales.choose_scale() is lab.scales.SCALES["gemma-2-2b"]
    monkeypatch.setenv("EXPERIMENT_SCALE", "laptop")
    assert lab.scales.choose_scale() is lab.scales.SCALES["laptop"]


def test_an_unknown_scale_is_refused_with_the_names_there_are(monkeypatch):
    monkeypatch.setenv("EXPERIMENT_SCALE", "desktop")
    with pytest.raises(lab.process.ExperimentError, match="EXPERIMENT_SCALE='desktop'") as error:
        lab.scales.choose_scale()
    assert all(name in str(error.value) for name in ("laptop", "pythia-70m", "gemma-2-2b"))
    assert set(lab.scales.SCALES) == {"laptop", "pythia-70m", "gemma-2-2b"}


def test_every_scale_carries_its_own_name():
    assert all(name == s.name for name, s in lab.scales.SCALES.items())
    assert replace(lab.scales.SCALES["laptop"], name="copy").name == "copy"


@pytest.mark.parametrize("name", ["pythia-70m", "gemma-2-2b"])
def test_the_scales_of_the_hub_are_scored_by_the_official_protocol(name):
    """SAE-Bench's own defaults, whose sizes are a part of what its numbers mean."""
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    s, official = lab.scales.SCALES[name], SparseProbingEvalConfig()
    assert s.tasks == tuple(official.dataset_names)
    assert s.probe_train_set_size == official.probe_train_set_size
    assert s.probe_test_set_size == official.probe_test_set_size
    assert s.context_length == official.context_length
    assert set(s.k_values) > set(official.k_values)  # every k is scored by itself
    assert s.evaluation_seed == official.random_seed == AbsorptionEvalConfig().random_seed
    assert s.absorption_words is None
    assert s.evaluation_dtype == {"pythia-70m": "float32", "gemma-2-2b": "bfloat16"}[name]
    assert not s.keep_activations, "3 layers of 10 million tokens would be 138 GB"


@pytest.mark.parametrize("name", ["pythia-70m", "gemma-2-2b"])
def test_the_text_of_the_hub_is_pinned_to_one_state_of_it(name):
    dataset, revision = lab.scales.SCALES[name].text.split("@")
    assert dataset == "Skylion007/openwebtext"
    assert len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def test_the_large_scale_reads_three_layers_and_many_processes_can_share_it():
    s = lab.scales.SCALES["gemma-2-2b"]
    assert (s.language_model, s.layers, s.d_sae) == ("google/gemma-2-2b", (5, 12, 19), 2304)
    assert s.total_steps * s.batch_tokens <= 10_000_000 < (s.total_steps + 1) * s.batch_tokens
    for processes in (2, 4, 8, 16):
        assert s.lanes % processes == 0


# ── Before any work ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with so many GB free: its disks by a part of their path, and its GPU."""
    from huggingface_hub import constants

    def with_free(disk: float, gpu: float | None = None, **other_disks: float) -> Path:
        def disk_usage(path):
            named = [free for part, free in other_disks.items() if part in str(path)]
            return SimpleNamespace(free=1e9 * (named or [disk])[0])

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(cuda, "mem_get_info", lambda device: (1e9 * gpu, 80e9))
        return tmp_path / "not there yet" / "run_1"

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path / "cache"))
    return with_free


def complaints(name: str, out_dir: Path) -> list[str]:
    return list(lab.preflight.not_enough_room(lab.scales.SCALES[name], out_dir))


def test_a_disk_that_holds_everything_must_have_room_for_all_of_it(machine, tmp_path):
    """Gemma: 10 GB of the hub's, 8 of the cache's, 10 times 9 SAEs of 2 * 2304 * 2304 floats."""
    assert complaints("gemma-2-2b", machine(disk=21.9)) == []
    assert complaints("gemma-2-2b", machine(disk=21.7)) == [
        f"free disk space at {tmp_path}: 21.7 GB of the 22 GB needed"
    ]
    # Pythia: 5 + 1, and 10 times 3 SAEs of 2 * 512 * 4096 floats.
    assert complaints("pythia-70m", machine(disk=6.6)) == []
    (found,) = complaints("pythia-70m", machine(disk=6.4))
    assert found.endswith("6.4 GB of the 7 GB needed")


def test_several_disks_are_asked_for_what_each_has_to_hold(machine, monkeypatch):
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == Path().absolute().stat().st_dev:
        pytest.skip("there is no second disk here")
    monkeypatch.setenv("COSINE_SAE_CACHE", str(shm / "not there yet" / "cache"))
    assert complaints("gemma-2-2b", machine(disk=13.9, shm=8.1)) == []
    (found,) = complaints("gemma-2-2b", machine(disk=13.9, shm=7.9))
    assert found == "free disk space at /dev/shm: 7.9 GB of the 8 GB needed"
    assert len(complaints("gemma-2-2b", machine(disk=13.7, shm=7.9))) == 2


def test_the_gpu_must_have_room_for_the_model_the_saes_and_two_blocks(machine):
    """8 + 5 * 0.382 (9 SAEs) + 2 * 1.812 (131,072 tokens of 3 layers in bfloat16) = 13.5."""
    assert complaints("gemma-2-2b", machine(disk=99, gpu=13.6)) == []
    assert complaints("gemma-2-2b", machine(disk=99, gpu=13.4)) == [
        "free GPU memory: 13.4 GB of about 14 GB needed are free"
    ]
    assert complaints("pythia-70m", machine(disk=99, gpu=1.1)) == []
    assert len(complaints("pythia-70m", machine(disk=1, gpu=0.9))) == 2


def test_everything_that_is_missing_is_said_at_once(monkeypatch):
    monkeypatch.setattr(lab.preflight, "not_to_be_had", lambda scale: iter(["a licence", "a text"]))
    monkeypatch.setattr(lab.preflight, "not_enough_room", lambda scale, out_dir: iter(["room"]))
    with pytest.raises(lab.process.ExperimentError) as error:
        lab.preflight.preflight(lab.scales.SCALES["gemma-2-2b"], Path("run_1"))
    lines = str(error.value).splitlines()
    assert lines == ["before this run can start:", "  - a licence", "  - a text", "  - room"]
    for name in ("not_to_be_had", "not_enough_room"):
        monkeypatch.setattr(lab.preflight, name, lambda *_: iter(()))
    lab.preflight.preflight(lab.scales.SCALES["gemma-2-2b"], Path("run_1"))


def test_nothing_is_asked_where_nothing_is_fetched_from_the_hub(monkeypatch, tmp_path):
    for name in ("not_to_be_had", "not_enough_room"):
        monkeypatch.setattr(lab.preflight, name, lambda *_: pytest.fail("asked"))
    for scale_ in (lab.scales.SCALES["laptop"], scale(), scale(language_model=str(tmp_path))):
        lab.preflight.preflight(scale_, tmp_path)
