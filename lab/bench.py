"""SAE-Bench with our model, folders, seeds, tasks and vocabulary around it."""

import contextlib
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file

from lab import quick_absorption, quick_k_sparse, quick_probing
from lab.hub import copy_of, files_in, missing_files, unreachable
from lab.language_model import LanguageModel
from lab.packaged_text import TASKS, task_of_pairs
from lab.process import first_line, require, say
from lab.scales import Scale
from lab.seeds import generators, seed_everything, seed_for, set_generators
from lab.storage import cached, disjoint, save_tensors, tensor_sha256, versions


def as_hooked_transformer(lm: LanguageModel, dtype: torch.dtype):
    """The language model as SAE-Bench's absorption wants it: a HookedTransformer (it checks).

    Absorption asks for prompts and reads one position near their end, so that is all it is given
    (NaN at the positions after it), and what comes after is not read by the model.  All layers are
    kept in the cache: once the seed is fixed, the same prompts are asked at every layer and by
    every run.
    """
    from transformer_lens import HookedTransformer

    unread = 5  # tokens at the end of a prompt: SAE-Bench's prompt_token_pos is -6

    class CutModel(HookedTransformer):
        def __init__(self):
            torch.nn.Module.__init__(self)  # none of HookedTransformer's own weights
            self.cfg = SimpleNamespace(model_name=lm.name, d_model=lm.d_in, n_ctx=2048)
            self.tokenizer = lm.tokenizer

        def to(self, *args, **kwargs):
            return self

        def to_tokens(self, text, **_) -> torch.Tensor:
            texts = [text] if isinstance(text, str) else list(text)
            return lm.tokenizer(texts, return_tensors="pt", padding=True).input_ids

        def run_with_cache(self, prompts, names_filter=None, **_):
            tokens = prompts if isinstance(prompts, torch.Tensor) else self.to_tokens(prompts)

            def build(folder: Path) -> None:
                found = lm.residuals(tokens[:, :-unread])
                acts = {
                    f"blocks.{layer}.hook_resid_post": of_layer[:, -1:].cpu().contiguous()
                    for layer, of_layer in found.items()
                }
                save_tensors(acts, folder / "prompts.safetensors")

            digest = tensor_sha256(tokens)
            prompts = {"tokens": digest, "shape": tokens.shape, "unread": unread}
            key = disjoint(lm.identity, prompts, layers=lm.layers)
            acts = load_file(cached("prompts", key, build) / "prompts.safetensors")
            padded = partial(torch.nn.functional.pad, pad=(0, 0, 0, unread), value=math.nan)
            return None, {n: padded(a.to(lm.device, dtype)) for n, a in acts.items()}

    return CutModel()


# As codeparrot/github-code's own loading script tells languages: by a file's suffix.
CODE_SUFFIXES = {
    "C": (".c", ".h"),
    "Python": (".py",),
    "HTML": (".html",),
    "Java": (".java",),
    "PHP": (".php", ".php3", ".php4", ".php5", ".phps", ".phpt"),
}


def load_data_only(name: str, *args, trust_remote_code: bool = False, languages=None, **how):
    """datasets.load_dataset as SAE-Bench calls it, but no code from the hub is ever executed.

    SAE-Bench asks so for one dataset, github-code, whose script only adds each file's language:
    here its parquet files are read instead, in the same order, and the language is added.  Where
    there is no network, what the hub's client keeps of a dataset is read.
    """
    from datasets import load_dataset

    def load(dataset: str, root: str):
        if languages is None:
            return load_dataset(dataset, *args, **how)
        return load_dataset("parquet", data_files=f"{root}/data/train-*.parquet", **how)

    try:
        rows = load(name, f"hf://datasets/{name}")
    except Exception as error:
        if not unreachable(error):
            raise
        folder, lacking = copy_of(name, "dataset"), "no copy is kept here"
        if folder:
            # Of github-code the first files will do; of the others all that there are.
            missing = missing_files(files_in(folder)) if languages is None else []
            lacking = f"the copy on this machine lacks {missing[0]}" if missing else ""
        require(
            not lacking,
            f"the dataset {name} could not be read ({first_line(error)}), and {lacking}: check the "
            "network, then run the same command again",
        )
        say(f"{name}: the copy that the hub's client keeps is read, {folder}")
        rows = load(str(folder), str(folder))
    if languages is None:
        return rows
    return (
        {"code": row["content"], "language": language}
        for row in rows
        for language in languages
        if row["path"].endswith(CODE_SUFFIXES[language])
    )


class InMemory(np.ndarray):
    """What SAE-Bench takes for a np.memmap.  Writing to a real one on a full disk kills the process
    without a word (SIGBUS), and all that is in it is saved elsewhere as well."""

    def __new__(cls, path: str, dtype: str, mode: str, shape: tuple[int, ...]):
        require(mode == "w+", f"{path} is read as a np.memmap while SAE-Bench runs: not expected")
        return np.zeros(shape, dtype).view(cls)

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def sae_bench(
    scale: Scale,
    lm: LanguageModel,
    folder: Path | None = None,
    probes: Path | None = None,
    texts=None,
    of_words: quick_absorption.AbsorptionOfWords | None = None,
) -> Iterator[SimpleNamespace]:
    """SAE-Bench's modules with our model, folders, seeds, tasks and vocabulary around them.

    Every substitution is made here and undone on leaving; so are the generators, the gradient mode
    and the working folder, which SAE-Bench writes into.  Its results go to `folder`, what it prints
    to sae_bench.log beside that; without `folder`, both are thrown away.  With `texts`
    (ProbingTexts) sparse probing asks that for means instead of keeping every token's residuals;
    with `of_words` absorption asks that for the words of a layer.

    Seeds are set again before every step that draws: whether an earlier step came from a cache must
    not change the scores.
    """
    from sae_bench.evals.absorption import common, feature_absorption, k_sparse_probing
    from sae_bench.evals.absorption import main as absorption
    from sae_bench.evals.absorption import probing as absorption_probing
    from sae_bench.evals.sparse_probing import main as probing
    from sae_bench.evals.sparse_probing import probe_training
    from sae_bench.sae_bench_utils import activation_collection, dataset_info, dataset_utils

    seed, dtype = scale.evaluation_seed, getattr(torch, scale.evaluation_dtype)
    if lm.dtype != dtype:  # SAE-Bench would note down another dtype than is read
        raise ValueError(f"the language model reads in {lm.dtype}, and scores are to be in {dtype}")

    def seeded(function: Callable, **fixed_arguments) -> Callable:
        def call(*args, **kwargs):
            seed_everything("evaluation", seed, function.__name__)
            return function(*args, **kwargs, **fixed_arguments)

        return call

    model = as_hooked_transformer(lm, dtype)
    ours = SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: model)
    words = first_letter_words(scale, lm)
    before = generators()
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder.absolute() if folder else work / "results"
        folder.mkdir(parents=True, exist_ok=True)
        log = folder.parent / "sae_bench.log"
        sink = stack.enter_context(log.open("a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        stack.enter_context(contextlib.chdir(work))
        stack.enter_context(torch.enable_grad())

        def substitute(module, **names) -> None:
            for name, value in names.items():
                stack.enter_context(mock.patch.object(module, name, value))

        folders = {"probes_dir": probes, "experiment_dir": work / "k_sparse"}
        substitute(
            absorption,
            HookedTransformer=ours,
            run_k_sparse_probing_experiment=seeded(
                absorption.run_k_sparse_probing_experiment, **folders
            ),
            run_feature_absortion_experiment=seeded(
                absorption.run_feature_absortion_experiment,
                probes_dir=probes,
                sparse_probing_experiment_dir=work / "k_sparse",
                experiment_dir=work / "absorption",
            ),
        )
        faster = (
            quick_k_sparse.train_k_sparse_probes,
            quick_k_sparse.eval_probe_and_sae_k_sparse_raw_scores,
            quick_k_sparse.sae_k_sparse_metadata,
            quick_k_sparse.build_metrics_df,
        )
        substitute(k_sparse_probing, **{made.__name__: made for made in faster})
        # The same words for every SAE of a layer.
        once = cache(common.load_probe_data_split_or_train)
        substitute(k_sparse_probing, load_probe_data_split_or_train=once)
        if of_words:
            found = of_words.calculate_projection_and_cos_sims
            substitute(feature_absorption, calculate_projection_and_cos_sims=found)
        substitute(common, _parse_probe_data_split=quick_absorption._parse_probe_data_split)
        substitute(absorption_probing, DataLoader=quick_k_sparse.in_whole_batches)
        probes_of = quick_probing.ProbesOnActivations(probe_training.train_probe_on_activations)
        substitute(
            probe_training,
            train_probe_gpu=quick_probing.train_probe_gpu,
            train_probe_on_activations=probes_of,
        )
        for module in (common, feature_absorption):
            substitute(module, get_alpha_tokens=lambda *_, **__: list(words))
        substitute(
            probing,
            HookedTransformer=ours,
            get_dataset_activations=seeded(probing.get_dataset_activations),
        )
        if texts:
            substitute(
                activation_collection,
                get_all_llm_activations=texts.collect,
                create_meaned_model_activations=seeded(texts.mean_residuals),
                get_sae_meaned_activations=seeded(texts.mean_latents),
            )
            one_task = partial(texts.one_task, probing.run_eval_single_dataset, probes_of)
            substitute(probing, run_eval_single_dataset=one_task)
        substitute(dataset_utils, load_dataset=load_data_only)
        substitute(np, memmap=InMemory)
        local = {name: list(TASKS[name]) for name in scale.tasks if name in TASKS}
        read = dataset_utils.get_multi_label_train_test_data
        if local:
            stack.enter_context(mock.patch.dict(dataset_info.chosen_classes_per_dataset, local))
            read = task_of_pairs
        # A task's texts are asked for once a layer, one after the other.
        substitute(dataset_utils, get_multi_label_train_test_data=lru_cache(maxsize=1)(read))
        try:
            yield SimpleNamespace(
                absorption=absorption, probing=probing, common=common, model=model, folder=folder
            )
        finally:
            set_generators(before)


def first_letter_words(scale: Scale, lm: LanguageModel) -> list[str]:
    """SAE-Bench's vocabulary of alphabetic tokens, sampled to absorption_words.

    Sorted first: a tokenizer's own order changes from process to process.  Raises ExperimentError
    where they are too few: SAE-Bench scores nothing unless 20 letters have a good probe, and a
    fifth of a letter's words is all that its probe is judged on.
    """
    from sae_bench.evals.absorption.vocab import get_alpha_tokens

    words = sorted(set(get_alpha_tokens(lm.tokenizer)))
    if scale.absorption_words is not None and scale.absorption_words < len(words):
        words = random.Random(seed_for("words")).sample(words, scale.absorption_words)
    letters = Counter(word.strip()[0].lower() for word in words)
    enough, none = sum(n >= 10 for n in letters.values()), sorted({*ascii_lowercase} - {*letters})
    require(
        enough >= 20 and not none,
        f"absorption_words={scale.absorption_words} gives {len(words)} words of {lm.name}'s "
        f"vocabulary, and only {enough} letters have 10 of them"
        + (f", {', '.join(none)} none" if none else "")
        + ": absorption needs 20 such letters and a word of each; raise absorption_words (None "
        "takes all), or choose a model that knows more words",
    )
    return words


def evaluation_key(scale: Scale, lm: LanguageModel) -> dict:
    """What the language-model half of an evaluation depends on."""
    packages = ("sae-bench", "sae-probes", "scikit-learn", "numpy")
    scores = {"scores_dtype": scale.evaluation_dtype, "evaluation_seed": scale.evaluation_seed}
    return disjoint(lm.identity, versions(*packages), scores)
