"""SAE-Bench around our SAEs: same numbers every time, nothing left behind, the right units."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import experiment
import lab.absorption
import lab.bench
import lab.checkpoints
import lab.evaluation
import lab.fidelity
import lab.language_model
import lab.metrics
import lab.packaged_text
import lab.probing
import lab.process
import lab.results
import lab.saved_sae
import lab.scales
import lab.text

LAPTOP = lab.scales.SCALES["laptop"]


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
        lm = lab.language_model.load_language_model(scale)
        heldout, first_document = lab.text.heldout_contexts(scale, lm)
        folder = tmp_path_factory.mktemp("run")
        log = lab.checkpoints.TrainingLog(folder / "training_log.jsonl", "run", {})
        with tiny.signals() as signals:
            training = experiment.Training(scale, run, lm, first_document, lab.process.Ranks())
            training.train(log, lab.checkpoints.Checkpoints(folder / "checkpoint", {}), signals)
        hashes = lab.saved_sae.save_saes(scale, lm, training.trainers, folder / "sae")
    saved = {f"{name}_{digest[:12]}": folder / "sae" / name for name, digest in hashes.items()}
    return SimpleNamespace(
        scale=scale,
        run=run,
        lm=lm,
        trainer=training.trainers[0],
        saved=saved,
        heldout=heldout,
        records=log.records,
    )


def scores(trained, saved: dict[str, Path], folder: Path) -> list[tuple]:
    """SAE-Bench's two results for each saved SAE, less the time of day."""
    both = trained.scale, trained.lm
    probing = lab.probing.evaluate_probing(*both, {1: saved}, folder / "sparse_probing")
    absorption = lab.absorption.evaluate_absorption(*both, 1, saved, folder / "absorption")
    assert list(probing) == [(1, None)]
    pairs = zip(probing[1, None], absorption, strict=True)
    return [tuple(map(lab.results.without_times, pair)) for pair in pairs]


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
    model = Path(trained.scale.language_model)
    before = SimpleNamespace(package=package_files(), saes=tiny.tree(saes), model=tiny.tree(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setenv("COSINE_SAE_CACHE", str(tmp_path_factory.mktemp("cold")))
        found = scores(trained, trained.saved, Path("eval"))  # relative to the caller's folder
        cache = Path(os.environ["COSINE_SAE_CACHE"])
    after = SimpleNamespace(package=package_files(), saes=tiny.tree(saes), model=tiny.tree(model))
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
    arguments = trained.scale, trained.lm, tmp_path / "eval" / "x"
    texts = lab.probing.ProbingTexts(trained.scale, trained.lm, tmp_path, {})
    with torch.set_grad_enabled(gradients):
        before = surroundings()
        with (
            pytest.raises(ZeroDivisionError) if raises else contextlib.nullcontext(),
            lab.bench.sae_bench(*arguments, texts=texts),
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


def test_absorption_really_runs_on_at_least_20_letters(evaluated):
    for _, absorption in evaluated.scores:
        metrics = lab.metrics.absorption_metrics(absorption)
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

    lab.saved_sae.register_with_sae_lens()
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
    saved = lab.saved_sae.load_sae(folder)
    swapped = lab.saved_sae.read_out(saved, 1.0)
    assert (saved.cfg.alpha, swapped.cfg.alpha) == (pytest.approx(0.6), 1.0)
    assert swapped.W_enc is saved.W_enc
    x = trained.lm.residuals(trained.heldout[:1])[1].float()[0]
    z = (x - saved.b_dec) @ saved.W_enc * saved.gate + saved.b_enc
    torch.testing.assert_close(swapped.encode(x), z.relu(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(saved.encode(x), z.relu(), rtol=1e-2, atol=1e-2)


def test_a_saved_sae_can_be_differentiated_by_its_input_as_attributions_need(trained):
    sae = lab.saved_sae.load_sae(next(iter(trained.saved.values()))).to(dtype=torch.float64)
    x = trained.lm.residuals(trained.heldout[:1])[1][0, 1:4].double().requires_grad_()
    assert (sae.encode(x) > 0).any()
    assert torch.autograd.gradcheck(sae.encode, (x,))


def test_absorption_would_score_latents_in_training_units_differently(evaluated, trained, tmp_path):
    """Why the activation scale is folded away on export (pitfalls, 3.1 A)."""
    folder = next(iter(trained.saved.values()))
    unfolded = tmp_path / "unfolded"
    shutil.copytree(folder, unfolded)
    weights, scale = load_file(folder / "sae_weights.safetensors"), trained.trainer.units.scale
    for parameter in ("gate", "b_enc"):  # what every latent is proportional to
        weights[parameter] = weights[parameter] * scale
    save_file(weights, unfolded / "sae_weights.safetensors")
    (found,) = lab.absorption.evaluate_absorption(
        trained.scale, trained.lm, 1, {"unfolded": unfolded}, tmp_path / "eval"
    )
    wrong, right = map(lab.metrics.absorption_metrics, (found, evaluated.scores[0][1]))
    assert right["absorption_fraction"] - wrong["absorption_fraction"] > 0.05


def test_the_words_of_absorption_do_not_depend_on_the_tokenizers_order(trained, monkeypatch):
    from sae_bench.evals.absorption import vocab

    scale = tiny.tiny_scale(trained.scale.language_model, absorption_words=100)
    words = lab.bench.first_letter_words(scale, trained.lm)
    assert len(set(words)) == len(words) == 100
    real = vocab.get_alpha_tokens
    monkeypatch.setattr(vocab, "get_alpha_tokens", lambda tokenizer: real(tokenizer)[::-1])
    assert lab.bench.first_letter_words(scale, trained.lm) == words


# ── Probing texts ───────────────────────────────────────────────────────────────────────────────

LABELS = ("a", "b")


@pytest.fixture(scope="module")
def two_layers(tiny_model) -> lab.language_model.LanguageModel:
    return lab.language_model.LanguageModel.load(tiny_model, "tiny", (1, 3), torch.float32)


def padded_texts(lm) -> dict[str, dict[str, torch.Tensor]]:
    """Seven and nine texts as SAE-Bench tokenises them: BOS first, padding of any length last."""
    generator, texts = torch.Generator().manual_seed(0), {}
    for label, n in zip(LABELS, (7, 9), strict=True):
        tokens = torch.randint(4, len(lm.tokenizer), (n, 20), generator=generator)
        tokens[:, 0] = lm.tokenizer.bos_token_id
        for i, row in enumerate(tokens):
            row[20 - 2 * i :] = lm.tokenizer.pad_token_id
        tokens[1, 5] = lm.tokenizer.eos_token_id
        texts[label] = {"input_ids": tokens}
    return texts


def padded_residuals(lm, texts: dict, layer: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What SAE-Bench's own functions are given: [texts, L, D], zero at special tokens."""
    return {
        label: (
            lm.residuals(found["input_ids"])[layer] * ~lm.is_special(found["input_ids"])[..., None]
        ).to(dtype)
        for label, found in texts.items()
    }


@torch.no_grad()
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "read again"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_means_over_texts_are_sae_benchs_own(trained, two_layers, tmp_path, dtype, keep):
    from sae_bench.sae_bench_utils import activation_collection as theirs

    lm = two_layers
    scale = replace(trained.scale, keep_activations=keep, evaluation_dtype=dtype, lm_batch=4)
    like, tolerance = getattr(torch, dtype), {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    first, second = (lab.saved_sae.load_sae(path).to(dtype=like) for path in trained.saved.values())
    read_outs = [lab.saved_sae.read_out(first, alpha) for alpha in (0.0, 0.3, 1.0)]
    saes, inputs = {1: [first, *read_outs, second], 3: [second]}, padded_texts(lm)
    texts = lab.probing.ProbingTexts(scale, lm, tmp_path, saes)
    for layer, of_layer in saes.items():
        hook = f"blocks.{layer}.hook_resid_post"
        handles = texts.collect(inputs, None, 4, layer, hook, True)
        given = padded_residuals(lm, inputs, layer, like)
        for found, expected in [
            (texts.mean_residuals(handles), theirs.create_meaned_model_activations(given)),
            *(
                (
                    texts.mean_latents(handles, sae, 5),
                    theirs.get_sae_meaned_activations(given, sae, 5),
                )
                for sae in of_layer
            ),
        ]:
            assert list(found) == list(expected) == list(LABELS)
            for label, mean in expected.items():
                assert found[label].dtype == mean.dtype == like
                assert ((found[label] - mean).norm() / mean.norm()).item() < tolerance
    held = load_file(next(tmp_path.glob("*.safetensors")))
    assert held.keys() == ({"tokens", "owners", "residuals"} if keep else {"tokens"})


@torch.no_grad()
@pytest.mark.parametrize(("keep", "passes"), [(True, [4, 4, 4]), (False, [0, 4, 4])])
def test_one_pass_of_the_language_model_serves_all_layers_and_all_saes(
    trained, two_layers, tmp_path, keep, passes
):
    lm, counted = two_layers, []
    scale = replace(trained.scale, keep_activations=keep, lm_batch=5)
    first, second = map(lab.saved_sae.load_sae, trained.saved.values())
    saes, inputs = {1: [first, second], 3: [second]}, padded_texts(lm)
    hook = lm.model.base_model.register_forward_hook(lambda *_: counted.append(None))
    try:
        texts = lab.probing.ProbingTexts(scale, lm, tmp_path, saes)
        handles = {i: texts.collect(inputs, None, 4, i, "", True) for i in saes}
        found = [len(counted)]
        for layer, of_layer in saes.items():
            for sae in of_layer:
                texts.mean_latents(handles[layer], sae, 5)
        found.append(len(counted))
        again = lab.probing.ProbingTexts(scale, lm, tmp_path, {})
        assert again.collect(inputs, None, 4, 1, "", True) == handles[1]
        assert [*found, len(counted)] == passes  # 7 and 9 texts are two passes each
    finally:
        hook.remove()
    assert texts.latents == {}, "what was handed over is let go"


@torch.no_grad()
def test_word_scores_are_sae_benchs_own_cell_by_cell(trained):
    from sae_bench.evals.absorption import k_sparse_probing as theirs
    from sae_bench.evals.absorption.probing import LinearProbe

    g = torch.Generator().manual_seed(0)
    sae, probe = lab.saved_sae.load_sae(next(iter(trained.saved.values()))), LinearProbe(64, 26)
    x, labels = torch.randn(50, 64, generator=g), [(f"word{i}", i % 26) for i in range(50)]
    probes = {
        k: {
            letter: theirs.KSparseProbe(
                torch.randn(k, generator=g),
                torch.randn((), generator=g),
                torch.randperm(96, generator=g)[:k],
            )
            for letter in range(26)
        }
        for k in (1, 3)
    }
    arguments = sae, probe, probes, labels, x, 16
    expected = theirs.eval_probe_and_sae_k_sparse_raw_scores(*arguments)
    found = lab.bench.k_sparse_scores(*arguments)
    left_out = {name for name in expected if name.endswith("_acts")}
    assert set(found) == set(expected) - left_out
    for name in found:
        if found[name].dtype.kind == "f":
            assert found[name].to_numpy() == pytest.approx(expected[name].to_numpy(), abs=1e-4)
        else:
            assert found[name].tolist() == expected[name].tolist()


def test_the_mean_by_text_is_that_of_the_rows_that_belong_to_it():
    mean = lab.probing.MeanByText(3, 2, torch.device("cpu"))
    mean.add(torch.tensor([0, 2, 2]), torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 0.0]]))
    mean.add(torch.tensor([2, 1]), torch.tensor([[1.0, 9.0], [7.0, 7.0]], dtype=torch.bfloat16))
    assert mean.result().tolist() == [[1.0, 2.0], [7.0, 7.0], [3.0, 3.0]]


def test_several_read_outs_are_scored_in_one_evaluation(evaluated, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("COSINE_SAE_CACHE", str(evaluated.cache))
    folder = tmp_path / "sparse_probing"
    found = lab.probing.evaluate_probing(
        trained.scale, trained.lm, {1: trained.saved}, folder, (0.0, 1.0)
    )
    assert list(found) == [(1, None), (1, 0.0), (1, 1.0)]
    own, cosine, linear = ([lab.results.without_times(r) for r in rs] for rs in found.values())
    assert own == [probing for probing, _ in evaluated.scores]
    for other in (cosine, linear):
        assert [r["eval_result_metrics"]["llm"] for r in other] == [
            r["eval_result_metrics"]["llm"] for r in own
        ]
        assert other != own
    names = {path.name.removesuffix("_custom_sae_eval_results.json") for path in folder.iterdir()}
    assert names == {
        name + end for name in trained.saved for end in ("", "_readout_0", "_readout_1")
    }


# ── Stopped and gone on ─────────────────────────────────────────────────────────────────────────


class Stub:
    """Stands for a part of the evaluation: answers, or is stopped."""

    def __init__(self, answer):
        self.answer, self.calls, self.stopped = answer, 0, False

    def __call__(self, *arguments):
        self.calls += 1
        if self.stopped:
            raise lab.process.Interrupted(15)
        return self.answer(*arguments)


@pytest.fixture
def parts(evaluated, monkeypatch) -> SimpleNamespace:
    """The two halves of SAE-Bench, with the answers that it gave."""
    probing, absorption = zip(*evaluated.scores, strict=True)
    found = SimpleNamespace(
        probing=Stub(lambda *_: {(1, None): list(probing), (1, 1.0): list(probing)[::-1]}),
        absorption=Stub(lambda *_: list(absorption)),
        fidelity=Stub(lab.fidelity.HeldOut),
    )
    monkeypatch.setattr(lab.evaluation, "evaluate_probing", found.probing)
    monkeypatch.setattr(lab.evaluation, "evaluate_absorption", found.absorption)
    monkeypatch.setattr(lab.evaluation, "HeldOut", found.fidelity)
    return found


def evaluate(trained, folder: Path, saved: dict[str, Path]) -> dict:
    return lab.evaluation.evaluate(
        trained.scale, (1.0,), trained.lm, {1: trained.trainer.units}, {1: saved}, trained.heldout,
        trained.records, folder / "checkpoint" / "evaluated", lab.process.Clock(),
    )  # fmt: skip


def calls(parts) -> list[int]:
    return [parts.fidelity.calls, parts.probing.calls, parts.absorption.calls]


def test_an_evaluation_that_is_stopped_goes_on_after_the_parts_that_are_finished(
    trained, parts, tmp_path
):
    whole = evaluate(trained, tmp_path / "whole", trained.saved)
    assert list(whole) == ["tiny layer 1", "tiny layer 1, read out with alpha = 1"]
    assert calls(parts) == [1, 1, 1]
    for stopped in (parts.fidelity, parts.probing, parts.absorption):
        stopped.stopped = True
        with pytest.raises(lab.process.Interrupted):
            evaluate(trained, tmp_path / "stopped", trained.saved)
        stopped.stopped = False
    assert calls(parts) == [3, 3, 2], "each that came to its end was done once more, and only once"
    assert evaluate(trained, tmp_path / "stopped", trained.saved) == whole
    assert calls(parts) == [3, 3, 3]
    assert evaluate(trained, tmp_path / "stopped", trained.saved) == whole
    assert calls(parts) == [3, 3, 3]
    values = whole["tiny layer 1"]["final_info_dict"]
    assert 0 < values["fvu"][0] < 2 and len(set(values["fvu"])) == 2


def test_finished_parts_of_other_weights_are_not_taken_up(trained, parts, tmp_path):
    evaluate(trained, tmp_path, trained.saved)
    changed = {name[:-1] + "x": path for name, path in trained.saved.items()}
    evaluate(trained, tmp_path, changed)
    assert calls(parts) == [2, 2, 2]


# ── Whole runs ──────────────────────────────────────────────────────────────────────────────────


def test_a_model_that_knows_too_few_letters_gives_null_with_a_reason_and_the_run_finishes(
    tmp_path, monkeypatch, capfd
):
    folder = tiny.make_model(tmp_path / "model", knows_letters=False)
    scale = tiny.tiny_scale(folder, tasks=("sentiment",))
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EXPERIMENT_SCALE", "tiny")
    monkeypatch.setitem(lab.scales.SCALES, "tiny", scale)
    with tiny.signals():
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
    return {name: lab.packaged_text.probing_task(name, *sizes) for name in LAPTOP.tasks}


@pytest.mark.parametrize("task", LAPTOP.tasks)
def test_probing_tasks_have_the_sizes_sae_bench_asks_for_and_no_text_twice(probing_texts, task):
    train, test = probing_texts[task]
    assert list(train) == list(test) == list(lab.packaged_text.TASKS[task])
    assert {len(texts) for texts in train.values()} == {LAPTOP.probe_train_set_size // 2}
    assert {len(texts) for texts in test.values()} == {LAPTOP.probe_test_set_size // 2}
    texts = [t for split in (train, test) for found in split.values() for t in found]
    assert max(Counter(" ".join(t.lower().split()) for t in texts).values()) == 1
    assert all(t.strip() and len(t) <= lab.packaged_text.TASK_CHARACTERS for t in texts)


@pytest.mark.parametrize("task", LAPTOP.tasks)
def test_no_two_texts_of_a_probing_task_are_mostly_the_same(probing_texts, task):
    """Of the shorter of any two no more than a third of the runs of 8 words is in the other: a text
    to test probes on is no piece of one they were trained on, nor the other way round."""
    holders: dict[str, list[int]] = defaultdict(list)
    sizes, shared = [], 0
    for text in (t for split in probing_texts[task] for texts in split.values() for t in texts):
        runs = word_runs(text)
        common = Counter(i for run in runs for i in holders[run])
        shared += bool(common)
        for i, count in common.items():
            assert 3 * count <= min(len(runs), sizes[i]), text[:100]
        for run in runs:
            holders[run].append(len(sizes))
        sizes.append(len(runs))
    # The files do hold different cuts of the same pages: the check above is not about nothing.
    assert shared or task in ("sentiment", "news", "headline")


@pytest.mark.parametrize("task", LAPTOP.tasks)
def test_the_texts_of_a_class_come_from_its_file_and_from_no_other_class(probing_texts, task):
    sources = {
        label: {
            (text[150:] if task == "code" else text)[: lab.packaged_text.TASK_CHARACTERS].strip()
            for text, value in lab.packaged_text.sae_probes_rows(number)
            if value == target
        }
        for label, (number, target) in lab.packaged_text.TASKS[task].items()
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
    documents = lab.packaged_text.training_documents(LAPTOP)
    assert len(documents) > 50_000
    assert len(set(documents)) == len(documents)
    assert not any(held & word_runs(text) for text in documents)
    # The rule has work to do: some documents were left out for it.
    everything = {
        t
        for number in lab.packaged_text.PROSE
        for t, _ in lab.packaged_text.sae_probes_rows(number)
    }
    assert 0 < len(everything) - len(documents) < 0.2 * len(everything)


TEXTS_OF_ONE_PROCESS = f"""
import dataclasses, hashlib, sys
sys.path.insert(0, {str(tiny.ROOT)!r})
from lab import packaged_text, scales
packaged_text.PROSE = (57, 98)
scale = dataclasses.replace(scales.SCALES["laptop"], tasks=("sentiment",))
texts = packaged_text.training_documents(scale), packaged_text.probing_task("sentiment", 20, 10)
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
