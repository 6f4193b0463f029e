"""Scoring alone, one way after the other on the same SAEs: as SAE-Bench comes, before, and here.

    python benchmarks/compare_evaluation.py run_1     # a quarter of an hour, after run_1
    python benchmarks/compare_evaluation.py run_1 --readouts     # five minutes, of read-outs alone

    stock   SAE-Bench's own functions, nothing replaced but model, words, texts, folders and seeds
    before  an earlier commit of this program (--commit)
    here    this one

Each way runs in a process of its own, on one thread, and scores SAEs of a finished laptop run: CPU
seconds an SAE after the first, absorption at several numbers of words and sparse probing of some
tasks.  The language model is not timed: it reads every word once, after the same few words before
it, and that stands for the word in every prompt.  With --readouts, before and here alone: sparse
probing of the SAEs and the same with two read-outs of each, in turns; the medians.
Writes results/compare_evaluation_<bfloat16 units>.json; of read-outs
results/compare_evaluation_readouts_<bfloat16 units>.json.
"""

import argparse
import contextlib
import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMIT = "8245da2"
READ_AT, TURNS = (0.0, 1.0), 3


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


def opened(run: Path, tasks: list[str], n_saes: int | None) -> tuple:
    """(the SAEs of a run to be scored, the scale, the language model) on one thread, with the
    probing texts read."""
    import torch

    import experiment
    from lab import saved_sae
    from lab.language_model import load_language_model
    from lab.probing import probing_artifacts
    from lab.scales import SCALES

    torch.set_num_threads(1)
    experiment.register_with_sae_lens()
    paths = sorted((run / "sae").glob("layer_*"))[:n_saes]
    for path in paths:  # whichever code trained them: all ways score the same SAEs
        trained_by = json.loads((path / "cfg.json").read_text(encoding="utf-8"))["experiment"]
        saved_sae._builds.setdefault(trained_by, experiment.build_sae)
    scale = replace(SCALES["laptop"], tasks=tuple(tasks))
    lm = load_language_model(scale, torch.float32)
    probing_artifacts(scale, lm)
    return Scored({path.name: path for path in paths}), scale, lm


def one_way(way: str, run: Path, words: list[int], tasks: list[str], cache: Path) -> dict:
    """The code on sys.path, or SAE-Bench's own with what that code gives it."""
    scored, scale, lm = opened(run, tasks, 2 if way == "stock" else None)
    score = score_stock if way == "stock" else score_with_ours
    score(scored, scale, lm, None)
    table = words_read(lm, cache / "words.pt")
    lm.residuals = lambda tokens: dict.fromkeys(lm.layers, table[tokens[:, -1]][:, None])
    lm.identity = lm.identity | {"stands for": "every word read once"}
    for n in words:
        score(scored, replace(scale, absorption_words=n), lm, n)
    return scored.found


def with_readouts(run: Path, tasks: list[str]) -> dict:
    """{"alone": [CPU seconds an SAE of each turn], "with two": [the same, read out twice]}."""
    from lab.probing import evaluate_probing
    from lab.results import without_times

    scored, scale, lm = opened(run, tasks, None)
    (layer,) = scale.layers
    first, *others = scored.saes
    seconds: dict[str, list[float]] = {"alone": [], "with two": []}
    own: list = []
    with tempfile.TemporaryDirectory() as folder:
        evaluate_probing(scale, lm, {layer: {first: scored.saes[first]}}, Path(folder), READ_AT)
        some = {layer: {name: scored.saes[name] for name in others}}
        for _ in range(TURNS):
            for how, alphas in (("alone", ()), ("with two", READ_AT)):
                start = time.process_time()
                found = evaluate_probing(scale, lm, some, Path(folder), alphas)
                seconds[how].append((time.process_time() - start) / len(others))
                own.append([without_times(r) for r in sae_benchs(found[layer, None])])
    return seconds | {"own scores": own[0], "of every turn": all(one == own[0] for one in own)}


def readouts(run: Path, commit: str, tasks: list[str]) -> dict:
    """What two read-outs cost beside an SAE's own sparse probing, before and here."""
    found = each_way(run, commit, ("before", "here"), ["--tasks", *tasks, "--readouts"])
    result: dict = {"commit": commit, "tasks": tasks, "read out with alpha": READ_AT}
    for way, of_way in found.items():
        alone, both = (statistics.median(of_way[how]) for how in ("alone", "with two"))
        result[way] = {"alone": alone, "two read-outs": both - alone, "share": both / alone - 1}
        result[way] |= {"turns": {how: of_way[how] for how in ("alone", "with two")}}
        print(
            f"{way}: sparse probing {alone:.2f} s of one core an SAE, its two read-outs "
            f"{both - alone:.2f} s more: {both / alone - 1:.0%}"
        )
    result["own scores"] = "the same to the last digit, before and here, alone and with read-outs"
    if not all(of["of every turn"] and of["own scores"] == found["here"]["own scores"]
               for of in found.values()):  # fmt: skip
        result["own scores"] = "differ"
    print(f"the SAEs' own scores: {result['own scores']}")
    return result


def sae_benchs(found: list[dict]) -> list[dict]:
    """Its own results; before, they were all that there was."""
    return [result.get("sae_bench", result) for result in found]


def score_with_ours(scored: Scored, scale, lm, words: int | None) -> None:
    """Sparse probing, or with `words` absorption."""
    from lab.absorption import evaluate_absorption, first_letter_probes
    from lab.probing import evaluate_probing

    (layer,) = scale.layers
    if words is None:
        scored("sparse probing", lambda some, folder: sae_benchs(next(
            iter(evaluate_probing(scale, lm, {layer: some}, folder).values()))))  # fmt: skip
        return
    first_letter_probes(scale, lm, layer)

    def absorption(some: dict[str, Path], folder: Path) -> list[dict]:
        return sae_benchs(evaluate_absorption(scale, lm, layer, some, folder))

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


def each_way(run: Path, commit: str, names: tuple[str, ...], options: list[str]) -> dict:
    """{way: what it prints, as JSON}, each in a process of its own on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        git = ["git", "-C", str(HERE.parent), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), commit], check=True)
        found = {}
        try:
            for way in names:
                code = before if way == "before" else HERE.parent
                command = [sys.executable, __file__, str(run), "--way", way, "--code", str(code)]
                threads = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(
                    [*command, *options], env=threads, stdout=subprocess.PIPE, check=True
                )
                found[way] = json.loads(done.stdout.splitlines()[-1])
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    return found


def ways(run: Path, commit: str, words: list[int], tasks: list[str]) -> dict:
    """{what: CPU seconds an SAE each way, and how the scores compare with those of here}."""
    numbers = ["--words", *map(str, words), "--tasks", *tasks]
    found = each_way(run, commit, ("stock", "before", "here"), numbers)
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
    parser.add_argument("--readouts", action="store_true", help="measure read-outs, nothing else")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # one way, in a process of its own
    parser.add_argument("--code", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    run = options.run.absolute()
    if options.way:
        sys.path[0] = str(options.code)
        sys.path += [str(HERE), str(HERE.parent / "tests")]
        cache = Path(os.environ.get("COSINE_SAE_CACHE") or "~/.cache/cosine-sae").expanduser()
        if options.readouts:
            found = with_readouts(run, options.tasks)
        else:
            found = one_way(options.way, run, options.words, options.tasks, cache)
        print(json.dumps(found, default=float))
        return
    import machine

    if options.readouts:
        found = readouts(run, options.commit, options.tasks)
        machine.write("compare_evaluation_readouts", {"run": run.name} | found)
        return
    result = {"run": run.name, "commit": options.commit, "tasks": options.tasks}
    result |= ways(run, options.commit, options.words, options.tasks)
    machine.write("compare_evaluation", result)


if __name__ == "__main__":
    main()
