"""How fast a GPU reads Gemma-2-2B, trains SAEs on it, and does both.

    python benchmarks/gpu_throughput.py                        # everything
    python benchmarks/gpu_throughput.py --layers 12 --seeds 3  # a part
    python benchmarks/gpu_throughput.py --minutes 8            # begins nothing new after 8 minutes
    python benchmarks/gpu_throughput.py --check                # do CPU and GPU agree?
    python benchmarks/gpu_throughput.py --tiny [--check]       # the same code, tiny, for a CPU

Needs torch and transformers alone: the weights, in the true shape, and the tokens are random.
For every layer (the model is cut after it), d_sae and number of seeds it measures tokens/s of

    LM      the language model alone, at the fastest of several batches
    SAE     run_1's training alone, on activations that are on the device already
    whole   both, as experiment.py does it: harvest a block, shuffle, step; tokens trained on

each the median of several repetitions after a warm-up, with slowest and fastest beside it in the
JSON; the peak memory of the whole; and its matrix multiplications a second, as a share of what a
square bfloat16 multiplication reaches in the same execution.  Text is not tokenised here: in
experiment.py a thread does that, ahead of the reader.  With --flex, FlexAttention as well, which
has to be compiled first (minutes on a CPU): for the language model, or with --check.

The JSON file is written anew after every configuration, and a later execution adds to it: a part at
a time makes the same file.  With --tiny nothing is written unless --json names a file.
"""

import argparse
import gc
import hashlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch
from machine import slug, target
from online_absorption_cost import made_up_words

import experiment
from lab.activations import (
    Position,
    calibrate,
    first_of,
    harvest,
    residual_blocks,
    shuffled_batches,
    without_outliers,
)
from lab.devices import Ranks, training_device
from lab.language_model import LanguageModel
from lab.online_absorption import OnlineAbsorption
from lab.scales import SCALES, Scale
from lab.storage import json_text, versions, write_atomically
from lab.training_log import settled

GEMMA_2_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256_000,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
}
PUBLISHED = {
    "what": "SAELens, one 80 GB card, hook at L13, d_sae 9216, one SAE",
    "lm_tokens_per_second": [34_000, 38_000],
    "whole_tokens_per_second": 23_000,
}
FLEX = "flex_attention"  # beside eager the one of transformers' that knows soft-capping
TOKENIZER = SimpleNamespace(bos_token_id=2, eos_token_id=1, pad_token_id=0)  # Gemma's numbers
RUN, RECIPE = experiment.RUNS["run_1"], experiment.RECIPES["gemma-2-2b"]


@dataclass(frozen=True)
class Study:
    """What is measured."""

    config: dict  # of the language model
    scale: Scale
    layers: tuple[int, ...]
    d_sae: tuple[int, ...]
    seeds: tuple[int, ...] = (1, 3)
    lm_batches: tuple[int, ...] = (16, 32, 64, 128, 256)  # contexts
    matrix_sizes: tuple[int, ...] = (4096, 8192, 16384)
    repetitions: int = 7
    blocks: int = 4  # of the whole, one repetition each, after one to warm up


FULL = Study(GEMMA_2_2B, SCALES["gemma-2-2b"], (12, 19), (2304, 9216, 16384))
TINY = Study(
    GEMMA_2_2B
    | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 1000}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    replace(SCALES["gemma-2-2b"], batch_tokens=256, context_length=32, block_contexts=64),
    layers=(2, 4),
    d_sae=(96, 128),
    lm_batches=(8, 16, 32),
    matrix_sizes=(256, 512),
    repetitions=3,
    blocks=2,
)


# ── What is measured with ─────────────────────────────────────────────────────────────────────────


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable, device: torch.device, repetitions: int, warm_up: int = 2) -> list[float]:
    """Seconds of each repetition."""
    seconds = []
    for repetition in range(warm_up + repetitions):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if repetition >= warm_up:
            seconds.append(time.perf_counter() - start)
    return seconds


def rate(per_second: list[float]) -> dict:
    """Tokens per second: the median of the repetitions and how far they spread."""
    return {
        "tokens_per_second": statistics.median(per_second),
        "slowest": min(per_second),
        "fastest": max(per_second),
        "repetitions": len(per_second),
    }


def matrix_peak(study: Study, device: torch.device) -> dict:
    """The most FLOP/s that square bfloat16 multiplications reach here."""
    by_size = {}
    for n in study.matrix_sizes:
        a, b, out = (torch.randn(n, n, device=device).bfloat16() for _ in range(3))
        seconds = timed(partial(torch.mm, a, b, out=out), device, 20, warm_up=5)
        by_size[n] = 2 * n**3 / min(seconds)
    size = max(by_size, key=by_size.get)
    return {"size": size, "flops": by_size[size]}


def lm_flops(config: dict, layer: int, length: int) -> int:
    """Of the multiplications for one token, in the blocks up to `layer`.

    Attention counts all `length` positions, those masked out too: they are multiplied as well.
    """
    c = SimpleNamespace(**config)
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    weights = c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size)  # q o, k v, MLP
    scores = 2 * length * queries  # q k^T, and the weights times v
    return 2 * (weights + scores) * (layer + 1)


def sae_flops(d_in: int, d_sae: int, seeds: int) -> int:
    """Of the multiplications that training needs for one token: encode and decode, forward and
    twice backward, less the encoder's gradient by its input."""
    return 5 * 2 * d_in * d_sae * seeds


# ── The parts ─────────────────────────────────────────────────────────────────────────────────────


def random_model(config: dict, device: torch.device, dtype: torch.dtype, attention: str):
    """Gemma-2 with random weights, made where they will be."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    ids = {name: getattr(TOKENIZER, name) for name in ("bos_token_id", "eos_token_id")}
    full = Gemma2Config(**config, **ids, pad_token_id=TOKENIZER.pad_token_id)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(full, dtype=dtype, attn_implementation=attention)


def language_model(model, *layers: int) -> LanguageModel:
    return LanguageModel(model, TOKENIZER, "random Gemma-2", layers, {})


def random_contexts(n: int, length: int, vocabulary: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocabulary, (n, length), generator=generator)  # none is special
    tokens[:, 0] = TOKENIZER.bos_token_id
    return tokens


def read(lm: LanguageModel, contexts: torch.Tensor, batch: int) -> None:
    for part in contexts.split(batch):
        lm.residuals(part)


def lm_rate(lm: LanguageModel, contexts: torch.Tensor, batch: int, repetitions) -> dict:
    seconds = timed(partial(read, lm, contexts, batch), lm.device, repetitions)
    return rate([contexts.numel() / s for s in seconds])


def sweep(lm: LanguageModel, contexts: torch.Tensor, study: Study) -> dict[int, dict]:
    """The language model at every batch that fits."""
    rates = {}
    for batch in study.lm_batches:
        found = lm_rate(lm, contexts, batch, study.repetitions)
        if lm.most_contexts < batch:
            break
        rates[batch] = found
        print(f"  LM at {batch} contexts: {found['tokens_per_second']:,.0f} tokens/s", flush=True)
    return rates


def attention_rates(
    lm: LanguageModel, contexts: torch.Tensor, batch: int, study: Study
) -> dict[str, dict]:
    """The language model with both attentions, as far as they work here."""
    rates, own = {}, lm.model.config._attn_implementation
    for name in ("eager", FLEX):
        try:
            lm.model.set_attn_implementation(name)
            rates[name] = lm_rate(lm, contexts, batch, study.repetitions)
            print(f"  LM with {name}: {rates[name]['tokens_per_second']:,.0f} tokens/s", flush=True)
        except Exception as error:  # it compiles: whatever the compiler and its tools raise
            rates[name] = {"error": first_line(error)}
            print(f"  LM with {name}: {first_line(error)}", flush=True)
    lm.model.set_attn_implementation(own)
    return rates


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def new_trainer(
    scale: Scale, rows: torch.Tensor, recipe: experiment.Recipe = RECIPE
) -> experiment.Trainer:
    """As experiment.begun() makes it, measuring absorption now and then on made-up words."""
    units = calibrate(rows, Ranks())
    trainer = experiment.Trainer(scale, recipe, RUN, scale.layers[0], units, Ranks())
    words = {name: t.to(rows.device) for name, t in made_up_words(scale, rows.shape[1]).items()}
    trainer.online = OnlineAbsorption(words, scale.online_words)
    return trainer


def train(trainer: experiment.Trainer, batches: Iterator[torch.Tensor]) -> None:
    """As experiment.train() does it: numbers leave the device every 10 steps."""
    waiting = []
    for batch in batches:
        waiting.append(trainer.step(batch))
        if len(waiting) == 10:
            settled(waiting)
            waiting = []


def sae_rate(scale: Scale, rows: torch.Tensor, repetitions: int) -> dict:
    """SAE training alone."""
    trainer, size = new_trainer(scale, rows), scale.batch_tokens
    batches = rows[: len(rows) // size * size].split(size)
    seconds = timed(lambda: train(trainer, batches), rows.device, repetitions)
    return rate([len(batches) * size / s for s in seconds])


def whole_rate(scale: Scale, lm: LanguageModel, study: Study) -> dict:
    """Harvest, shuffle and step: a repetition is a block, all of it."""
    vocabulary = study.config["vocab_size"]
    texts = [
        random_contexts(scale.block_contexts, scale.context_length, vocabulary, seed)
        for seed in range(1 + study.blocks)
    ]
    trainers, marks = [], []

    def mark() -> None:
        wait(lm.device)
        marks.append((time.perf_counter(), sum(t.steps_done for t in trainers)))

    def text() -> Iterator[tuple[dict, torch.Tensor]]:
        lanes = dict.fromkeys(range(scale.lanes))
        for contexts in texts:
            mark()  # asked for a block: all steps on the one before are made
            yield lanes, contexts
        mark()

    blocks = residual_blocks(scale, lm, text())
    first = next(blocks)
    trainers.append(new_trainer(scale, first.rows[:, 0]))
    held, first = [first], None
    kept = map(partial(without_outliers, calibrations=[trainers[0].units]), first_of(held, blocks))
    ranks, start = Ranks(), Position(0, 0, {})
    batches = shuffled_batches(scale, kept, ranks, start)
    train(trainers[0], (batch[:, :, 0] for _, batch in batches))
    laps = pairwise(marks[1:])  # the first block warms up
    return rate([(n1 - n0) * scale.batch_tokens / (t1 - t0) for (t0, n0), (t1, n1) in laps])


def configuration(
    study: Study, scale: Scale, lm: LanguageModel, rows: torch.Tensor, lm_found: dict, peak: dict
) -> dict:
    """All figures of one layer, d_sae and number of seeds."""
    cuda = lm.device.type == "cuda"
    sae = sae_rate(scale, rows, study.repetitions)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    whole = whole_rate(scale, lm, study)
    per_lm_token = lm_flops(study.config, scale.layers[0], scale.context_length)
    per_sae_token = sae_flops(lm.d_in, scale.d_sae, scale.n_seeds)
    found = {"lm": lm_found | {}, "sae": sae, "whole": whole}
    # Of the whole every token trained on counts once: BOS and what a block's batches leave over,
    # 1.6% of the text, is work too, but not work that is wanted.
    flops = (per_lm_token, per_sae_token, per_lm_token + per_sae_token)
    for part, per_token in zip(found.values(), flops, strict=True):
        part["tflops"] = part["tokens_per_second"] * per_token / 1e12
        part["share_of_matrix_peak"] = part["tflops"] * 1e12 / peak["flops"]
    speeds = {name: part["tokens_per_second"] for name, part in found.items()}
    return found | {
        "lm_batch": scale.lm_batch,
        "whole_share_of_lm": speeds["whole"] / speeds["lm"],
        # 1: harvesting and shuffling cost nothing beside the two parts, one after the other
        "whole_share_of_parts": speeds["whole"] * (1 / speeds["lm"] + 1 / speeds["sae"]),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "lm_flops_per_token": per_lm_token,
        "sae_flops_per_token": per_sae_token,
        "matrix_peak": peak,
    }


# ── Results ───────────────────────────────────────────────────────────────────────────────────────


def setting_of(study: Study, device: torch.device, attention: str) -> dict:
    """What figures must have in common to stand in one file."""
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else None
    root = Path(experiment.__file__).parent
    files = [root / "experiment.py", *sorted(root.glob("lab/*.py"))]
    code = b"".join(path.read_bytes() for path in files)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "memory_gb": memory,
        "cuda": torch.version.cuda,
        **versions("torch", "transformers"),
        "dtypes": {
            "language_model": "bfloat16",
            "sae_multiplications": study.scale.training_dtype,
            "sae_weights": "float32",
        },
        "attention": attention,
        "language_model": study.config,
        "context_length": study.scale.context_length,
        "batch_tokens": study.scale.batch_tokens,
        "block_contexts": study.scale.block_contexts,
        "run": RUN.title,
        "recipe": asdict(RECIPE),
        "code_sha256": hashlib.sha256(code).hexdigest(),
    }


class Report:
    """The JSON file: what earlier executions measured in the same setting stays in it."""

    def __init__(self, path: Path | None, setting: dict):
        self.path = path
        self.found = {
            "setting": setting,
            "published": PUBLISHED,
            "language_model": {},
            "configurations": {},
        }
        if path and path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["setting"] != json.loads(json.dumps(setting)):
                sys.exit(f"{path} holds figures of another setting: move it away, or use --json")
            self.found = held

    def add(self, part: str, name: str, value: dict) -> None:
        self.found[part][name] = value
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json_text(self.found) + "\n")


HEADER = (
    f"{'':28}{'LM':>11}{'SAE':>11}{'whole':>11}{'spread':>9}{'of LM':>8}{'TFLOP/s':>9}"
    f"{'of peak':>9}{'memory':>10}"
)


def row(name: str, c: dict) -> str:
    speeds = [f"{c[part]['tokens_per_second']:11,.0f}" for part in ("lm", "sae", "whole")]
    whole, memory = c["whole"], c["peak_memory_gb"]
    spread = (whole["fastest"] - whole["slowest"]) / whole["tokens_per_second"]
    return (
        f"{name:28}{''.join(speeds)}{spread:9.1%}{c['whole_share_of_lm']:8.2f}"
        f"{whole['tflops']:9.3g}{whole['share_of_matrix_peak']:9.1%}"
        + (f"{'-':>10}" if memory is None else f"{memory:7.1f} GB")
    )


def published_row() -> str:
    low, high = PUBLISHED["lm_tokens_per_second"]
    whole = PUBLISHED["whole_tokens_per_second"]
    lm, share = f"{low // 1000}-{high // 1000} k", f"{whole / high:.2f}-{whole / low:.2f}"
    return f"{'published: L13 d9216 seeds 1':28}{lm:>11}{'-':>11}{whole:11,}{'-':>9}  {share}"


def measure(
    study: Study,
    device: torch.device,
    attention: str,
    compare_attention: bool,
    report: Report,
    until: float,
) -> None:
    """Everything, a configuration at a time."""
    peak = matrix_peak(study, device)
    print(f"matrix peak: {peak['flops'] / 1e12:.3g} TFLOP/s at {peak['size']}", flush=True)
    for layer in study.layers:
        if time.monotonic() > until:
            print(f"no time left for L{layer} and what follows it")
            return
        print(f"L{layer}", flush=True)
        lm = language_model(random_model(study.config, device, torch.bfloat16, attention), layer)
        n = max(study.lm_batches)
        scale = replace(study.scale, layers=(layer,))
        contexts = random_contexts(n, scale.context_length, study.config["vocab_size"], seed=99)
        rates = sweep(lm, contexts, study)
        batch = max(rates, key=lambda b: rates[b]["tokens_per_second"])
        entry = {"best_batch": batch, "by_batch": rates, "by_attention": None, "matrix_peak": peak}
        report.add("language_model", f"L{layer}", entry)
        rows = harvest(lm, contexts, batch)[:, 0]
        print(HEADER)
        for d_sae in study.d_sae:
            for seeds in study.seeds:
                name = f"L{layer} d{d_sae} seeds {seeds}"
                if time.monotonic() > until:
                    print(f"no time left for {name} and what follows it")
                    return
                own = replace(scale, lm_batch=batch, d_sae=d_sae, n_seeds=seeds)
                found = configuration(study, own, lm, rows, rates[batch], peak)
                report.add("configurations", name, found)
                print(row(name, found), flush=True)
        if compare_attention:  # last: its compilation may take its time
            entry["by_attention"] = attention_rates(lm, contexts, batch, study)
            report.add("language_model", f"L{layer}", entry)
        del lm, rows  # before the next is made
        gc.collect()


# ── Do CPU and GPU agree? ─────────────────────────────────────────────────────────────────────────

SMALL = GEMMA_2_2B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "vocab_size": 1000,
}
CPU = torch.device("cpu")


def small_residuals(
    contexts: torch.Tensor, device: torch.device, attention: str, sharpen: float = 1.0, **changes
) -> torch.Tensor:
    """Of a small Gemma-2 in float32, after every layer [N, L, layers, D], on the CPU: the same
    weights every time.  `sharpen` multiplies queries and keys."""
    torch.manual_seed(0)
    model = random_model(SMALL | changes, CPU, torch.float32, attention)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.mul_(sharpen)
            block.self_attn.k_proj.weight.mul_(sharpen)
    lm = language_model(model.to(device), *range(SMALL["num_hidden_layers"]))
    return torch.stack([r.cpu() for r in lm.residuals(contexts).values()], dim=2)


def small_losses(rows: torch.Tensor, device: torch.device, steps: int = 20) -> torch.Tensor:
    """Losses [steps, seeds] of SAE training in float32 on the same batches."""
    scale = replace(
        SCALES["gemma-2-2b"],
        layers=(1,),
        d_sae=512,
        n_seeds=2,
        batch_tokens=256,
        training_tokens=256 * steps,
        training_dtype="float32",
    )
    recipe = replace(RECIPE, learning_rate=3e-3, warmup_steps=2)
    with mock.patch.object(experiment, "training_device", lambda: device):
        trainer = new_trainer(scale, rows.to(device), recipe)
        batches = rows.split(scale.batch_tokens)[:steps]
        return torch.stack([trainer.step(batch.to(device))["loss"].cpu() for batch in batches])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def check(device: torch.device, attentions: list[str]) -> bool:
    """Prints what it compares; whether all is well."""
    if device == CPU:
        print("there is no GPU: the CPU is compared with itself")
    contexts = random_contexts(48, 128, SMALL["vocab_size"], seed=0)
    expected = small_residuals(contexts, CPU, "eager")
    error = relative(small_residuals(contexts, device, "eager"), expected)
    print(f"residuals, float32: relative error {error:.1e} (at most 1e-4)")
    rows = expected[:, 1:, 1].flatten(0, 1)  # less BOS, after block 1
    on_cpu, here = small_losses(rows, CPU), small_losses(rows, device)
    loss_error = ((here - on_cpu).abs() / on_cpu).max().item()
    print(
        f"losses of {len(on_cpu)} SAE steps, float32: greatest relative difference "
        f"{loss_error:.1e} (at most 1e-3)"
    )
    # With scores far above the cap of 50 the cap decides what attention sees.
    few, sharpen = contexts[:8], 32.0
    capped = small_residuals(few, CPU, "eager", sharpen)
    uncapped = small_residuals(few, CPU, "eager", sharpen, attn_logit_softcapping=None)
    print(f"soft-capping: the cap moves residuals by {relative(uncapped, capped):.2f}")
    good = error <= 1e-4 and loss_error <= 1e-3
    for name in attentions:
        found = small_residuals(few, device, name, sharpen)
        with_it, without = relative(found, capped), relative(found, uncapped)
        in_effect = with_it < 0.1 * without
        good = good and in_effect
        print(
            f"  {name}: {with_it:.1e} from eager on the CPU with it, {without:.1e} from that "
            f"without: {'in effect' if in_effect else 'NOT IN EFFECT'}"
        )
    print("good" if good else "NOT GOOD")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several = {"type": int, "nargs": "+"}
    parser.add_argument("--layers", **several, help="the model is cut after (default: 12 19)")
    parser.add_argument("--d_sae", **several, help="default: 2304 9216 16384")
    parser.add_argument("--seeds", **several, help="trained together (default: 1 3)")
    parser.add_argument("--minutes", type=float, default=60, help="begin nothing new after these")
    parser.add_argument("--attention", choices=("eager", FLEX), default="eager", help="of the LM")
    parser.add_argument("--flex", action="store_true", help="FlexAttention beside eager")
    parser.add_argument("--json", type=Path, help="default: results/gpu_throughput_<device>.json")
    parser.add_argument("--check", action="store_true", help="compare GPU with CPU instead")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to test this program")
    chosen = parser.parse_args()
    until = time.monotonic() + 60 * chosen.minutes
    device = training_device()
    if device == CPU and not chosen.tiny:
        parser.error("there is no GPU here: --tiny runs the same code at a tiny shape")
    if chosen.check:
        attentions = dict.fromkeys([chosen.attention, *([FLEX] if chosen.flex else [])])
        return 0 if check(device, list(attentions)) else 1

    study = TINY if chosen.tiny else FULL
    parts = {"layers": chosen.layers, "d_sae": chosen.d_sae, "seeds": chosen.seeds}
    study = replace(study, **{name: tuple(value) for name, value in parts.items() if value})
    setting, path = setting_of(study, device, chosen.attention), chosen.json
    if path is None and not chosen.tiny:
        path = target("gpu_throughput", slug(setting["device"]))
    report = Report(path, setting)
    memory = f", {setting['memory_gb']:.0f} GB" if setting["memory_gb"] else ""
    print(f"{setting['device']}{memory}, torch {setting['torch']}, CUDA {setting['cuda']}")
    print(
        f"language model bfloat16 ({chosen.attention} attention), SAE multiplications "
        f"{study.scale.training_dtype}, SAE weights float32"
    )
    measure(study, device, chosen.attention, chosen.flex, report, until)
    print(f"\ntokens/s of all that is measured\n{HEADER}")
    for name, found in report.found["configurations"].items():
        print(row(name, found))
    print(f"{published_row()}\n({PUBLISHED['what']})")
    if path:
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
