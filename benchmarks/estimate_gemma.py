"""How long a run of the scale gemma-2-2b should take on one H100: arithmetic on measured speeds.

    python benchmarks/estimate_gemma.py         # prints the table of benchmarks/README.md

What the language model reads is counted from the scale; its time is a roofline, products and passes
over memory added up, which is what gpu_throughput.py then measured on an H100 within 2%.  What a
host core does in an evaluation is a profile on a CPU (below), in proportion to words, classes and
SAEs; what stays on the GPU there is counted in operators, each as long as the host was measured to
take to launch one.  Other numbers name their source.  No whole run with the real weights was timed.
"""

import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from lab.scales import SCALES, Scale


class Gpu(NamedTuple):
    """Dense bfloat16 products a second, bytes a second, and the shares of them that are reached."""

    name: str
    products: float
    memory: float
    products_share: float = 0.6
    memory_share: float = 0.75


# NVIDIA's data sheets of the H100 SXM (989 TFLOP/s, 3.35 TB/s), and Lambda's and others' tables.
H100 = Gpu("H100", 989e12, 3.35e12)
OPERATORS = 182  # of a training step of run_1, counted on the pretend GPU (run_7: 99)
# Seconds of the host for an operator of PyTorch that is not compiled: a step at 2,304 latents took
# 3.9 ms beside an H100 (gpu_throughput.py), for one seed as for three.
LAUNCH = 3.9e-3 / OPERATORS

# ── Gemma-2-2B (its config.json; background of the counts in docs/scales.md) ──────────────────────
D, HIDDEN, HEADS, KEYS, HEAD, VOCABULARY = 2304, 9216, 8, 4, 256, 256_000
BLOCK_PARAMETERS = 2 * D * HEADS * HEAD + 2 * D * KEYS * HEAD + 3 * D * HIDDEN
# ── What SAE-Bench asks for ──────────────────────────────────────────────────────────────────────
CLASSES, TEXTS_A_CLASS, TEXT_TOKENS = 36, 2500, 128  # the eight tasks at 4,000 + 1,000
WORDS = 130_000  # alphabetic tokens of the vocabulary
PROMPT_TOKENS = 83  # ten examples and the word, less what nobody reads
TEST_SHARE = 0.2  # of the words: SAEs are asked about these
# ── One SAE's scores on one core of an EPYC, seconds (profile beside compare_evaluation.py) ──────
K_SPARSE_FITS = 0.16  # a class of 2,000 + 500 texts, six k: scikit-learn
WORDS_OF_32_000 = 1.6  # absorption at 32,000 words but for encoding and the l1 probe
# Operators a class: epochs, batches, operators of a step.  SAE-Bench stops at 100 epochs, or once
# ten found nothing better: after 11 to 16 on the laptop scale's latents of a task of six classes,
# mixed in pairs to as many texts.  Three times that is allowed for.
PROBE_ON_ALL = 50 * 16 * 14
# A read-out: k = 1, 2, 5 alone.  Fits to the same mixed texts took 16 ms a class (of all six k 92);
# operators gather rows and rank latents, for each k.
FEW_FITS, FEW_OPERATORS = 0.02, 3 * 60
# Bytes a latent and alpha: gain 2, score, gain and result 6, relu 4, units 4, float32 6, sums 12.
ENCODING = 34
L1_PROBE = 50 * 20 / 4096  # operators a word: epochs, operators of a step of 4,096 words
START, FETCH = 60, 15e9 / 100e6  # imports, loading, checks; 15 GB at 100 MB/s
PREPARE = 100  # first-letter probes of three layers and the model's own probes


def seconds_a_token(blocks: int, context: int, gpu: Gpu) -> float:
    """Of the language model up to a block, eager attention as transformers has it."""
    products = 2 * BLOCK_PARAMETERS + 4 * HEADS * HEAD * context
    # Bytes read and written by what is no product: four norms in float32 (36 a number), two
    # additions, GELU and gate, rotary positions, and five passes over the scores of the heads.
    passes = 4 * 36 * D + 2 * 6 * D + 10 * HIDDEN + 24 * (HEADS + KEYS) * HEAD
    passes += 5 * 8 * HEADS * context
    products_s = products / (gpu.products * gpu.products_share)
    return blocks * (products_s + passes / (gpu.memory * gpu.memory_share))


def tokens_read(scale: Scale) -> dict[str, tuple[float, float]]:
    """{what: tokens that the language model reads for it, in a first run and in a later one}."""
    training = scale.training_tokens * scale.context_length / (scale.context_length - 1)
    texts = CLASSES * TEXTS_A_CLASS * TEXT_TOKENS
    prompts = WORDS * PROMPT_TOKENS
    return {
        "training text": (training, training),
        "probing texts, for the model's own scores": (texts, 0),
        "probing texts, for the SAEs": (texts, texts),
        "prompts of the first-letter probes": (prompts, 0),
        "prompts of the test words": (TEST_SHARE * prompts, 0),
        "held-out text": (2 * scale.heldout_contexts * scale.context_length,) * 2,
    }


def steps_of_training(scale: Scale, gpu: Gpu, slower: float = 1.0) -> float:
    """Seconds of all steps of all layers: what the host launches, or what the GPU computes."""
    seeds, layers = len(scale.sae_targets), len(scale.layers)
    products = 12 * seeds * D * scale.d_sae * scale.batch_tokens / gpu.products / gpu.products_share
    passes = 30 * 2 * seeds * scale.batch_tokens * scale.d_sae / gpu.memory / gpu.memory_share
    weights = 2 * 4 * 12 * seeds * 2 * D * scale.d_sae / gpu.memory / gpu.memory_share
    return (
        scale.total_steps * layers * max(OPERATORS * LAUNCH * slower, products + passes + weights)
    )


def scores(scale: Scale, slower: float = 1.0) -> tuple[float, float]:
    """Seconds of (sparse probing, absorption) of all SAEs, on a host core this much slower."""
    saes = len(scale.layers) * len(scale.sae_targets)
    probing = CLASSES * (K_SPARSE_FITS + PROBE_ON_ALL * LAUNCH) * slower
    absorption = WORDS / 32_000 * WORDS_OF_32_000 + TEST_SHARE * 4 * WORDS * L1_PROBE * LAUNCH
    return saes * probing, saes * absorption * slower


def encoding(scale: Scale, gpu: Gpu) -> tuple[float, float]:
    """Seconds of making all SAEs' latents of the probing texts, and more for every further alpha,
    which share the product.  The host launches it while the GPU is busy with the language model."""
    rows = CLASSES * TEXTS_A_CLASS * TEXT_TOKENS * len(scale.layers) * len(scale.sae_targets)
    product = 2 * D * rows * scale.d_sae / gpu.products / gpu.products_share
    passes = ENCODING * rows * scale.d_sae / gpu.memory / gpu.memory_share
    return product + passes, passes


def readout(scale: Scale, gpu: Gpu, slower: float = 1.0) -> float:
    """Seconds of one read-out of every SAE."""
    saes = len(scale.layers) * len(scale.sae_targets)
    probes = CLASSES * (FEW_FITS + FEW_OPERATORS * LAUNCH) * slower
    return saes * probes + encoding(scale, gpu)[1]


def main() -> None:
    scale, gpu = SCALES["gemma-2-2b"], H100
    token = seconds_a_token(max(scale.layers) + 1, scale.context_length, gpu)
    rows = [("start, and fetching 15 GB", START + FETCH, START)]
    rows += [
        (f"language model: {what}, {first / 1e6:.1f} million tokens", first * token, later * token)
        for what, (first, later) in tokens_read(scale).items()
    ]
    rows.append(("steps of nine SAEs", *[steps_of_training(scale, gpu)] * 2))
    rows.append(("first-letter probes, the model's own probes", PREPARE, 0))
    probing, absorption = scores(scale)
    rows.append(("latents of the probing texts", *[encoding(scale, gpu)[0]] * 2))
    rows += [("sparse probing", probing, probing), ("absorption", absorption, absorption)]
    print("| part | a first run, s | a later run, s |\n|---|---|---|")
    for what, first, later in rows:
        print(f"| {what} | {first:.0f} | {later:.0f} |")
    first, later = (sum(column) for column in list(zip(*rows, strict=True))[1:])
    print(f"| **together** | **{first / 60:.0f} min** | **{later / 60:.0f} min** |")
    both = 2 * readout(scale, gpu)
    print(f"\ntwo read-outs of every SAE take {both:.0f} s: {(first + both) / 60:.1f} and "
          f"{(later + both) / 60:.1f} min with them; of probing and latents "
          f"{both / (probing + encoding(scale, gpu)[0]):.0%}")  # fmt: skip
    slow = sum(scores(scale, slower=2.0)) - probing - absorption + PREPARE
    slow += steps_of_training(scale, gpu, slower=2.0) - steps_of_training(scale, gpu)
    print(f"a first run on a host core of half the speed: {first + slow:.0f} s")
    print(f"the model reads {1 / token:,.0f} tokens/s to layer {max(scale.layers)}")
    hidden = min(steps_of_training(scale, gpu), tokens_read(scale)["training text"][0] * token)
    print(f"harvesting beside the steps would hide at most {hidden:.0f} s of {later:.0f}")


if __name__ == "__main__":
    main()
