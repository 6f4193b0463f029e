"""A whole run at Gemma-2-2B's shape, without the hub: random weights, packaged text and tasks.

    python benchmarks/gemma_shape.py            # on a GPU: ten minutes or so, 6 GB of disk
    python benchmarks/gemma_shape.py --tiny     # the same code at a tiny shape, for a CPU

The scale gemma-2-2b as it is (three layers, nine SAEs, every word of the vocabulary) but for the
model's weights, its tokenizer and vocabulary of words (SmolLM2's), the text, 3 million tokens of
it, and seven packaged tasks.  What comes out of the SAEs means nothing; what it takes does: the
seconds of every part and the most memory, printed and written to
results/gemma_shape_<device>.json.  Nothing is taken from the cache, so all that a first run
prepares is in it.  run_1: with its read-outs.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from gpu_throughput import GEMMA_2_2B, random_model
from machine import slug, target

import experiment
from lab.devices import training_device
from lab.scales import SCALES, Scale
from lab.smollm2 import smollm2_folder
from lab.storage import json_text, versions, write_atomically

RUN = "run_1"
PACKAGED = ("text", "tasks", "probe_train_set_size", "probe_test_set_size")  # as the laptop's
TINY_MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16}
TINY_MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50_000}
TINY = {"layers": (1,), "training_tokens": 8192, "absorption_words": 1500, "n_seeds": 1}
TINY |= {"tasks": ("spam",), "probe_train_set_size": 40, "probe_test_set_size": 40}
TINY |= {"heldout_contexts": 32, "d_sae": 128}


def random_gemma(folder: Path, tiny: bool) -> None:
    """Random weights, and SmolLM2's tokenizer: its vocabulary is the smaller."""
    torch.manual_seed(0)
    config = GEMMA_2_2B | (TINY_MODEL if tiny else {})
    model = random_model(config, training_device(), torch.bfloat16, "eager")
    model.config.bos_token_id, model.config.eos_token_id = 1, 2  # SmolLM2's
    model.save_pretrained(folder)
    smollm2 = smollm2_folder()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / name, folder)


def shaped(scale: Scale, model: Path, tiny: bool) -> Scale:
    changes = {name: getattr(SCALES["laptop"], name) for name in PACKAGED}
    changes |= {"training_tokens": 3_072_000} | (TINY if tiny else {})
    return replace(scale, language_model=str(model), **changes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to test this program")
    chosen = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not (cuda or chosen.tiny):
        parser.error("there is no GPU here: --tiny runs the same code at a tiny shape")
    os.environ["EXPERIMENT_SCALE"] = "gemma-2-2b"
    with tempfile.TemporaryDirectory() as scratch:
        model, out_dir = Path(scratch) / "gemma", Path(scratch) / RUN
        random_gemma(model, chosen.tiny)
        os.environ["COSINE_SAE_CACHE"] = str(Path(scratch) / "cache")
        SCALES["gemma-2-2b"] = shaped(SCALES["gemma-2-2b"], model, chosen.tiny)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        status = experiment.main([f"--out_dir={out_dir}"])
        if status:
            return status
        config = json.loads((out_dir / "config.json").read_text(encoding="utf-8"))
    found = {
        "device": config["device"],
        "run": RUN,
        "seconds": config["seconds"],
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "peak_gpu_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "peak_gpu_memory_kept_gb": torch.cuda.max_memory_reserved() / 1e9 if cuda else None,
        **versions("torch", "transformers"),
    }
    print(json_text(found))
    if not chosen.tiny:
        path = target("gemma_shape", slug(found["device"]))
        write_atomically(path, json_text(found) + "\n")
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
