"""What a Scale refuses and promises, and which one the machine gets."""

import math
from dataclasses import fields, replace

import pytest
import torch
from tiny import hundred_steps

from lab.process import ExperimentError
from lab.scales import SCALES, Scale, choose_scale

# ── What a scale refuses ────────────────────────────────────────────────────────────────────────


def test_steps_follow_from_the_token_budget():
    assert hundred_steps(training_tokens=1009).total_steps == 100


NUMBERS = [
    f.name
    for f in fields(Scale)
    if f.type in (int, float, int | None) and f.name != "keep_activations"
]
MAY_BE_ZERO = {"evaluation_seed", "checkpoint_seconds"}


def test_the_numbers_of_a_scale_are_all_found():
    assert len(NUMBERS) >= 16, "the tests below cover only these"
    assert {"training_tokens", "absorption_words", "online_every"} < set(NUMBERS)
    assert {"lanes", "checkpoint_seconds"} < set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, -math.inf])
def test_a_negative_or_unfinished_number_of_a_scale_is_refused_by_name(name, value):
    with pytest.raises(ExperimentError, match=rf"SCALES\['tiny'\]: {name}="):
        hundred_steps(**{name: value})


@pytest.mark.parametrize("name", [n for n in NUMBERS if n not in MAY_BE_ZERO])
def test_a_zero_that_makes_no_sense_is_refused_by_name(name):
    with pytest.raises(ExperimentError, match=f"{name}=0 must be above 0"):
        hundred_steps(**{name: 0})


@pytest.mark.parametrize("name", sorted(MAY_BE_ZERO))
def test_a_zero_that_makes_sense_is_accepted(name):
    assert getattr(hundred_steps(**{name: 0}), name) == 0


@pytest.mark.parametrize("name", [f.name for f in fields(Scale) if f.type is int])
@pytest.mark.parametrize("value", [4.0, 3.5, True, "4"])
def test_a_number_of_things_that_is_no_whole_number_is_refused_by_name(name, value):
    with pytest.raises(ExperimentError, match=f"{name}={value!r} must be a whole number"):
        hundred_steps(**{name: value})


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("layers", {"layers": ()}),
        ("layers", {"layers": (3, -1)}),
        ("layers", {"layers": (3, 3)}),
        ("k_values", {"k_values": ()}),
        ("k_values", {"k_values": (0, 1)}),
        ("k_values=(1, 65) must be .* at most d_sae=64", {"k_values": (1, 65)}),
        ("tasks=()", {"tasks": ()}),
        ("probe_train_set_size=42 must be a multiple of 4", {"probe_train_set_size": 42}),
        ("probe_test_set_size=2 must be a multiple of 4", {"probe_test_set_size": 2}),
        ("batch_tokens=10 must be a multiple of lanes=4", {"lanes": 4}),
        ("block_contexts=12 must be a multiple of lanes=5", {"lanes": 5, "block_contexts": 12}),
        ("training_dtype", {"training_dtype": "float16"}),
        ("text='openwebtext' must be", {"text": "openwebtext"}),
        ("text='a/b@main@' must be", {"text": "a/b@main@"}),
        ("context_length", {"context_length": 1}),
        ("target_l0s=(64.0,) must", {"target_l0s": (64.0,)}),
        ("target_l0s", {"target_l0s": (4.0, 100.0)}),
        ("target_l0s=() must name one", {"target_l0s": ()}),
        ("target_l0s", {"target_l0s": (4.0, 4.0)}),
        ("target_l0s", {"target_l0s": (0.0,)}),
        ("target_l0s", {"target_l0s": (math.nan,)}),
        ("d_sae", {"d_sae": 4}),
        ("evaluation_dtype", {"evaluation_dtype": "float16"}),
    ],
)
def test_a_bad_value_of_a_scale_is_refused_by_name(named, changes):
    with pytest.raises(ExperimentError, match=named.replace("(", r"\(").replace(")", r"\)")):
        hundred_steps(**changes)


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_token_budget_below_one_batch_is_refused_and_says_what_to_raise(tokens):
    with pytest.raises(ExperimentError, match=f"training_tokens={tokens} .*batch of 10"):
        hundred_steps(training_tokens=tokens)
    assert hundred_steps(training_tokens=10).total_steps == 1


# ── Choosing the scale ──────────────────────────────────────────────────────────────────────────


def test_without_a_gpu_the_laptop_scale_is_chosen(monkeypatch):
    monkeypatch.delenv("EXPERIMENT_SCALE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_scale() is SCALES["laptop"]


def test_the_environment_overrides_the_machine(monkeypatch):
    monkeypatch.setitem(SCALES, "tiny", hundred_steps())
    monkeypatch.setenv("EXPERIMENT_SCALE", "tiny")
    assert choose_scale() == hundred_steps()


def test_with_a_gpu_the_large_scale_is_chosen(monkeypatch):
    monkeypatch.delenv("EXPERIMENT_SCALE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_scale() is SCALES["gemma-2-2b"]
    monkeypatch.setenv("EXPERIMENT_SCALE", "laptop")
    assert choose_scale() is SCALES["laptop"]


def test_an_unknown_scale_is_refused_with_the_names_there_are(monkeypatch):
    monkeypatch.setenv("EXPERIMENT_SCALE", "desktop")
    with pytest.raises(ExperimentError, match="EXPERIMENT_SCALE='desktop'") as error:
        choose_scale()
    assert all(name in str(error.value) for name in SCALES)
    assert set(SCALES) == {"laptop", "laptop-long", "synthetic", "pythia-70m", "gemma-2-2b"}


# ── The scales there are ────────────────────────────────────────────────────────────────────────


def test_every_scale_carries_its_own_name():
    assert all(name == s.name for name, s in SCALES.items())
    assert replace(SCALES["laptop"], name="copy").name == "copy"


@pytest.mark.parametrize("name", ["pythia-70m", "gemma-2-2b"])
def test_the_scales_of_the_hub_are_scored_by_the_official_protocol(name):
    """SAE-Bench's own defaults, whose sizes are a part of what its numbers mean."""
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    s, official = SCALES[name], SparseProbingEvalConfig()
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
    dataset, revision = SCALES[name].text.split("@")
    assert dataset == "Skylion007/openwebtext"
    assert len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def test_the_large_scale_reads_three_layers_and_many_processes_can_share_it():
    s = SCALES["gemma-2-2b"]
    assert (s.language_model, s.layers, s.d_sae) == ("google/gemma-2-2b", (5, 12, 19), 2304)
    assert s.total_steps * s.batch_tokens <= 10_000_000 < (s.total_steps + 1) * s.batch_tokens
    for processes in (2, 4, 8, 16):
        assert s.lanes % processes == 0
