"""SAE-Bench as it comes against this program's path to it, on the same SAEs.

    python benchmarks/compare_stock.py run_1           # ten minutes, after run_1 has finished

Both score one SAE after the first, with whatever each keeps between two SAEs kept: absorption with
its first-letter probes trained, sparse probing with the texts' activations stored.  That is what an
SAE costs in a study.  The scores stand side by side.

    stock   SAE-Bench's own functions and a TransformerLens model in float32 (put together by hand:
            SmolLM2 is not in its list); probes, words and texts are this program's, since
            SAE-Bench's own cannot be had without a hub
    here    evaluate_absorption and evaluate_probing of lab/, whose language model reads in
            float32 as well: scores may differ by rounding, and by what near ties decide

Sparse probing is compared on a part of the tasks, since stock reads every text padded to 128 tokens
with the whole model.  Writes results/compare_stock_<bfloat16 units>.json.
"""

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
import machine
import torch
from test_language_model import hooked_llama

from experiment import register_with_sae_lens
from lab.absorption import absorption_config, evaluate_absorption, first_letter_probes
from lab.bench import first_letter_words
from lab.language_model import LanguageModel, load_language_model
from lab.packaged_text import TASKS, task_of_pairs
from lab.probing import evaluate_probing, probing_artifacts, probing_config
from lab.saved_sae import load_sae
from lab.scales import SCALES, Scale
from lab.seeds import seed_everything
from lab.smollm2 import smollm2_folder


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


@contextlib.contextmanager
def stock(scale: Scale, lm: LanguageModel, hooked, work: Path) -> Iterator:
    """SAE-Bench's modules with nothing replaced but model, words, texts, folders and seeds."""
    from sae_bench.evals.absorption import common, feature_absorption
    from sae_bench.evals.absorption import main as absorption
    from sae_bench.evals.sparse_probing import main as probing
    from sae_bench.sae_bench_utils import activation_collection, dataset_info, dataset_utils

    def seeded(function: Callable, name: str, **fixed) -> Callable:
        """With the seed that lab/bench.py sets before the same step."""

        def call(*args, **kwargs):
            seed_everything("evaluation", scale.evaluation_seed, name)
            return function(*args, **kwargs, **fixed)

        return call

    words = first_letter_words(scale, lm)
    loader = mock.Mock(from_pretrained_no_processing=lambda *_, **__: hooked)
    k_sparse, absorbed = (
        absorption.run_k_sparse_probing_experiment,
        absorption.run_feature_absortion_experiment,
    )
    patches = [
        (absorption, "HookedTransformer", loader),
        (probing, "HookedTransformer", loader),
        (common, "get_alpha_tokens", lambda *_, **__: list(words)),
        (feature_absorption, "get_alpha_tokens", lambda *_, **__: list(words)),
        (dataset_utils, "get_multi_label_train_test_data", task_of_pairs),
        (absorption, "run_k_sparse_probing_experiment",
         seeded(k_sparse, k_sparse.__name__, probes_dir=work / "probes",
                experiment_dir=work / "k_sparse")),
        (absorption, "run_feature_absortion_experiment",
         seeded(absorbed, absorbed.__name__, probes_dir=work / "probes",
                sparse_probing_experiment_dir=work / "k_sparse",
                experiment_dir=work / "absorption")),
        (probing, "get_dataset_activations",
         seeded(probing.get_dataset_activations, "get_dataset_activations")),
        (activation_collection, "create_meaned_model_activations",
         seeded(activation_collection.create_meaned_model_activations, "mean_residuals")),
        (activation_collection, "get_sae_meaned_activations",
         seeded(activation_collection.get_sae_meaned_activations, "mean_latents")),
    ]  # fmt: skip
    classes = {name: list(TASKS[name]) for name in scale.tasks}
    with contextlib.ExitStack() as stack:
        for module, name, value in patches:
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(mock.patch.dict(dataset_info.chosen_classes_per_dataset, classes))
        stack.enter_context(contextlib.chdir(work))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield absorption, probing


def stock_scores(scale, lm, hooked, saes: dict[str, Path], layer: int) -> dict:
    """Seconds and results of each SAE in turn: {"absorption"|"sparse_probing": [(s, result)]}."""
    config = absorption_config(scale, lm)  # with its quicker setting
    found: dict[str, list] = {"absorption": [], "sparse_probing": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "absorbed").mkdir()
        # Its first-letter probes, trained and stored by its own functions.
        shutil.copytree(first_letter_probes(scale, lm, layer), work / "probes")
        with stock(scale, lm, hooked, work) as (absorption, probing):
            for i, (name, path) in enumerate(saes.items()):
                sae = [(name, load_sae(path))]
                run = lambda: probing.run_eval(  # noqa: E731
                    probing_config(scale, lm), sae, "cpu", str(work / "results"),  # noqa: B023
                    artifacts_path=str(work / "artifacts"))  # fmt: skip
                found["sparse_probing"].append(timed(run))
                if i:  # its probes are there already: every SAE is one after the first
                    run = lambda: absorption.run_eval(config, sae, "cpu", str(work / "absorbed"))  # noqa: B023, E731
                    found["absorption"].append(timed(run))
    return found


def scores_here(scale, lm, saes: dict[str, Path], layer: int) -> dict:
    found: dict[str, list] = {"absorption": [], "sparse_probing": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in saes.items():
            one, where = {name: path}, Path(folder) / name
            found["sparse_probing"].append(
                timed(lambda: evaluate_probing(scale, lm, {layer: one}, where))  # noqa: B023
            )
            found["absorption"].append(
                timed(lambda: evaluate_absorption(scale, lm, layer, one, where))  # noqa: B023
            )
    return found


def only(results: object) -> dict:
    """The one SAE's result out of any of the shapes above."""
    while not (isinstance(results, dict) and "eval_result_metrics" in results):
        (results,) = results.values() if isinstance(results, dict) else results
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run of the laptop scale")
    parser.add_argument("--tasks", nargs="+", default=["headline"])
    options = parser.parse_args()
    laptop = SCALES["laptop"]
    scale, layer = replace(laptop, tasks=tuple(options.tasks)), laptop.layers[0]
    saes = {
        path.name: path for path in sorted((options.run.absolute() / "sae").glob("layer_*"))[:2]
    }
    lm = load_language_model(scale)
    probing_artifacts(scale, lm)
    register_with_sae_lens()

    here = scores_here(scale, lm, saes, layer)
    hooked = hooked_llama(smollm2_folder())
    hooked.set_tokenizer(lm.tokenizer)
    hooked.cfg.model_name = lm.name
    theirs = stock_scores(scale, lm, hooked, saes, layer)
    result = {"run": options.run.name, "tasks": options.tasks, "threads": torch.get_num_threads()}
    for kind, group in (("sparse_probing", "sae"), ("absorption", "mean")):
        (mine, my_scores), (its, its_scores) = here[kind][-1], theirs[kind][-1]
        mine_only, its_only = only(my_scores), only(its_scores)
        pairs = {
            name: [its_only["eval_result_metrics"][group][name], value]
            for name, value in mine_only["eval_result_metrics"][group].items()
            if value is not None
        }
        result[kind] = {
            "seconds_stock": its,
            "seconds_here": mine,
            "times_faster": its / mine,
            "scores_stock_and_here": pairs,
        }
        if kind == "absorption":
            letters = [
                {d["first_letter"]: d["full_absorption_rate"] for d in r["eval_result_details"]}
                for r in (its_only, mine_only)
            ]
            result[kind]["letters_stock_and_here"] = {
                letter: [rates.get(letter) for rates in letters]
                for letter in sorted({*letters[0], *letters[1]})
            }
        print(f"{kind}: stock {its:.1f} s, here {mine:.1f} s: {its / mine:.1f} times faster")
        for name, (a, b) in pairs.items():
            print(f"  {name}: stock {a:.4f}, here {b:.4f}")
    machine.write("compare_stock", result)


if __name__ == "__main__":
    main()
