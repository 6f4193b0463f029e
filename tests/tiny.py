"""A language model so small that the real script runs on it in seconds, and a way to run it.

The embedding of make_model() spells the first letter of every word, so that SAE-Bench's
first-letter probes work and absorption really runs; everything else in it is small and random.
Below stands what else several files share: signals, files, and texts of numbers with their reader.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import experiment
from lab.absorption import evaluate_absorption
from lab.checkpoints import Checkpoints, Keeper
from lab.devices import Ranks
from lab.identity import experiment_fingerprint
from lab.language_model import load_language_model
from lab.packaged_text import sae_probes_rows
from lab.probing import evaluate_probing
from lab.process import Signals, quiet_transformers
from lab.results import without_times
from lab.saved_sae import save_saes
from lab.scales import SCALES, Scale
from lab.storage import file_sha256
from lab.text import Lane, heldout_contexts
from lab.training_log import TrainingLog

ROOT = Path(experiment.__file__).resolve().parent
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
# A word with the space before it, a line break, or any one character with the space before it.
PIECE = r" ?[A-Za-z]+|\n| ?[^A-Za-z\s]|\s"


def vocabulary(per_letter: int = 40) -> list[str]:
    """Pieces of text: those of SAE-Bench's prompts ("\\ncat has the first letter: C"), and words of
    the probing texts, `per_letter` of each first letter, with and without a space."""
    counts: Counter[str] = Counter()
    for number in (97, 157):  # news articles, reviews
        for text, _ in sae_probes_rows(number)[:600]:
            counts.update(re.findall(PIECE, text))
    words: dict[str, list[str]] = {letter: [] for letter in LETTERS}
    for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        letter = piece.strip()[:1].lower()
        if letter in words and len(words[letter]) < per_letter:
            words[letter].append(piece)
    for letter, found in words.items():  # rare first letters are filled up with made-up words
        made_up = (f"{s}{letter}{a}q{b}" for a in LETTERS for b in LETTERS for s in ("", " "))
        found += [word for word, _ in zip(made_up, range(per_letter - len(found)), strict=False)]
    return [
        *(f" {letter}" for letter in LETTERS.upper()),
        *(" has", " the", " first", " letter"),
        *(space + chr(code) for code in range(33, 127) for space in ("", " ")),
        *"\n\t ",
        *(word for letter in LETTERS for word in words[letter]),
    ]


def make_tokenizer(folder: Path):
    """vocabulary() as single tokens, so that all prompts are equally long and the word stands at
    position -6.  Other words are <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = [*SPECIAL, *(bytes_of.pre_tokenize_str(piece)[0][0] for piece in vocabulary())]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
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
    embedding = model.get_input_embeddings().weight.data.normal_()
    embedding[:, : len(LETTERS)] *= 0.1
    for token, index in tokenizer.vocab.items():
        letter = tokenizer.convert_tokens_to_string([token]).strip()[:1].lower()
        if letter and letter in LETTERS:
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
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


SMALL = {  # any scale, shrunk to a few batches of a tiny model
    "batch_tokens": 256,
    "context_length": 32,
    "heldout_contexts": 16,
    "d_sae": 96,
    "target_l0s": (8.0,),
    "block_contexts": 64,
    "lanes": 4,
    "probe_train_set_size": 40,
    "probe_test_set_size": 20,
    "k_values": (1, 2),
    "online_every": 5,
    "online_words": 300,
}


RECIPE = experiment.Recipe(learning_rate=3e-3, warmup_steps=2)


def tiny_scale(folder: Path, **changes) -> Scale:
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
    return replace(SCALES["laptop"], **small | changes)


def tiny_world(**changes) -> Scale:
    """The scale of known features, shrunk to seconds: one spread of norms, one target, two seeds.

    Its held-out rows leave 90 samples on the rarer side of an edge."""
    small = SMALL | {
        "name": "tiny world",
        "layers": (0,),
        "training_tokens": 400 * 256,
        "n_seeds": 2,
        "d_sae": 64,
        "target_l0s": (8.5,),
        "heldout_contexts": 128,
        "block_contexts": 128,
        "k_values": (1,),
        "online_every": 50,
        "online_words": 1500,
    }
    fields = [name for name in small if not name.startswith("probe_")]
    return replace(SCALES["synthetic"], **{name: small[name] for name in fields} | changes)


def hundred_steps(**changes) -> Scale:
    """100 steps of 10 tokens in 2 lanes, every number that a test uses written out."""
    values = {
        "name": "tiny",
        "language_model": "none",
        "text": "sae-probes",
        "layers": (0,),
        "training_tokens": 1000,
        "batch_tokens": 10,
        "d_sae": 64,
        "n_seeds": 2,
        "target_l0s": (4.0,),
        "lanes": 2,
        "tasks": ("news",),
        "k_values": (1, 2),
    }
    return Scale(**values | changes)


def recipe_of_hundred_steps(**changes) -> experiment.Recipe:
    """The recipe that goes with them, its numbers written out as well."""
    values = {
        "learning_rate": 0.5,
        "warmup_steps": 10,
        "decay_fraction": 0.2,
        "initial_l0_fraction": 1.0,  # 64 of 64
        "tightening_fraction": 0.5,
        "ema_horizon_fraction": 0.05,
    }
    return experiment.Recipe(**values | changes)


# The real script's main() with the scale and the recipe, given as JSON, put among its own.  In
# SAE-Bench's absorption k-sparse probes for k = 1 .. 10 of 26 letters take the time: here k ends
# at 2.  With `quick`, nothing is scored at all.
DRIVER = """
import json, sys
from functools import partial
from unittest import mock

sys.path[:0] = [{script!r}, {root!r}]
import experiment
import lab.absorption, lab.evaluation, lab.features, lab.scales

evaluate_absorption = lab.absorption.evaluate_absorption

def with_few_k(*args):
    from sae_bench.evals.absorption import eval_config, main  # main, before its config is replaced
    config = partial(eval_config.AbsorptionEvalConfig, max_k_value=2)
    with mock.patch.object(eval_config, "AbsorptionEvalConfig", config):
        return evaluate_absorption(*args)

if {few_k!r}:
    lab.evaluation.evaluate_absorption = lab.features.evaluate_absorption = with_few_k

def nothing_scored(scale, alphas, lm, units, saved, heldout, records, work, clock):
    (work / "eval").mkdir(exist_ok=True)
    return {{}}, work / "eval"

if {quick!r}:
    experiment.evaluate, experiment.write_features = nothing_scored, lambda *_: None
    lab.evaluation.probing_artifacts = lambda *_: lab.storage.cache_root()
lists = json.loads({scale!r})
values = {{k: tuple(v) if isinstance(v, list) else v for k, v in lists.items()}}
lab.scales.SCALES[values["name"]] = lab.scales.Scale(**values)
experiment.RECIPES[values["name"]] = experiment.Recipe(**json.loads({recipe!r}))
{patch}
sys.exit(experiment.main(sys.argv[1:]))
"""


def start_script(
    *arguments: str,
    scale: Scale,
    cache: Path,
    cwd: Path,
    patch: str = "",
    few_k: bool = True,
    quick: bool = False,
    recipe: experiment.Recipe = RECIPE,
    script: Path = ROOT,
    **environment: str,
) -> subprocess.Popen:
    """`python experiment.py *arguments` in a process of its own, at `scale`.

    `patch` is Python executed in that process before main(), with `experiment` and `lab`, all of
    its rooms, in scope; `script` the folder of another experiment.py than ours; `quick`: SAEs are
    trained, saved and checked, but not scored.
    """
    driver = DRIVER.format(
        root=str(ROOT),
        script=str(script),
        scale=json.dumps(asdict(scale)),
        recipe=json.dumps(asdict(recipe)),
        patch=patch,
        few_k=few_k,
        quick=quick,
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


# ── Signals, files, numbers ─────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Signals(), as main() has it; what handled signals before does so again afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield Signals()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def stop_me(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder but locks: {relative path: (SHA-256, modification time in ns)}."""
    return {
        str(path.relative_to(folder)): (file_sha256(path), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and path.name != ".lock"
    }


def randn(*shape: int, seed: int = 8) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ── Text in lanes ───────────────────────────────────────────────────────────────────────────────


class Numbers:
    """A tokenizer of texts that are numbers, with no padding."""

    bos_token_id, eos_token_id = -1, -2

    def __call__(self, texts: list[str], add_special_tokens: bool):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[[int(word) for word in text.split()] for text in texts])


def tokens_of(document: int) -> list[int]:
    """No token stands twice in the text.  Documents are empty, short, and longer than a block."""
    length = random.Random(document).choice([0, 1, 5, 7, 7, 20, 90])
    return [1000 * document + i for i in range(length)]


N_DOCUMENTS = 400
# A block is 2 contexts of 5 tokens from each of 4 lanes; a batch is 2 rows of each.
IN_LANES = Scale(
    "tiny", "none", "sae-probes", (0, 2), 64, batch_tokens=8, context_length=6,
    heldout_contexts=7, lm_batch=3, block_contexts=8, lanes=4, tasks=("news",),
)  # fmt: skip


class ReadingModel:
    """A language model whose residual stream is the token itself; every 17th is an outlier."""

    tokenizer, layers, identity = Numbers(), (0, 2), {"model": "reader"}
    device = torch.device("cpu")

    def __init__(self):
        self.passes = 0

    def is_special(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens < 0

    def residuals(self, tokens_BL: torch.Tensor) -> dict[int, torch.Tensor]:
        self.passes += 1
        x = torch.stack([tokens_BL.float(), torch.where(tokens_BL % 17 == 0, 9.0, 1.0)], dim=-1)
        return {layer: x + layer for layer in self.layers}


def fresh(lanes: tuple[int, ...], first: int = 3) -> dict[int, Lane]:
    return {i: Lane(first, []) for i in lanes}


def in_pairs(items: list) -> list[tuple]:
    return list(zip(items[::2], items[1::2], strict=True))


# ── Saved SAEs, and what SAE-Bench says of them ─────────────────────────────────────────────────


def trained(model: Path, folder: Path) -> SimpleNamespace:
    """Two SAEs of the tiny model, trained through experiment's own functions and saved."""
    # Alphas strictly inside (0, 1) and a long average: nothing of the export is trivial.
    run = experiment.Run("for these tests", alpha_start=0.1, alpha_end=0.6, ema=True)
    # Loose enough for latents to share a letter between them: absorption has something to find.
    scale = tiny_scale(model, training_tokens=60 * 256, target_l0s=(36.0,))
    recipe = replace(RECIPE, ema_horizon_fraction=0.3)
    with mock.patch.dict(os.environ, COSINE_SAE_CACHE=str(folder / "cache")), signals() as stop:
        lm = load_language_model(scale)
        heldout, first_document = heldout_contexts(scale, lm)
        log = TrainingLog(folder / "training_log.jsonl", "run", {})
        parts = experiment.begun(scale, recipe, run, lm, heldout, first_document, Ranks(), None)
        checkpoints = Checkpoints(folder / "checkpoint", {})
        experiment.train(scale, *parts, Keeper(log, checkpoints, stop, Ranks(), seconds=1e9))
        settings = {"run": asdict(run), "recipe": asdict(recipe)}
        experiment.register_with_sae_lens()
        code = experiment_fingerprint(experiment.__file__)
        (saved,) = save_saes(scale, lm, parts[0], folder / "sae", "run_1", code, settings).values()
    return SimpleNamespace(
        scale=scale,
        run=run,
        lm=lm,
        recipe=recipe,
        trainer=parts[0][0],
        saved=saved,
        heldout=heldout,
        records=log.records,
    )


def scores(trained, saved: dict[str, Path], folder: Path) -> list[tuple]:
    """The two halves' results for each saved SAE, less the time of day."""
    both = trained.scale, trained.lm
    probing = evaluate_probing(*both, {1: saved}, folder / "sparse_probing")
    absorption = evaluate_absorption(*both, 1, saved, folder / "absorption")
    assert list(probing) == [(1, None)]
    absorption = [a | {"sae_bench": without_times(a["sae_bench"])} for a in absorption]
    probing = [p | {"sae_bench": without_times(p["sae_bench"])} for p in probing[1, None]]
    return list(zip(probing, absorption, strict=True))


def package_files() -> dict[str, tuple[int, int]]:
    """Size and time of everything in site-packages/sae_bench but compiled bytecode."""
    import sae_bench

    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in Path(sae_bench.__file__).parent.rglob("*")
        if "__pycache__" not in path.parts
    }


def evaluated(trained, folder: Path) -> SimpleNamespace:
    """Both SAEs evaluated with an empty cache, and what lay around before and after."""
    saes = next(iter(trained.saved.values())).parent
    model, cache, cwd = Path(trained.scale.language_model), folder / "cache", folder / "cwd"
    cwd.mkdir()
    before = SimpleNamespace(package=package_files(), saes=tree(saes), model=tree(model))
    with contextlib.chdir(cwd), mock.patch.dict(os.environ, COSINE_SAE_CACHE=str(cache)):
        found = scores(trained, trained.saved, Path("eval"))  # relative to the caller's folder
    after = SimpleNamespace(package=package_files(), saes=tree(saes), model=tree(model))
    return SimpleNamespace(scores=found, before=before, after=after, cwd=cwd, cache=cache)
