"""How near the language model and the SAEs come to what this machine's matrix units can do.

    python benchmarks/roofline.py     # two minutes

Measures, in one execution and taking turns: what large square multiplications reach (float32 and
bfloat16), what the multiplications of each stage take by themselves, in their own shapes, and each
stage as experiment.py runs it (the language model cut after block 8 on random tokens; training
steps of run_1 and run_7 on random activations, 3 seeds).  A stage's share is the time of its
multiplications alone over its own; floating-point operations are counted from the shapes, two for
every multiplication and addition, attention included.  Writes
results/roofline_<bfloat16 units>.json.
"""

import statistics
import time
from collections.abc import Callable

import machine
import torch

from experiment import RECIPES, RUNS, Trainer
from lab.activations import calibrate
from lab.devices import Ranks
from lab.language_model import LanguageModel, load_language_model
from lab.scales import SCALES, Scale

Shape = tuple[int, int, int]  # [n, k] @ [k, m]


def seconds(work: Callable[[], object], at_least: float = 0.6) -> float:
    """Median time of one call, after two to warm up."""
    work(), work()
    times = []
    while len(times) < 3 or sum(times) < at_least:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def operations(shapes: list[Shape]) -> float:
    return sum(2.0 * n * k * m for n, k, m in shapes)


def multiplications(shapes: list[Shape], dtype: torch.dtype) -> Callable[[], None]:
    """Does each product once."""
    unlike = dict.fromkeys(shapes)
    pairs = {s: (torch.randn(s[0], s[1]).to(dtype), torch.randn(s[1], s[2]).to(dtype))
             for s in unlike}  # fmt: skip

    def work() -> None:
        for shape in shapes:
            torch.mm(*pairs[shape])

    return work


def language_model_shapes(lm: LanguageModel, tokens: int) -> list[Shape]:
    """Products of one pass, those of attention left out."""
    linear = [m for m in lm.model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    return [(tokens, m.in_features, m.out_features) for m in linear]


def sae_shapes(scale: Scale, d_in: int) -> list[Shape]:
    """Products of one training step: encode, decode, and three in the backward (the gradient of
    b_dec takes a row, the data takes none)."""
    B, F, D = scale.batch_tokens, scale.d_sae, d_in
    one_seed = [(B, D, F), (B, F, D), (B, D, F), (D, B, F), (F, B, D)]
    return one_seed * scale.n_seeds


def main() -> None:
    scale, d_in = SCALES["laptop"], 576
    lm = load_language_model(scale)
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randint(100, 49_000, (scale.lm_batch, scale.context_length),
                             generator=generator)  # fmt: skip
    units = calibrate(torch.randn(20_000, d_in, generator=generator), Ranks())
    batch = torch.randn(scale.batch_tokens, d_in, generator=generator)
    config, tokens = lm.model.config, contexts.numel()
    heads = config.num_attention_heads * (d_in // config.num_attention_heads)
    attention = (max(scale.layers) + 1) * 4.0 * tokens * scale.context_length * heads
    stages = {
        "language model": (
            lambda: lm.residuals(contexts),
            language_model_shapes(lm, tokens),
            attention,
            tokens,
        )
    }
    for run in ("run_1", "run_7"):
        recipe = RECIPES[scale.name]
        trainer = Trainer(scale, recipe, RUNS[run], scale.layers[0], units, Ranks())

        def step(trainer: Trainer = trainer) -> None:
            trainer.steps_done = 101  # an ordinary step: nothing is measured beside it
            trainer.step(batch)

        stages[f"SAE step, {run}"] = (step, sae_shapes(scale, d_in), 0.0, scale.batch_tokens)

    square = [(4096, 4096, 4096)]
    peaks = {}
    for name in ("float32", "bfloat16"):
        peaks[name] = operations(square) / seconds(multiplications(square, getattr(torch, name)))
        print(f"peak, {name} 4096 x 4096: {peaks[name] / 1e12:.3f} TFLOP/s", flush=True)
    rows = {}
    for name, (work, shapes, more, per_pass) in stages.items():
        products = multiplications(shapes, torch.bfloat16)
        alone, whole = [], []
        for _ in range(3):  # in turns
            alone.append(seconds(products))
            whole.append(seconds(work))
        alone, whole = statistics.median(alone), statistics.median(whole)
        done = operations(shapes) + more
        rows[name] = {
            "tokens_per_second": per_pass / whole,
            "flop_per_token": done / per_pass,
            "tflops": done / whole / 1e12,
            "share_of_its_own_products": alone / whole,
            "share_of_bfloat16_peak": done / whole / peaks["bfloat16"],
        }  # fmt: skip
        shown = rows[name]
        print(f"{name}: {shown['tokens_per_second']:.0f} tokens/s, {shown['tflops']:.3f} TFLOP/s, "
              f"{shown['share_of_its_own_products']:.0%} of its products alone, "
              f"{shown['share_of_bfloat16_peak']:.0%} of the square peak", flush=True)  # fmt: skip
    result = {"peak_tflops": {name: value / 1e12 for name, value in peaks.items()}, "stages": rows}
    machine.write("roofline", result)


if __name__ == "__main__":
    main()
