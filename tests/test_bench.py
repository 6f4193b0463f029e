"""SAE-Bench with our model around it: same numbers every time, nothing left behind."""

import contextlib
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_language_model import LAYERS, hooked_llama, load
from tiny import scores

import lab.bench
from lab.bench import as_hooked_transformer, first_letter_words, load_data_only, sae_bench
from lab.probing import ProbingTexts
from lab.process import ExperimentError

# ── What SAE-Bench is given ─────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_the_stand_in_answers_sae_bench_as_a_real_hooked_transformer_does(tiny_model):
    """At position -6, the one that is asked for, with padding at the end; NaN at those after it,
    which the model does not read."""
    from transformer_lens import HookedTransformer

    lm, hooked = load(tiny_model, LAYERS), hooked_llama(tiny_model)
    stand_in = as_hooked_transformer(lm, torch.float32)
    assert isinstance(stand_in, HookedTransformer)
    prompts = [" the film has the first letter:", "\n a news: good"]
    tokens = stand_in.to_tokens(prompts)
    assert tokens.tolist() == lm.tokenizer(prompts, padding=True).input_ids
    assert tokens.shape == (2, 8)
    assert lm.tokenizer.pad_token_id in tokens[1, -6:]
    theirs = hooked.run_with_cache(tokens)[1]
    for layer in LAYERS:
        name = f"blocks.{layer}.hook_resid_post"
        _, cache = stand_in.run_with_cache(prompts, names_filter=[name])
        assert cache[name].shape == (2, 6, lm.d_in)
        expected, found = (acts[name][:, -6] for acts in (theirs, cache))
        assert ((found - expected).norm() / expected.norm()).item() < 1e-5
        assert cache[name][:, -5:].isnan().all()
    # A single text is a batch of one.
    alone = stand_in.run_with_cache(prompts[0])[1]["blocks.2.hook_resid_post"][0, -6]
    beside = cache["blocks.2.hook_resid_post"][0, -6]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-5)


def test_remembered_prompts_are_asked_of_the_model_once(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path))
    lm = load(tiny_model, LAYERS)
    passes: list[None] = []
    lm.model.base_model.register_forward_hook(lambda *_: passes.append(None))
    stand_in = as_hooked_transformer(lm, torch.bfloat16)
    prompts = [" the film has the first letter:"] * 2
    first = stand_in.run_with_cache(prompts)[1]
    again = stand_in.run_with_cache(prompts)[1]
    assert len(passes) == 1
    assert first.keys() == again.keys() == {f"blocks.{i}.hook_resid_post" for i in LAYERS}
    for name, acts in first.items():
        assert acts.dtype == torch.bfloat16
        assert torch.equal(acts[:, -6], again[name][:, -6])
        assert acts[:, -6].isfinite().all()
    stand_in.run_with_cache(prompts[:1])
    assert len(passes) == 2, "other prompts"


def test_the_words_of_absorption_do_not_depend_on_the_tokenizers_order(trained, monkeypatch):
    from sae_bench.evals.absorption import vocab

    scale = tiny.tiny_scale(trained.scale.language_model, absorption_words=400)
    words = first_letter_words(scale, trained.lm)
    assert len(set(words)) == len(words) == 400
    real = vocab.get_alpha_tokens
    monkeypatch.setattr(vocab, "get_alpha_tokens", lambda tokenizer: real(tokenizer)[::-1])
    assert first_letter_words(scale, trained.lm) == words


@torch.no_grad()
@pytest.mark.parametrize("words", [60, 150])
def test_too_few_words_for_absorption_are_refused_before_any_is_read(trained, words):
    scale = tiny.tiny_scale(trained.scale.language_model, absorption_words=words)
    with pytest.raises(ExperimentError, match=rf"words={words} .* only \d+ letters have 10"):
        first_letter_words(scale, trained.lm)


@pytest.mark.parametrize("whole", [True, False])
def test_a_copy_of_a_dataset_is_read_where_nobody_answers_if_it_is_whole(
    tmp_path, monkeypatch, capsys, whole
):
    import datasets

    asked = []

    def load_dataset(name, *_, **__):
        asked.append(name)
        if name == "owner/name":
            raise ConnectionError("no route\nand more")
        return "rows"

    for k in range(2 if whole else 1):
        (tmp_path / f"train-{k:05d}-of-00002-0ab65b32c47407e8.parquet").touch()
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(lab.bench, "copy_of", lambda name, kind: tmp_path)
    if whole:
        assert load_data_only("owner/name", split="train") == "rows"
        assert asked == ["owner/name", str(tmp_path)]
        assert (
            f"the copy that the hub's client keeps is read, {tmp_path}" in capsys.readouterr().out
        )
        return
    lacks = r"could not be read \(no route\), and the copy .* lacks train-00001-of-00002"
    with pytest.raises(ExperimentError, match=lacks):
        load_data_only("owner/name", split="train")
    monkeypatch.setattr(lab.bench, "copy_of", lambda name, kind: None)
    with pytest.raises(ExperimentError, match=r"\(no route\), and no copy is kept here: check"):
        load_data_only("owner/name", split="train")


def test_an_error_of_a_dataset_that_is_not_the_networks_is_raised_as_it_is(tmp_path, monkeypatch):
    """A full disk, or a column that has changed: another copy would hide it."""
    import datasets

    for error in (OSError(28, "No space left on device"), ValueError("another column")):

        def load_dataset(*_, error: Exception = error, **__):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(lab.bench, "copy_of", lambda name, kind: tmp_path)
        with pytest.raises(type(error)):
            load_data_only("owner/name", split="train")


def test_a_model_that_reads_in_another_dtype_than_is_noted_down_is_not_scored(trained):
    assert trained.lm.dtype == torch.bfloat16 and trained.scale.evaluation_dtype == "float32"
    with (
        pytest.raises(ValueError, match=r"reads in torch.bfloat16, and scores are to be in torch"),
        sae_bench(trained.scale, trained.lm),
    ):
        pass


# ── What is as before ───────────────────────────────────────────────────────────────────────────


def surroundings() -> dict:
    """Everything sae_bench() says it puts back."""
    from sae_bench.evals.absorption import common, feature_absorption
    from sae_bench.evals.absorption import main as absorption
    from sae_bench.evals.sparse_probing import main as probing
    from sae_bench.sae_bench_utils import activation_collection, dataset_info, dataset_utils

    modules = (absorption, common, feature_absorption, probing, activation_collection)
    modules += (dataset_info, dataset_utils)
    attributes = {f"{m.__name__}.{k}": id(v) for m in modules for k, v in vars(m).items()}
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - SAE-Bench draws from this one
    return attributes | {
        "classes per data set": dict(dataset_info.chosen_classes_per_dataset),
        "random": random.getstate(),
        "numpy": (kind, keys.tolist(), rest),
        "torch": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "working folder": Path.cwd(),
        "stdout": id(sys.stdout),
        "stderr": id(sys.stderr),
    }


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("raises", [False, True])
def test_everything_around_sae_bench_is_as_before_also_when_it_raises(
    trained, tmp_path, gradients, raises
):
    lm = trained.lm.reading_in(torch.float32)
    arguments = trained.scale, lm, tmp_path / "eval" / "x"
    texts = ProbingTexts(trained.scale, trained.lm, tmp_path, {})
    with torch.set_grad_enabled(gradients):
        before = surroundings()
        with (
            pytest.raises(ZeroDivisionError) if raises else contextlib.nullcontext(),
            sae_bench(*arguments, texts=texts),
        ):
            inside = surroundings()
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
            torch.set_grad_enabled(not gradients)
            os.chdir("/")
            print("this belongs in the log")
            if raises:
                raise ZeroDivisionError
        assert changed(before, surroundings()) == set()
    here = "sae_bench.evals."
    assert changed(before, inside) >= {
        f"{here}absorption.main.HookedTransformer",
        f"{here}absorption.main.run_k_sparse_probing_experiment",
        f"{here}absorption.main.run_feature_absortion_experiment",
        f"{here}absorption.common.get_alpha_tokens",
        f"{here}absorption.feature_absorption.get_alpha_tokens",
        f"{here}sparse_probing.main.HookedTransformer",
        f"{here}sparse_probing.main.get_dataset_activations",
        "sae_bench.sae_bench_utils.activation_collection.get_all_llm_activations",
        "sae_bench.sae_bench_utils.activation_collection.create_meaned_model_activations",
        "sae_bench.sae_bench_utils.activation_collection.get_sae_meaned_activations",
        "sae_bench.sae_bench_utils.dataset_utils.get_multi_label_train_test_data",
        "classes per data set",
        "working folder",
        "stdout",
        "stderr",
    }
    assert (tmp_path / "eval" / "sae_bench.log").read_text() == "this belongs in the log\n"


def test_evaluation_writes_only_where_it_was_told_to(evaluated, trained):
    assert evaluated.before.package == evaluated.after.package
    assert evaluated.before.model == evaluated.after.model
    results = [f"{name}_custom_sae_eval_results.json" for name in trained.saved]
    expected = {f"eval/{kind}/{r}" for kind in ("sparse_probing", "absorption") for r in results}
    assert set(tiny.tree(evaluated.cwd)) == expected | {"eval/sae_bench.log"}


def test_evaluation_leaves_the_saved_saes_untouched(evaluated):
    assert evaluated.before.saes == evaluated.after.saes
    assert len(evaluated.after.saes) == 2 * 3


# ── The scores ──────────────────────────────────────────────────────────────────────────────────


def test_the_json_files_hold_what_is_returned(evaluated, trained):
    for name, pair in zip(trained.saved, evaluated.scores, strict=True):
        returned = {"sparse_probing": pair[0]["sae_bench"], "absorption": pair[1]["sae_bench"]}
        for kind, its in returned.items():
            path = evaluated.cwd / "eval" / kind / f"{name}_custom_sae_eval_results.json"
            on_disk = json.loads(path.read_text())
            metrics = on_disk["eval_result_metrics"]
            for group, values in metrics.items():
                for metric, value in values.items():
                    assert its["eval_result_metrics"][group][metric] == value


def test_scores_do_not_depend_on_what_was_cached_or_evaluated_before(
    evaluated, trained, tmp_path, monkeypatch
):
    """The second SAE: after the first with an empty cache; alone with a full one; alone, empty."""
    name, folder = list(trained.saved.items())[1]
    monkeypatch.setenv("COSINE_SAE_CACHE", str(evaluated.cache))
    (warm,) = scores(trained, {name: folder}, tmp_path / "warm")
    shutil.rmtree(evaluated.cache)
    (cold,) = scores(trained, {name: folder}, tmp_path / "cold")
    for again in (warm, cold):
        for found, expected in zip(again, evaluated.scores[1], strict=True):
            assert found == expected
