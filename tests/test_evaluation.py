"""SAE-Bench around our SAEs: same numbers every time, nothing left behind, the right units."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import experiment

LAPTOP = experiment.SCALES["laptop"]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> SimpleNamespace:
    """The tiny scale, trained once through experiment's own functions and saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSINE_SAE_CACHE", str(tmp_path_factory.mktemp("training-cache")))
        # Alphas strictly inside (0, 1) and a long average: nothing of the export is trivial.
        run = experiment.Run("for these tests", alpha_start=0.1, alpha_end=0.6, ema=True)
        # Loose enough for latents to share a letter between them: absorption has something to find.
        scale = tiny.tiny_scale(
            tiny_model, training_tokens=60 * 256, target_l0=32.0, ema_horizon_fraction=0.3
        )
        lm = experiment.load_language_model(scale)
        contexts = experiment.training_contexts(scale, lm)
        heldout, contexts = contexts.tensor_split([scale.heldout_contexts])
        (trainer,) = experiment.train(scale, run, lm, contexts, log=lambda records: None)
        folder = tmp_path_factory.mktemp("run") / "sae"
        hashes = experiment.save_saes(scale, lm, [trainer], folder)
    saved = {f"{name}_{digest[:12]}": folder / name for name, digest in hashes.items()}
    return SimpleNamespace(
        scale=scale, run=run, lm=lm, trainer=trainer, saved=saved, heldout=heldout
    )


def scores(trained, saved: dict[str, Path], folder: Path) -> list[tuple]:
    """SAE-Bench's two results for each saved SAE, less the time of day."""
    arguments = trained.scale, trained.lm, 1, saved
    probing = experiment.evaluate_probing(*arguments, folder / "sparse_probing")
    absorption = experiment.evaluate_absorption(*arguments, folder / "absorption")
    pairs = zip(probing, absorption, strict=True)
    return [tuple(map(experiment.without_times, pair)) for pair in pairs]


def package_files() -> dict[str, tuple[int, int]]:
    """Size and time of everything in site-packages/sae_bench but compiled bytecode."""
    import sae_bench

    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in Path(sae_bench.__file__).parent.rglob("*")
        if "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory) -> SimpleNamespace:
    """Both SAEs evaluated with an empty cache, and what lay around before and after."""
    cwd = tmp_path_factory.mktemp("cwd")
    saes = next(iter(trained.saved.values())).parent
    before = SimpleNamespace(package=package_files(), saes=tiny.tree(saes))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setenv("COSINE_SAE_CACHE", str(tmp_path_factory.mktemp("cold")))
        found = scores(trained, trained.saved, Path("eval"))  # relative to the caller's folder
        cache = Path(os.environ["COSINE_SAE_CACHE"])
    after = SimpleNamespace(package=package_files(), saes=tiny.tree(saes))
    return SimpleNamespace(scores=found, before=before, after=after, cwd=cwd, cache=cache)


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
    with torch.set_grad_enabled(gradients):
        before = surroundings()
        with (
            pytest.raises(ZeroDivisionError) if raises else contextlib.nullcontext(),
            experiment.sae_bench(trained.scale, trained.lm, tmp_path / "eval" / "x"),
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
    results = [f"{name}_custom_sae_eval_results.json" for name in trained.saved]
    expected = {f"eval/{kind}/{r}" for kind in ("sparse_probing", "absorption") for r in results}
    assert set(tiny.tree(evaluated.cwd)) == expected | {"eval/sae_bench.log"}


def test_evaluation_leaves_the_saved_saes_untouched(evaluated):
    assert evaluated.before.saes == evaluated.after.saes
    assert len(evaluated.after.saes) == 2 * 3


def test_absorption_really_runs_on_at_least_20_letters(evaluated):
    for _, absorption in evaluated.scores:
        metrics = experiment.absorption_metrics(absorption)
        assert metrics["absorption_letters"] >= 20
        assert None not in metrics.values()
        assert 0 < metrics["absorption_fraction"] < 1
        assert metrics["absorption_fraction_sd_over_letters"] > 0


def test_the_json_files_hold_what_is_returned(evaluated, trained):
    for name, pair in zip(trained.saved, evaluated.scores, strict=True):
        for kind, returned in zip(("sparse_probing", "absorption"), pair, strict=True):
            path = evaluated.cwd / "eval" / kind / f"{name}_custom_sae_eval_results.json"
            on_disk = json.loads(path.read_text())
            metrics = on_disk["eval_result_metrics"]
            for group, values in metrics.items():
                for metric, value in values.items():
                    assert returned["eval_result_metrics"][group][metric] == value


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


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
def test_a_saved_sae_gives_the_training_saes_latents_in_residual_units(trained, seed):
    import sae_lens

    experiment.register_with_sae_lens()
    sae = sae_lens.SAE.load_from_disk(list(trained.saved.values())[seed])
    trainer, scale = trained.trainer, trained.trainer.units.scale
    x = trained.lm.residuals(trained.heldout)[1].float().flatten(0, 1)
    norms = x.norm(dim=-1)
    x = x[norms <= trainer.units.outlier_norm]
    alpha = trained.run.alpha_end
    assert sae.cfg.alpha == pytest.approx(alpha, abs=1e-12)
    with trainer.average.applied():
        # Averaged unit rows are shorter; SAE-Bench needs unit rows, so latents take up the norm.
        norm_F = trainer.sae.W_dec[seed].norm(dim=-1)
        f = trainer.sae.encode(x * scale, alpha, torch.float32)
        expected = f[seed] * norm_F / scale
        reconstruction = trainer.sae.decode(f)[seed] / scale
    found = sae.encode(x)
    assert norm_F.max() < 0.999
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6
    assert ((sae.decode(found) - reconstruction).norm() / reconstruction.norm()).item() < 1e-6
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(96), rtol=0, atol=1e-6)
    # Not in training units: those are at least twice smaller here, so a missing fold would show.
    assert scale < 0.5
    # Any leading shape will do.
    torch.testing.assert_close(sae.encode(x[:6].view(2, 3, -1)).view(6, -1), found[:6])


@torch.no_grad()
def test_reading_out_with_another_alpha_changes_alpha_alone(trained):
    folder = next(iter(trained.saved.values()))
    saved, swapped = experiment.load_sae(folder), experiment.load_sae(folder, 1.0)
    assert (saved.cfg.alpha, swapped.cfg.alpha) == (pytest.approx(0.6), 1.0)
    x = trained.lm.residuals(trained.heldout[:1])[1].float()[0]
    z = (x - saved.b_dec) @ saved.W_enc * saved.gate + saved.b_enc
    torch.testing.assert_close(swapped.encode(x), z.relu(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(saved.encode(x), z.relu(), rtol=1e-2, atol=1e-2)


def test_absorption_would_score_latents_in_training_units_differently(evaluated, trained, tmp_path):
    """Why the activation scale is folded away on export (pitfalls, 3.1 A)."""
    folder = next(iter(trained.saved.values()))
    unfolded = tmp_path / "unfolded"
    shutil.copytree(folder, unfolded)
    weights, scale = load_file(folder / "sae_weights.safetensors"), trained.trainer.units.scale
    for parameter in ("gate", "b_enc"):  # what every latent is proportional to
        weights[parameter] = weights[parameter] * scale
    save_file(weights, unfolded / "sae_weights.safetensors")
    (found,) = experiment.evaluate_absorption(
        trained.scale, trained.lm, 1, {"unfolded": unfolded}, tmp_path / "eval"
    )
    wrong, right = map(experiment.absorption_metrics, (found, evaluated.scores[0][1]))
    assert right["absorption_fraction"] - wrong["absorption_fraction"] > 0.05


def test_the_words_of_absorption_do_not_depend_on_the_tokenizers_order(trained, monkeypatch):
    from sae_bench.evals.absorption import vocab

    scale = tiny.tiny_scale(trained.scale.language_model, absorption_words=100)
    words = experiment.first_letter_words(scale, trained.lm)
    assert len(set(words)) == len(words) == 100
    real = vocab.get_alpha_tokens
    monkeypatch.setattr(vocab, "get_alpha_tokens", lambda tokenizer: real(tokenizer)[::-1])
    assert experiment.first_letter_words(scale, trained.lm) == words


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooled_latents_are_sae_benchs_own(trained, dtype):
    from sae_bench.sae_bench_utils.activation_collection import get_sae_meaned_activations

    sae = experiment.load_sae(next(iter(trained.saved.values()))).to(dtype=dtype)
    acts = trained.lm.residuals(trained.heldout)[1].to(dtype).clone()
    for i, text in enumerate(acts):  # BOS, and padding of every length, are zero
        text[0] = 0
        text[len(text) - 2 * i + 1 :] = 0
    texts = {"a": acts[:7], "b": acts[7:]}
    theirs = get_sae_meaned_activations(texts, sae, 3)
    ours = experiment.pooled_latents(texts, sae, 3)
    assert ours.keys() == theirs.keys()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for label, expected in theirs.items():
        assert ours[label].dtype == dtype
        assert ((ours[label] - expected).norm() / expected.norm()).item() < tolerance


def test_a_model_that_knows_too_few_letters_gives_null_with_a_reason_and_the_run_finishes(
    tmp_path, monkeypatch, capfd
):
    folder = tiny.make_model(tmp_path / "model", knows_letters=False)
    scale = tiny.tiny_scale(folder, tasks=("sentiment",))
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EXPERIMENT_SCALE", "tiny")
    monkeypatch.setitem(experiment.SCALES, "tiny", scale)
    status = experiment.main([f"--out_dir={tmp_path / 'run_7'}"])
    out, err = capfd.readouterr()
    assert (status, err) == (0, "")
    results = json.loads((tmp_path / "run_7" / "final_info.json").read_text())
    entry = results["tiny layer 1"]
    missing = {name for name, value in entry["means"].items() if value is None}
    assert missing >= {"absorption_full", "absorption_fraction", "absorption_letters"}
    assert not missing & {"probing_top_1", "fvu", "l0", "ce_recovered", "decoder_pw_mcc"}
    assert entry["final_info_dict"]["absorption_full"] == [None, None]
    assert "20 letters" in entry["notes"]["absorption"]
    assert "absorption_full: null\n" in out


# Data: no network, the files inside the sae-probes package.


def word_runs(text: str, words: int = 8) -> set[str]:
    w = text.lower().split()
    return {" ".join(w[i : i + words]) for i in range(max(1, len(w) - words + 1))}


@pytest.fixture(scope="module")
def probing_texts() -> dict[str, tuple[dict, dict]]:
    """(train, test) of every laptop task at the laptop's sizes."""
    sizes = LAPTOP.probe_train_set_size // 2, LAPTOP.probe_test_set_size // 2
    return {name: experiment.probing_task(name, *sizes) for name in LAPTOP.tasks}


@pytest.mark.parametrize("task", LAPTOP.tasks)
def test_probing_tasks_have_the_sizes_sae_bench_asks_for_and_no_text_twice(probing_texts, task):
    train, test = probing_texts[task]
    assert list(train) == list(test) == list(experiment.TASKS[task])
    assert {len(texts) for texts in train.values()} == {LAPTOP.probe_train_set_size // 2}
    assert {len(texts) for texts in test.values()} == {LAPTOP.probe_test_set_size // 2}
    texts = [t for split in (train, test) for found in split.values() for t in found]
    assert max(Counter(" ".join(t.lower().split()) for t in texts).values()) == 1
    assert all(t.strip() and len(t) <= experiment.TASK_CHARACTERS for t in texts)


@pytest.mark.parametrize("task", LAPTOP.tasks)
def test_no_text_to_test_probes_on_is_mostly_one_they_were_trained_on(probing_texts, task):
    train, test = probing_texts[task]
    holders: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(t for texts in train.values() for t in texts):
        for run in word_runs(text):
            holders[run].append(i)
    shared = 0
    for text in (t for texts in test.values() for t in texts):
        runs = word_runs(text)
        common = Counter(i for run in runs for i in holders.get(run, ()))
        shared += bool(common)
        assert all(2 * count <= len(runs) for count in common.values()), text[:100]
    # The files do hold different cuts of the same pages: the check above is not about nothing.
    assert shared or task in ("sentiment", "news")


@pytest.mark.parametrize("task", LAPTOP.tasks)
def test_the_texts_of_a_class_come_from_its_file_and_from_no_other_class(probing_texts, task):
    sources = {
        label: {
            (text[150:] if task == "code" else text)[: experiment.TASK_CHARACTERS].strip()
            for text, value in experiment.sae_probes_rows(number)
            if value == target
        }
        for label, (number, target) in experiment.TASKS[task].items()
    }
    for split in probing_texts[task]:
        for label, texts in split.items():
            for text in texts:
                assert [name for name, source in sources.items() if text in source] == [label]


def test_the_text_to_train_on_shares_no_run_of_8_words_with_any_probing_text(probing_texts):
    held = {
        run
        for splits in probing_texts.values()
        for split in splits
        for texts in split.values()
        for text in texts
        for run in word_runs(text)
    }
    documents = experiment.training_documents(LAPTOP)
    assert len(documents) > 50_000
    assert len(set(documents)) == len(documents)
    assert not any(held & word_runs(text) for text in documents)
    # The rule has work to do: some documents were left out for it.
    everything = {t for number in experiment.PROSE for t, _ in experiment.sae_probes_rows(number)}
    assert 0 < len(everything) - len(documents) < 0.2 * len(everything)


def test_a_text_that_leaves_nothing_to_train_on_is_an_error(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path))
    sentence = "The film was good and the news was not. "
    for repeats, heldout in ((1, 1), (100, 10_000)):
        monkeypatch.setattr(experiment, "training_documents", lambda _, n=repeats: [sentence * n])
        scale = tiny.tiny_scale(trained.scale.language_model, heldout_contexts=heldout)
        with pytest.raises(experiment.ExperimentError, match="nothing is left to train on"):
            experiment.training_contexts(scale, trained.lm)


TEXTS_OF_ONE_PROCESS = f"""
import dataclasses, hashlib, sys
sys.path.insert(0, {str(tiny.ROOT)!r})
import experiment
experiment.PROSE = (57, 98)
scale = dataclasses.replace(experiment.SCALES["laptop"], tasks=("sentiment",))
texts = experiment.training_documents(scale), experiment.probing_task("sentiment", 20, 10)
print(hashlib.sha256(repr(texts).encode()).hexdigest())
"""


def test_texts_come_in_the_same_order_in_every_process():
    """Not in a set's order, which changes with the hash seed."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", TEXTS_OF_ONE_PROCESS],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
