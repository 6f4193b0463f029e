"""Scoring alone, one way after the other on the same SAEs: as SAE-Bench comes, before, and here.

    python benchmarks/compare_evaluation.py run_1     # a quarter of an hour, after run_1

    stock   SAE-Bench's own functions, nothing replaced but model, words, texts, folders and seeds
    before  an earlier commit of this program (--commit)
    here    this one

Each way runs in a process of its own, on one thread, and scores SAEs of a finished laptop run: CPU
seconds an SAE after the first, absorption at several numbers of words and sparse probing of some
tasks.  The language model is not timed: it reads every word once, after the same few words before
it, and that stands for the word in every prompt.
Writes results/compare_evaluation_<bfloat16 units>.json.
"""

import argparse
import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMIT = "8245da2"


class Scored:
    """What one way found: {what: {"seconds": an SAE, "results": [of each SAE but the first]}}."""

    def __init__(self, saes: dict[str, Path]):
        self.saes, self.found = saes, {}

    def __call__(self, what: str, evaluate: Callable[[dict, Path], list[dict]]) -> None:
        """`evaluate`: the results of some SAEs, with a folder to write to."""
        from lab.results import without_times

        first, *others = self.saes
        with tempfile.TemporaryDirectory() as folder:
            evaluate({first: self.saes[first]}, Path(folder) / "first")
            start = time.process_time()
            results = evaluate({name: self.saes[name] for name in others}, Path(folder) / "others")
            seconds = (time.process_time() - start) / len(others)
        self.found[what] = {"seconds": seconds, "results": [without_times(r) for r in results]}


def one_way(way: str, run: Path, words: list[int], tasks: list[str], cache: Path) -> dict:
    """The code on sys.path, or SAE-Bench's own with what that code gives it."""
    import torch

    import experiment
    from lab import saved_sae
    from lab.language_model import load_language_model
    from lab.probing import probing_artifacts
    from lab.scales import SCALES

    torch.set_num_threads(1)
    experiment.register_with_sae_lens()
    paths = sorted((run / "sae").glob("layer_*"))[: 2 if way == "stock" else None]
    for path in paths:  # whichever code trained them: all ways score the same SAEs
        trained_by = json.loads((path / "cfg.json").read_text(encoding="utf-8"))["experiment"]
        saved_sae._builds.setdefault(trained_by, experiment.build_sae)
    scored = Scored({path.name: path for path in paths})
    scale = replace(SCALES["laptop"], tasks=tuple(tasks))
    lm = load_language_model(scale, torch.float32)
    score = score_stock if way == "stock" else score_with_ours
    probing_artifacts(scale, lm)
    score(scored, scale, lm, None)
    table = words_read(lm, cache / "words.pt")
    lm.residuals = lambda tokens: dict.fromkeys(lm.layers, table[tokens[:, -1]][:, None])
    lm.identity = lm.identity | {"stands for": "every word read once"}
    for n in words:
        score(scored, replace(scale, absorption_words=n), lm, n)
    return scored.found


def score_with_ours(scored: Scored, scale, lm, words: int | None) -> None:
    """Sparse probing, or with `words` absorption."""
    from lab.absorption import evaluate_absorption, first_letter_probes
    from lab.probing import evaluate_probing

    (layer,) = scale.layers
    if words is None:
        scored("sparse probing", lambda some, folder: next(
            iter(evaluate_probing(scale, lm, {layer: some}, folder).values())))  # fmt: skip
        return
    first_letter_probes(scale, lm, layer)

    def absorption(some: dict[str, Path], folder: Path) -> list[dict]:
        found = evaluate_absorption(scale, lm, layer, some, folder)
        return [its.get("sae_bench", its) for its in found]  # before: SAE-Bench's result alone

    scored(f"absorption at {words} words", absorption)


def score_stock(scored: Scored, scale, lm, words: int | None) -> None:
    """The same by SAE-Bench's own functions."""
    import torch
    from compare_stock import stock
    from test_language_model import hooked_llama

    from lab.absorption import absorption_config, first_letter_probes
    from lab.bench import as_hooked_transformer
    from lab.probing import probing_config
    from lab.saved_sae import load_sae
    from lab.smollm2 import smollm2_folder

    (layer,) = scale.layers
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (work / "absorbed").mkdir()
        if words is None:
            model = hooked_llama(smollm2_folder())
            model.set_tokenizer(lm.tokenizer)
            model.cfg.model_name = lm.name
        else:
            model = as_hooked_transformer(lm, torch.float32)
            shutil.copytree(first_letter_probes(scale, lm, layer), work / "probes")
        absorption, probing = stack.enter_context(stock(scale, lm, model, work))

        def evaluate(some: dict[str, Path], folder: Path) -> list[dict]:
            saes = [(name, load_sae(path)) for name, path in some.items()]
            folder.mkdir()
            if words is None:
                config, artifacts = probing_config(scale, lm), str(work / "artifacts")
                found = probing.run_eval(config, saes, "cpu", str(folder), artifacts_path=artifacts)
            else:
                found = absorption.run_eval(absorption_config(scale, lm), saes, "cpu", str(folder))
            return list(found.values())

        scored("sparse probing" if words is None else f"absorption at {words} words", evaluate)


def words_read(lm, path: Path):
    """Residuals [vocabulary, D] of every word after an example; NaN for what is no word."""
    import torch
    from sae_bench.evals.absorption.vocab import get_alpha_tokens
    from transformers import DynamicCache

    if path.exists():
        return torch.load(path)
    words = get_alpha_tokens(lm.tokenizer)
    tokens = lm.tokenizer(words, add_special_tokens=False).input_ids
    example = torch.tensor([lm.tokenizer("\ncat has the first letter: C\n").input_ids])
    table = torch.full((len(lm.tokenizer), lm.d_in), torch.nan)
    before = DynamicCache()
    with torch.no_grad():
        lm.model.base_model(example, past_key_values=before, use_cache=True)
        for part in torch.tensor(sorted({ids[-1] for ids in tokens})).split(256):
            held = copy.deepcopy(before)
            held.batch_repeat_interleave(len(part))
            lm.model.base_model(part[:, None], past_key_values=held, use_cache=True)
            table[part] = lm._seen[lm.layers[0]][:, -1]
    lm._seen.clear()
    torch.save(table, path)
    return table


def alike(first: dict, second: dict) -> str:
    """How the scores of two ways compare, SAE by SAE."""
    pairs = list(zip(first["results"], second["results"], strict=False))
    if all(a == b for a, b in pairs):
        return "the same to the last digit"
    off = [0.0]
    for a, b in pairs:
        for group, scores in a["eval_result_metrics"].items():
            theirs = b["eval_result_metrics"][group]
            off += [abs(v - theirs[k]) for k, v in scores.items() if v is not None]
    return f"metrics {max(off):.4f} apart at the most"


def ways(run: Path, commit: str, words: list[int], tasks: list[str]) -> dict:
    """{what: CPU seconds an SAE each way, and how the scores compare with those of here}."""
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        git = ["git", "-C", str(HERE.parent), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), commit], check=True)
        found = {}
        try:
            for way, code in (("stock", HERE.parent), ("before", before), ("here", HERE.parent)):
                numbers = ["--words", *map(str, words), "--tasks", *tasks]
                command = [sys.executable, __file__, str(run), "--way", way, "--code", str(code)]
                threads = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(
                    [*command, *numbers], env=threads, stdout=subprocess.PIPE, check=True
                )
                found[way] = json.loads(done.stdout.splitlines()[-1])
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    result = {}
    for what, here in found["here"].items():
        row = result[what] = {way: found[way][what]["seconds"] for way in found}
        for way in ("stock", "before"):
            row[f"scores_{way}"] = alike(found[way][what], here)
            print(
                f"{what}: {way} {row[way]:.2f} s, here {row['here']:.2f} s of one core an SAE: "
                f"{row[way] / row['here']:.1f} times faster; scores {row[f'scores_{way}']}"
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run of the laptop scale")
    parser.add_argument("--commit", default=COMMIT, help="what `before` is")
    parser.add_argument("--words", type=int, nargs="+", default=[4000, 32000])
    parser.add_argument("--tasks", nargs="+", default=["headline", "occupation"])
    parser.add_argument("--way", help=argparse.SUPPRESS)  # one way, in a process of its own
    parser.add_argument("--code", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    run = options.run.absolute()
    if options.way:
        sys.path[0] = str(options.code)
        sys.path += [str(HERE), str(HERE.parent / "tests")]
        cache = Path(os.environ.get("COSINE_SAE_CACHE") or "~/.cache/cosine-sae").expanduser()
        found = one_way(options.way, run, options.words, options.tasks, cache)
        print(json.dumps(found, default=float))
        return
    import machine

    result = {"run": run.name, "commit": options.commit, "tasks": options.tasks}
    result |= ways(run, options.commit, options.words, options.tasks)
    machine.write("compare_evaluation", result)


if __name__ == "__main__":
    main()
