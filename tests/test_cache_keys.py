"""Whatever an entry of the cache depends on stands in its key: another value, another entry."""

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import hundred_steps

import lab.absorption
import lab.activations
import lab.bench
import lab.evaluation
import lab.packaged_text
import lab.probing
from lab.scales import Scale
from lab.text import Lane

SCALE = hundred_steps(tasks=("news", "code"), absorption_words=500, keep_activations=True)
IDENTITY = {
    "model": "m", "files": {"config.json": "1"}, "tokenizer": "t", "dtype": "torch.float32",
    "device": "cpu", "torch": "1", "transformers": "2", "tokenizers": "3",
}  # fmt: skip


class Found(Exception):
    """What cached() was asked for."""


def reader(**identity) -> SimpleNamespace:
    lm = SimpleNamespace(identity=IDENTITY | identity, layers=(0,), device=torch.device("cpu"))
    lm.reading_in = lambda dtype: lm
    lm.is_special = lambda tokens: tokens < 0
    return lm


def prompts(scale: Scale, lm, tokens: int = 1) -> None:
    stand_in = lab.bench.as_hooked_transformer(
        SimpleNamespace(**vars(lm), name="m", d_in=4, tokenizer=None), torch.float32
    )
    stand_in.to_tokens = lambda prompts: torch.full((2, 8), tokens)
    stand_in.run_with_cache(["a", "b"])


def residuals(scale: Scale, lm, tokens: int = 1) -> None:
    text = [({0: Lane(0, [])}, torch.full((2, 4), tokens))]
    next(lab.activations.residual_blocks(scale, lm, text))


# {kind: what asks for it}
KINDS: dict[str, Callable] = {
    "first-letter-probes": lambda scale, lm: lab.absorption.first_letter_probes(scale, lm, 0),
    "probing": lab.probing.probing_artifacts,
    "documents": lambda scale, lm: lab.packaged_text.packaged_documents(scale),
    "prompts": prompts,
    "residuals": residuals,
}


@pytest.fixture
def key_of(monkeypatch):
    def cached(kind, key, build):
        raise Found(kind, json.dumps(key, sort_keys=True))

    for room in (lab.absorption, lab.activations, lab.bench, lab.packaged_text, lab.probing):
        monkeypatch.setattr(room, "cached", cached)

    def asked(kind: str, scale: Scale = SCALE, lm=None, **how) -> str:
        with pytest.raises(Found) as found:
            KINDS[kind](scale, lm or reader(), **how)
        assert found.value.args[0] == kind
        return found.value.args[1]

    return asked


EVALUATED = {"evaluation_dtype": "float32", "evaluation_seed": 7}
TEXTS = {"tasks": ("news",), "probe_train_set_size": 8, "probe_test_set_size": 8}
READ = {
    "first-letter-probes": EVALUATED | {"absorption_words": 600},
    "probing": EVALUATED
    | TEXTS
    | {"context_length": 64, "k_values": (1,), "layers": (1,), "lm_batch": 4}
    | {"keep_activations": False},
    "documents": TEXTS,
    "prompts": {},
    "residuals": {"lm_batch": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_that_a_content_depends_on_makes_another_entry(key_of, kind):
    keys = [key_of(kind), *(key_of(kind, replace(SCALE, **{n: v})) for n, v in READ[kind].items())]
    assert len(set(keys)) == len(keys) == 1 + len(READ[kind])
    assert key_of(kind) == keys[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "documents"])
def test_every_part_of_a_models_identity_makes_another_entry(key_of, kind):
    """The dtype that the model reads in was once overwritten by that of the scores."""
    keys = {key_of(kind, lm=reader(**{name: "another"})) for name in IDENTITY}
    assert len(keys | {key_of(kind)}) == 1 + len(IDENTITY)


@pytest.mark.parametrize("kind", ["prompts", "residuals"])
def test_other_tokens_or_layers_make_another_entry(key_of, kind):
    lm = reader()
    lm.layers = (0, 1)
    assert len({key_of(kind), key_of(kind, tokens=2), key_of(kind, lm=lm)}) == 3


@pytest.mark.parametrize(
    "package", ["sae-bench", "sae-probes", "scikit-learn", "numpy"], ids=lambda name: name
)
@pytest.mark.parametrize("kind", ["first-letter-probes", "probing"])
def test_another_version_of_what_scores_makes_another_entry(key_of, kind, package, monkeypatch):
    before = key_of(kind)
    real = lab.bench.versions
    newer = lambda *names: real(*names) | ({package: "99"} if package in names else {})  # noqa: E731
    monkeypatch.setattr(lab.bench, "versions", newer)
    assert key_of(kind) != before


def test_every_field_of_a_scale_makes_another_evaluation(trained, tmp_path, monkeypatch):
    """Finished parts lie in a folder whose name holds all that scores depend on."""
    folders = set()
    monkeypatch.setattr(lab.evaluation, "remembered", lambda path, *_, **__: folders.add(path) or 1)
    changes = [{}, {"evaluation_seed": 7}, {"absorption_words": 700}, {"k_values": (1,)}]
    changes += [{"tasks": ("news",)}, {"heldout_contexts": 8}, {"lm_batch": 4}, {"n_seeds": 9}]
    for change in changes:
        scale = replace(tiny.tiny_scale(trained.scale.language_model), **change)
        with pytest.raises(TypeError):  # 1 is no list of scores
            lab.evaluation.evaluate(
                scale, (), trained.lm, {}, {1: trained.saved}, trained.heldout, [], tmp_path, None
            )
    assert len(folders) == len(changes)
