"""Means over probing texts are SAE-Bench's own, for all layers and SAEs in one pass."""

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch
from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations as AS_IT_COMES
from safetensors.torch import load_file
from tiny import randn

import lab.probing
from lab import quick_probing
from lab.language_model import LanguageModel
from lab.probing import MeanByText, OnTexts, ProbingTexts, evaluate_probing, latents_held
from lab.process import ExperimentError
from lab.results import without_times
from lab.saved_sae import load_sae, read_out

LABELS = ("a", "b")


@pytest.fixture(scope="module")
def two_layers(tiny_model) -> LanguageModel:
    return LanguageModel.load(tiny_model, "tiny", (1, 3), torch.float32)


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


# What may coincide: BOS, EOS, padding, and the token of unknown words.
COINCIDE = {
    "all differ": ("<s>", "</s>", "<pad>"),
    "pad is BOS": ("<s>", "</s>", "<s>"),
    "pad is EOS": ("<s>", "</s>", "</s>"),
    "pad is unk": ("<s>", "</s>", "<unk>"),
    "BOS is EOS": ("<s>", "<s>", "<pad>"),
    "all are one": ("<s>", "<s>", "<s>"),
}


@torch.no_grad()
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "read again"])
@pytest.mark.parametrize("special", COINCIDE.values(), ids=COINCIDE)
def test_means_are_sae_benchs_own_whichever_special_tokens_coincide(
    trained, two_layers, tmp_path, special, keep, monkeypatch
):
    """Its own functions mask by the tokens themselves; a text may hold any of them anywhere."""
    from sae_bench.sae_bench_utils import activation_collection as theirs

    lm, sae = two_layers, load_sae(next(iter(trained.saved.values())))
    monkeypatch.setattr(lm, "tokenizer", copy.deepcopy(lm.tokenizer))
    lm.tokenizer.bos_token, lm.tokenizer.eos_token, lm.tokenizer.pad_token = special
    bos, _, pad, unk = lm.tokenizer.convert_tokens_to_ids([*special, "<unk>"])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, len(lm.tokenizer), (6, 12), generator=generator)
    tokens[:, 0] = bos
    for row, length in zip(tokens, (12, 12, 9, 5, 3, 2), strict=True):
        row[length:] = pad
    tokens[0, 5], tokens[1, 11], tokens[2, 4:6], tokens[3, 2] = unk, pad, pad, unk
    scale = replace(trained.scale, keep_activations=keep, evaluation_dtype="float32", lm_batch=4)
    texts = ProbingTexts(scale, lm, tmp_path, {1: [sae]})
    handles = texts.collect({"a": {"input_ids": tokens}}, None, 4, 1, "", True)
    acts = lm.residuals(tokens)[1] * theirs.get_bos_pad_eos_mask(tokens, lm.tokenizer)[..., None]
    expected = theirs.create_meaned_model_activations({"a": acts})["a"]
    torch.testing.assert_close(texts.mean_residuals(handles)["a"], expected, rtol=1e-5, atol=1e-5)
    expected = theirs.get_sae_meaned_activations({"a": acts}, sae, 5)["a"]
    found = texts.mean_latents(handles, sae, 5)["a"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_text_without_an_ordinary_token_is_refused_by_its_class(trained, two_layers, tmp_path):
    inputs = padded_texts(two_layers)
    inputs["b"]["input_ids"][4, 1:] = two_layers.tokenizer.eos_token_id
    texts = ProbingTexts(trained.scale, two_layers, tmp_path, {})
    with pytest.raises(ExperimentError, match=r"class 'b' has no ordinary token"):
        texts.collect(inputs, None, 4, 1, "", True)


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
    first, second = (load_sae(path).to(dtype=like) for path in trained.saved.values())
    read_outs = [read_out(first, alpha) for alpha in (0.0, 0.3, 1.0)]
    saes, inputs = {1: [first, *read_outs, second], 3: [second]}, padded_texts(lm)
    texts = ProbingTexts(scale, lm, tmp_path, saes)
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
    assert held.keys() == {"tokens", "means"} | ({"owners", "residuals"} if keep else set())


@torch.no_grad()
@pytest.mark.parametrize(("keep", "passes"), [(True, [4, 4, 4]), (False, [4, 8, 8])])
def test_one_pass_of_the_language_model_serves_all_layers_and_all_saes(
    trained, two_layers, tmp_path, keep, passes
):
    lm, counted = two_layers, []
    scale = replace(trained.scale, keep_activations=keep, lm_batch=5)
    first, second = map(load_sae, trained.saved.values())
    saes, inputs = {1: [first, second], 3: [second]}, padded_texts(lm)
    hook = lm.model.base_model.register_forward_hook(lambda *_: counted.append(None))
    try:
        texts = ProbingTexts(scale, lm, tmp_path, saes)
        handles = {i: texts.collect(inputs, None, 4, i, "", True) for i in saes}
        found = [len(counted)]
        for layer, of_layer in saes.items():
            for sae in of_layer:
                texts.mean_latents(handles[layer], sae, 5)
        found.append(len(counted))
        again = ProbingTexts(scale, lm, tmp_path, {})
        assert again.collect(inputs, None, 4, 1, "", True) == handles[1]
        assert [*found, len(counted)] == passes  # 7 and 9 texts are two passes each
    finally:
        hook.remove()
    assert texts.latents == {}, "what was handed over is let go"


def test_the_mean_by_text_is_that_of_the_rows_that_belong_to_it():
    mean = MeanByText(3, 2, torch.device("cpu"))
    mean.add(torch.tensor([0, 2, 2]), torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 0.0]]))
    mean.add(torch.tensor([2, 1]), torch.tensor([[1.0, 9.0], [7.0, 7.0]], dtype=torch.bfloat16))
    assert mean.result().tolist() == [[1.0, 2.0], [7.0, 7.0], [3.0, 3.0]]


def test_several_read_outs_are_scored_in_one_evaluation(evaluated, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("COSINE_SAE_CACHE", str(evaluated.cache))
    folder = tmp_path / "sparse_probing"
    (alpha, _) = trained.trainer.final_alphas()
    alphas = (0.0, alpha, 1.0)
    found = evaluate_probing(trained.scale, trained.lm, {1: trained.saved}, folder, alphas)
    assert list(found) == [(1, None), (1, 0.0), (1, alpha), (1, 1.0)]
    its = {(1, None): [result["sae_bench"] for result in found[1, None]]}
    own, cosine, again, linear = map(list, (map(without_times, r) for r in (found | its).values()))
    assert own == again == [probing["sae_bench"] for probing, _ in evaluated.scores]
    assert cosine != linear
    scored = {f"sae_top_{k}_test_accuracy" for k in trained.scale.readout_k_values}
    for result in (*cosine, *linear):
        assert list(result["eval_result_metrics"]) == ["sae"], "what is not scored is absent"
        assert set(result["eval_result_metrics"]["sae"]) == scored
        assert all(set(task) == scored | {"dataset_name"} for task in result["eval_result_details"])
    names = {path.name.removesuffix("_custom_sae_eval_results.json") for path in folder.iterdir()}
    assert names == set(trained.saved), "SAE-Bench's files are of whole evaluations"


def test_l0_and_fvu_on_the_texts_are_those_of_the_tokens_one_by_one(trained):
    """In two parts, as they come; outliers are the evaluation's to leave out."""
    sae, x = load_sae(next(iter(trained.saved.values()))), 20 * randn(9, trained.lm.d_in) + 3
    found = OnTexts()
    for some in (x[:2], x[2:]):
        found.add(sae, some, sae.encode(some))
    fired = sum(int((sae.encode(row[None]) > 0).sum()) for row in x)
    error = sum(((row - sae(row[None])[0]) ** 2).sum() for row in x)
    spread = ((x - x.mean(0)) ** 2).sum()
    assert found.result()["l0_on_texts"] == pytest.approx(fired / 9)
    assert found.result()["fvu_on_texts"] == pytest.approx((error / spread).item(), rel=1e-4)


def test_one_token_in_so_many_is_reconstructed_and_no_outlier(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(lab.probing, "EVERY", 2)
    sae, seen = load_sae(next(iter(trained.saved.values()))), []
    rows = torch.arange(8.0)[:, None, None].expand(8, 1, trained.lm.d_in)
    texts = ProbingTexts(
        trained.scale, trained.lm, tmp_path, {1: [sae]}, None, {1: 4.5 * trained.lm.d_in**0.5}
    )
    texts._kept_rows = lambda handle: (1, iter([(torch.zeros(8, dtype=torch.long), rows)]))
    monkeypatch.setattr(OnTexts, "add", lambda self, sae, x, f: seen.append((x, f)))
    texts.mean_latents({"class": "1/some"}, sae, 5)
    ((x, f),) = seen
    assert x[:, 0].tolist() == [0.0, 2.0, 4.0]
    torch.testing.assert_close(f, sae.encode(x))


class FullReadOuts(ProbingTexts):
    """Read-outs scored by SAE-Bench's own functions from where the generator stood when the probes
    of their SAE on few latents began, on all k and beside its own; what they found is kept."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.expected, self.differ = {}, 0

    def one_task(self, theirs, probes, task, config, sae, *rest):
        from sae_bench.evals.sparse_probing import probe_training

        asked, state = self.readouts, []

        def watched(train, test, select_top_k=None, **how):
            if select_top_k == min(self.scale.k_values):
                state[:] = [torch.get_rng_state()]
            return type(probes).__call__(probes, train, test, select_top_k, **how)

        def whole(name, config, one, *more):
            with mock.patch.object(probe_training, "train_probe_on_activations", watched):
                result = theirs(name, config, one, *more)
            after = torch.get_rng_state()
            for swapped in asked.get(id(one), ()):
                held = dict(self.latents)
                means = [self._means(handles, swapped) for handles in self.handles]
                self.latents.update(held)
                torch.set_rng_state(state[0])
                for k in self.scale.k_values:
                    found = AS_IT_COMES(*means, select_top_k=k)[1]
                    self.expected[name, id(swapped), k] = found
            torch.set_rng_state(after)
            return result

        return super().one_task(whole, probes, task, config, sae, *rest)


def test_a_read_out_has_the_values_of_a_full_evaluation_on_its_saes_texts(
    evaluated, trained, tmp_path, monkeypatch
):
    """To the last digit; and no read-out trains a probe on all latents."""
    monkeypatch.setenv("COSINE_SAE_CACHE", str(evaluated.cache))
    scale = replace(trained.scale, k_values=(1, 2, 6))
    assert scale.readout_k_values == (1, 2)
    made, on_all, real = [], [], quick_probing.train_probe_gpu

    def texts(*arguments):
        made.append(FullReadOuts(*arguments))
        return made[-1]

    def counted(*arguments, **how):
        on_all.append(how["dim"])
        return real(*arguments, **how)

    monkeypatch.setattr(lab.probing, "ProbingTexts", texts)
    alone = tmp_path / "alone"
    evaluate_probing(scale, trained.lm, {1: trained.saved}, alone)  # the model's own probes as well
    monkeypatch.setattr(quick_probing, "train_probe_gpu", counted)
    evaluate_probing(scale, trained.lm, {1: trained.saved}, alone)
    without, on_all[:] = len(on_all), []
    evaluate_probing(scale, trained.lm, {1: trained.saved}, tmp_path / "read", (0.0, 1.0))
    assert 0 < without == len(on_all), "probes on all latents are those of the SAEs themselves"
    texts, differ = made[-1], 0
    assert len(texts.read) == len(scale.tasks) * len(trained.saved) * 2
    for (task, swapped), by_k in texts.read.items():
        assert list(by_k) == [1, 2]
        for k, found in by_k.items():
            assert found == texts.expected[task, swapped, k]
            assert all(0 < accuracy <= 1 for accuracy in found.values())
            differ += found != texts.expected[task, swapped, 6]
    assert differ, "or every value would be the same"


def test_no_more_latents_are_held_than_latents_held_says(evaluated, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("COSINE_SAE_CACHE", str(evaluated.cache))
    most, encode = [0], ProbingTexts._encode

    def counted(self, handle):
        encode(self, handle)
        held = sum(t.numel() * t.element_size() for t in self.latents.values())
        most[0] = max(most[0], held)

    monkeypatch.setattr(ProbingTexts, "_encode", counted)
    folder = tmp_path / "sparse_probing"
    evaluate_probing(trained.scale, trained.lm, {1: trained.saved}, folder, (0.0, 1.0))
    assert 0 < most[0] <= latents_held(trained.scale, n_readouts=2)
    one_task = replace(trained.scale, tasks=("news",))  # of four classes, the larger of the two
    assert latents_held(trained.scale, 2) == latents_held(one_task, 2)
