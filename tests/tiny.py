"""A language model so small that the real script runs on it in seconds, and a way to run it.

The embedding of make_model() spells the first letter of every word, so that SAE-Bench's
first-letter probes work and absorption really runs; everything else in it is small and random.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch

import experiment
import lab.absorption
import lab.packaged_text
import lab.process
import lab.scales
import lab.storage

ROOT = Path(experiment.__file__).resolve().parent
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
# A word with the space before it, a line break, or any one character with the space before it.
PIECE = r" ?[A-Za-z]+|\n| ?[^A-Za-z\s]|\s"


def make_tokenizer(folder: Path, per_letter: int = 40):
    """Words of the probing texts, `per_letter` of each first letter, with and without a space.

    The pieces of SAE-Bench's prompts ("\\ncat has the first letter: C") are single tokens, so that
    all prompts are equally long and the word stands at position -6.  Other words are <unk>.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    counts: Counter[str] = Counter()
    for number in (97, 157):  # news articles, reviews
        for text, _ in lab.packaged_text.sae_probes_rows(number)[:600]:
            counts.update(re.findall(PIECE, text))
    words: dict[str, list[str]] = {letter: [] for letter in LETTERS}
    for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        letter = piece.strip()[:1].lower()
        if letter in words and len(words[letter]) < per_letter:
            words[letter].append(piece)
    for letter, found in words.items():  # rare first letters are filled up with made-up words
        made_up = (f"{s}{letter}{a}q{b}" for a in LETTERS for b in LETTERS for s in ("", " "))
        found += [word for word, _ in zip(made_up, range(per_letter - len(found)), strict=False)]
    pieces = [
        *(f" {letter}" for letter in LETTERS.upper()),
        *(" has", " the", " first", " letter"),
        *(space + chr(code) for code in range(33, 127) for space in ("", " ")),
        *"\n\t ",
        *(word for letter in LETTERS for word in words[letter]),
    ]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = [*SPECIAL, *(bytes_of.pre_tokenize_str(piece)[0][0] for piece in pieces)]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECE), "isolated"), bytes_of]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, add_bos_token=True)


def spell_first_letters(model, tokenizer) -> torch.Tensor:
    """Fill a model's embedding at random, but for 26 directions that say a token's first letter.

    Returns the embedding [vocabulary, D]."""
    embedding = model.model.embed_tokens.weight.data.normal_()
    embedding[:, : len(LETTERS)] *= 0.1
    for token, index in tokenizer.vocab.items():
        letter = tokenizer.convert_tokens_to_string([token]).strip()[:1].lower()
        if letter.isalpha() and token not in SPECIAL:
            embedding[index, LETTERS.index(letter)] += 4
    return embedding


def make_model(folder: Path, knows_letters: bool = True) -> Path:
    """Four Llama blocks with small random weights behind an embedding that spells first letters.

    Without `knows_letters` the embeddings of the words change places, so that no probe finds a
    letter.  Returns `folder`, with the weights in float32 and the tokenizer.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
        embedding = spell_first_letters(model, tokenizer)
        if not knows_letters:
            words = embedding[len(SPECIAL) :]
            words.copy_(words[torch.randperm(len(words))])
    with lab.process.quiet_transformers():
        model.save_pretrained(folder)
    return folder


SMALL = {  # any scale, shrunk to a few batches of a tiny model
    "batch_tokens": 256,
    "context_length": 32,
    "heldout_contexts": 16,
    "d_sae": 96,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "target_l0": 8.0,
    "initial_l0": 48.0,
    "block_contexts": 64,
    "lanes": 4,
    "probe_train_set_size": 40,
    "probe_test_set_size": 20,
    "k_values": (1, 2),
    "online_every": 5,
    "online_words": 300,
}


def tiny_scale(folder: Path, **changes) -> lab.scales.Scale:
    """The laptop scale, shrunk."""
    small = SMALL | {
        "name": "tiny",
        "language_model": str(folder),
        "layers": (1,),
        "training_tokens": 20 * 256,
        "n_seeds": 2,
        "tasks": ("sentiment", "news"),
        "absorption_words": None,
    }
    return replace(lab.scales.SCALES["laptop"], **small | changes)


# The real script's main() with the scale given as JSON put among its SCALES.  SAE-Bench's
# absorption spends its time on k-sparse probes for k = 1 .. 10 of 26 letters: here k ends at 2.
DRIVER = """
import json, sys
from functools import partial
from unittest import mock

sys.path.insert(0, {root!r})
import experiment
import lab.evaluation

evaluate_absorption = lab.absorption.evaluate_absorption

def with_few_k(*args):
    from sae_bench.evals.absorption import eval_config, main  # main, before its config is replaced
    config = partial(eval_config.AbsorptionEvalConfig, max_k_value=2)
    with mock.patch.object(eval_config, "AbsorptionEvalConfig", config):
        return evaluate_absorption(*args)

if {few_k!r}:
    lab.evaluation.evaluate_absorption = with_few_k
lists = json.loads({scale!r})
values = {{k: tuple(v) if isinstance(v, list) else v for k, v in lists.items()}}
lab.scales.SCALES[values["name"]] = lab.scales.Scale(**values)
{patch}
sys.exit(experiment.main(sys.argv[1:]))
"""


def start_script(
    *arguments: str,
    scale: lab.scales.Scale,
    cache: Path,
    cwd: Path,
    patch: str = "",
    few_k: bool = True,
    **environment: str,
) -> subprocess.Popen:
    """`python experiment.py *arguments` in a process of its own, at `scale`.

    `patch` is Python executed in that process before main(), with `experiment` in scope.
    """
    driver = DRIVER.format(
        root=str(ROOT), scale=json.dumps(asdict(scale)), patch=patch, few_k=few_k
    )
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("WANDB")}
    ours = {"EXPERIMENT_SCALE": scale.name, "COSINE_SAE_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", driver, *arguments],
        cwd=cwd,
        env=inherited | ours | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen, timeout: float = 600) -> subprocess.CompletedProcess:
    """A started process after its end, with what it printed."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_script(*arguments: str, **how) -> subprocess.CompletedProcess:
    """start_script() to its end."""
    return ended(start_script(*arguments, **how))


@contextlib.contextmanager
def signals() -> Iterator[lab.process.Signals]:
    """Signals(), as main() has it; what handled signals before does so again afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield lab.process.Signals()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Numbers:
    """A tokenizer of texts that are numbers, with no padding."""

    bos_token_id, eos_token_id = -1, -2

    def __call__(self, texts: list[str], add_special_tokens: bool):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[[int(word) for word in text.split()] for text in texts])


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder but locks: {relative path: (SHA-256, modification time in ns)}."""
    return {
        str(path.relative_to(folder)): (lab.storage.file_sha256(path), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and path.name != ".lock"
    }
