"""The evaluation as it is here against an earlier commit's, on the same SAEs, scores compared.

    python benchmarks/compare_before.py run_1 --commit 8245da2 --words 4000 32000

Each way runs in a process of its own, on one thread, from a git worktree of its commit, and scores
the SAEs of a finished laptop run: CPU seconds an SAE after the first, absorption at several numbers
of words and sparse probing of some tasks.  The language model is not timed: it reads every word
once, after the same few words before it, and that stands for the word in every prompt.
Writes results/compare_before_<bfloat16 units>.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMIT = "8245da2"


def one_way(run: Path, words: list[int], tasks: list[str], cache: Path) -> dict:
    """Seconds and results of the code on sys.path, by what is scored."""
    import torch

    import experiment
    from lab import saved_sae
    from lab.absorption import evaluate_absorption, first_letter_probes
    from lab.language_model import load_language_model
    from lab.probing import evaluate_probing, probing_artifacts
    from lab.results import without_times
    from lab.scales import SCALES

    torch.set_num_threads(1)
    experiment.register_with_sae_lens()
    saes = {path.name: path for path in sorted((run / "sae").glob("layer_*"))}
    for path in run.glob(
        "sae/layer_*/cfg.json"
    ):  # whichever code trained them: all is timed on the same SAEs
        trained_by = json.loads(path.read_text())["experiment"]
        saved_sae._builds.setdefault(trained_by, experiment.build_sae)
    first, *others = saes
    scale, found = replace(SCALES["laptop"], tasks=tuple(tasks)), {}
    layer = scale.layers[0]
    lm = load_language_model(scale, torch.float32)

    def score(what: str, evaluate) -> None:
        with tempfile.TemporaryDirectory() as folder:
            evaluate({first: saes[first]}, Path(folder) / "first")
            start = time.process_time()
            results = evaluate({name: saes[name] for name in others}, Path(folder) / "others")
            seconds = (time.process_time() - start) / len(others)
        found[what] = {"seconds": seconds, "results": [without_times(r) for r in results]}

    probing_artifacts(scale, lm)
    score("sparse probing", lambda some, folder: next(
        iter(evaluate_probing(scale, lm, {layer: some}, folder).values())))  # fmt: skip
    table = words_read(lm, cache / "words.pt")
    lm.residuals = lambda tokens: dict.fromkeys(lm.layers, table[tokens[:, -1]][:, None])
    lm.identity = lm.identity | {"stands for": "every word read once"}
    for n in words:
        at = replace(scale, absorption_words=n)
        first_letter_probes(at, lm, layer)
        score(f"absorption at {n} words", lambda some, folder, at=at: evaluate_absorption(
            at, lm, layer, some, folder))  # fmt: skip
    return found


def words_read(lm, path: Path):
    """Residuals [vocabulary, D] of every word after an example; NaN for what is no word."""
    import copy

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run of the laptop scale")
    parser.add_argument("--commit", default=COMMIT, help="what `before` is")
    parser.add_argument("--words", type=int, nargs="+", default=[4000, 32000])
    parser.add_argument("--tasks", nargs="+", default=["headline", "occupation"])
    parser.add_argument("--code", type=Path, help=argparse.SUPPRESS)  # of one way, in a process
    options = parser.parse_args()
    run = options.run.absolute()
    cache = Path(os.environ.get("COSINE_SAE_CACHE") or "~/.cache/cosine-sae").expanduser()
    if options.code:
        sys.path[0] = str(options.code)
        print(json.dumps(one_way(run, options.words, options.tasks, cache), default=float))
        return
    import machine

    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        git = ["git", "-C", str(HERE.parent), "worktree"]
        subprocess.run([*git, "add", "--detach", str(before), options.commit], check=True)
        try:
            ways = {}
            for name, code in (("before", before), ("here", HERE.parent)):
                numbers = ["--words", *map(str, options.words), "--tasks", *options.tasks]
                command = [sys.executable, __file__, str(run), "--code", str(code), *numbers]
                threads = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, env=threads, stdout=subprocess.PIPE, check=True)
                ways[name] = json.loads(done.stdout.splitlines()[-1])
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    result = {"run": run.name, "commit": options.commit, "tasks": options.tasks}
    for what, old in ways["before"].items():
        new = ways["here"][what]
        seconds = {"before": old["seconds"], "here": new["seconds"]}
        same = old["results"] == new["results"]
        faster = old["seconds"] / new["seconds"]
        result[what] = seconds | {"times_faster": faster, "same_results": same}
        print(f"{what}: before {seconds['before']:.2f} s, here {seconds['here']:.2f} s an SAE: "
              f"{faster:.1f} times faster; results {'the same' if same else 'DIFFER'}")  # fmt: skip
    machine.write("compare_before", result)


if __name__ == "__main__":
    main()
