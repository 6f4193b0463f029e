"""The same training by this program, SAELens and sparsify, side by side.

    python benchmarks/compare_training.py                                # 14 to 40 minutes
    python benchmarks/compare_training.py --repetitions 1 --tokens 102400

The work: SmolLM2-135M in bfloat16, residual stream after block 8, contexts of 128 tokens, one SAE
of 2,304 latents, batches of 2,048 tokens, the same documents; from text to a trained SAE, with the
model loaded.  Every training is a process of its own; the contestants take turns, so that a machine
that slows down slows all of them.

    cosine-sae   run_1 with one seed and no kept activations, absorption measured as it goes along
    three-seeds  the same with three seeds, as runs have them: three SAEs in one pass of the text
    sae-lens     LanguageModelSAETrainingRunner, a standard SAE, autocast to bfloat16
    sparsify     its Trainer, a TopK SAE, as it comes (float32)

The peers run in a virtual environment of their own, which this script makes in the cache folder the
first time (sparsify wants no particular torch and would bring another).  Writes
results/compare_training_<bfloat16 units>.json.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAYER, CONTEXT, BATCH, D_SAE, LM_BATCH = 8, 128, 2048, 2304, 32
PEERS = {"sae-lens": "6.54.12", "eai-sparsify": "1.3.3"}


# ── The contestants: each gives the seconds from text to a trained SAE ──────────────────────────


def cosine_sae(model: Path, documents: Path, tokens: int, seeds: int = 1) -> dict:
    """`model` and `documents` are what this program finds in its cache by itself."""
    sys.path.insert(0, str(HERE.parent))
    import experiment
    from lab.absorption import first_letter_probes
    from lab.checkpoints import Checkpoints, Keeper
    from lab.devices import Ranks
    from lab.language_model import load_language_model
    from lab.process import Signals
    from lab.scales import SCALES
    from lab.text import heldout_contexts
    from lab.training_log import TrainingLog

    scale = replace(SCALES["laptop"], n_seeds=seeds, training_tokens=tokens, keep_activations=False)
    lm = load_language_model(scale)
    first_letter_probes(scale, lm, LAYER)  # made once, for all runs
    start = time.perf_counter()
    heldout, first_document = heldout_contexts(scale, lm)
    recipe, run, ranks = experiment.RECIPES["laptop"], experiment.RUNS["run_1"], Ranks()
    trainers, stream = experiment.begun(
        scale, recipe, run, lm, heldout, first_document, ranks, None
    )
    with tempfile.TemporaryDirectory() as folder:
        log = TrainingLog(Path(folder) / "log.jsonl", "run_1", {})
        checkpoints = Checkpoints(Path(folder), {})
        keeper = Keeper(log, checkpoints, Signals(), ranks, scale.checkpoint_seconds)
        experiment.train(scale, trainers, stream, keeper)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": trainers[0].steps_done * BATCH}


def sae_lens(model: Path, documents: Path, tokens: int) -> dict:
    import torch
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        StandardTrainingSAEConfig,
    )

    config = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=576, d_sae=D_SAE, l1_coefficient=1.0),
        model_name=str(model),
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": torch.bfloat16},
        hook_name=f"model.layers.{LAYER}",
        dataset_path="text",
        is_dataset_tokenized=False,
        streaming=False,
        context_size=CONTEXT,
        store_batch_size_prompts=LM_BATCH,
        train_batch_size_tokens=BATCH,
        training_tokens=tokens,
        lr=4e-4,
        autocast=True,
        device="cpu",
        output_path=None,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    texts = Dataset.from_dict({"text": json.loads(documents.read_text(encoding="utf-8"))})
    runner = LanguageModelSAETrainingRunner(config, override_dataset=texts)
    start = time.perf_counter()
    runner.run()
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def sparsify(model: Path, documents: Path, tokens: int) -> dict:
    import torch
    from datasets import Dataset
    from sparsify import SaeConfig, TrainConfig, Trainer
    from sparsify.data import chunk_and_tokenize
    from transformers import AutoModel, AutoTokenizer

    lm = AutoModel.from_pretrained(model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = Dataset.from_dict({"text": json.loads(documents.read_text(encoding="utf-8"))})
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SaeConfig(num_latents=D_SAE, k=36),
            batch_size=BATCH // CONTEXT,
            layers=[LAYER],
            save_dir=folder,
            log_to_wandb=False,
        )
        start = time.perf_counter()
        # Not all documents are tokenised: a token of this text has four characters or five.
        characters, chosen = 0, 0
        while characters < 6 * tokens:
            characters, chosen = characters + len(texts[chosen]["text"]), chosen + 1
        data = chunk_and_tokenize(
            texts.select(range(chosen)), tokenizer, max_seq_len=CONTEXT, num_proc=1
        )
        Trainer(config, data.select(range(tokens // CONTEXT)), lm).fit()
        return {"seconds": time.perf_counter() - start, "tokens": tokens}


CONTESTANTS = {
    "cosine-sae": cosine_sae,
    "three-seeds": partial(cosine_sae, seeds=3),
    "sae-lens": sae_lens,
    "sparsify": sparsify,
}


# ── Turns ───────────────────────────────────────────────────────────────────────────────────────


def peers_python(folder: Path) -> Path:
    """The Python of the peers' own virtual environment, made the first time."""
    python = folder / "bin" / "python"
    if not (folder / "whole").exists():
        print(f"making a virtual environment for {', '.join(PEERS)} (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        same = ("torch", "transformers", "datasets")
        wanted = [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in same]
        wanted += [f"{name}=={version}" for name, version in PEERS.items()]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        (folder / "whole").touch()
    return python


def one_turn(python: Path, name: str, *arguments: object) -> dict:
    """One training in a process of its own; `wall` counts imports and loading as well."""
    start = time.perf_counter()
    command = [str(python), __file__, "--worker", name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"wall": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=183 * BATCH)  # three blocks of text
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--worker", nargs=4, metavar=("NAME", "MODEL", "DOCUMENTS", "TOKENS"))
    options = parser.parse_args()
    if options.worker:
        name, model, documents, tokens = options.worker
        found = CONTESTANTS[name](Path(model), Path(documents), int(tokens))
        print(json.dumps(found))
        return

    # Here, not above: the peers' own environment cannot import what these import.
    import machine

    from lab.packaged_text import packaged_documents
    from lab.scales import SCALES
    from lab.smollm2 import smollm2_folder
    from lab.storage import cache_root

    scale = SCALES["laptop"]
    model = smollm2_folder()
    peers = peers_python(cache_root() / "peers")
    turns: dict[str, list[dict]] = {name: [] for name in options.contestants}
    with tempfile.TemporaryDirectory() as folder:
        documents = Path(folder) / "documents.json"
        documents.write_text(json.dumps(packaged_documents(scale)), encoding="utf-8")
        for repetition in range(options.repetitions):
            order = list(turns) if repetition % 2 == 0 else list(reversed(turns))
            for name in order:
                python = peers if name in ("sae-lens", "sparsify") else Path(sys.executable)
                found = one_turn(python, name, model, documents, options.tokens)
                turns[name].append(found)
                speed = found["tokens"] / found["seconds"]
                print(f"{repetition + 1}: {name:<11} {found['seconds']:6.1f} s "
                      f"{speed:7.0f} tokens/s", flush=True)  # fmt: skip
    medians = {n: statistics.median(t["tokens"] / t["seconds"] for t in turns[n]) for n in turns}
    ratios = {
        name: [
            theirs["seconds"] / theirs["tokens"] * ours["tokens"] / ours["seconds"]
            for ours, theirs in zip(turns["cosine-sae"], turns[name], strict=True)
        ]
        for name in turns
        if name != "cosine-sae" and "cosine-sae" in turns
    }
    for name, speed in medians.items():
        print(f"{name:<11} median {speed:7.0f} tokens/s")
    for name, found in ratios.items():
        print(f"cosine-sae is {statistics.median(found):.2f} times as fast as {name} "
              f"({min(found):.2f} to {max(found):.2f})")  # fmt: skip
    result = {
        "peers": PEERS,
        "tokens": options.tokens,
        "turns": turns,
        "median_tokens_per_second": medians,
        "ratios": ratios,
    }
    machine.write("compare_training", result)


if __name__ == "__main__":
    main()
