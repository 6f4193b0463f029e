"""How long a run of the scale gemma-2-2b should take on one H100: arithmetic, measured nowhere.

    python benchmarks/estimate_gemma.py         # prints the table of benchmarks/README.md

What the language model reads is counted from the scale; its time is a roofline, whichever of
products and passes over memory it waits for added up, times SLACK.  What a host core does in an
evaluation is what compare_evaluation.py measured on a CPU (results/compare_evaluation_*.json), in
proportion to words, classes and SAEs.  Each number that is neither has its source beside it.
"""

import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from lab.scales import Scale


class Gpu(NamedTuple):
    """Dense bfloat16 products a second, bytes a second, and the shares of them that are reached."""

    name: str
    products: float
    memory: float
    products_share: float = 0.6
    memory_share: float = 0.75


# NVIDIA's data sheets of the H100 SXM (989 TFLOP/s, 3.35 TB/s), and Lambda's and others' tables.
H100 = Gpu("H100", 989e12, 3.35e12)
# Published speeds of SAE training on this model (34 to 38 thousand tokens/s to layer 13, one 80 GB
# card that is not named) are a fifth of this roofline on an H100, a third on an A100: contexts of
# 256, another library, a shuffling buffer.  Half of it is allowed for here.
SLACK = 2.0
LAUNCH = 5e-6  # seconds of the host for each operator of a training step

# ── Gemma-2-2B (its config.json; background of the counts in the README) ─────────────────────────
D, HIDDEN, HEADS, KEYS, HEAD, VOCABULARY = 2304, 9216, 8, 4, 256, 256_000
BLOCK_PARAMETERS = 2 * D * HEADS * HEAD + 2 * D * KEYS * HEAD + 3 * D * HIDDEN
MODEL_BYTES = 5.2e9
# ── What SAE-Bench asks for ──────────────────────────────────────────────────────────────────────
CLASSES, TEXTS_A_CLASS, TEXT_TOKENS = 36, 2500, 128  # the eight tasks at 4,000 + 1,000
WORDS = 130_000  # alphabetic tokens of the vocabulary
PROMPT_TOKENS = 83  # ten examples and the word, less what nobody reads
TEST_SHARE = 0.2  # of the words: SAEs are asked about these


def seconds_a_token(blocks: int, context: int, gpu: Gpu) -> float:
    """Of the language model up to a block, eager attention as transformers has it."""
    products = 2 * BLOCK_PARAMETERS + 4 * HEADS * HEAD * context
    # Bytes read and written by what is no product: four norms in float32 (36 a number), two
    # additions, GELU and gate, rotary positions, and five passes over the scores of the heads.
    passes = 4 * 36 * D + 2 * 6 * D + 10 * HIDDEN + 24 * (HEADS + KEYS) * HEAD
    passes += 5 * 8 * HEADS * context
    products_s = products / (gpu.products * gpu.products_share)
    return blocks * (products_s + passes / (gpu.memory * gpu.memory_share)) * SLACK


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


def steps_of_training(scale: Scale, gpu: Gpu, operators: int = 110) -> float:
    """Seconds of all steps of all layers: what the host launches, or what the GPU computes."""
    seeds, layers = len(scale.sae_targets), len(scale.layers)
    products = 12 * seeds * D * scale.d_sae * scale.batch_tokens / gpu.products / gpu.products_share
    passes = 30 * 2 * seeds * scale.batch_tokens * scale.d_sae / gpu.memory / gpu.memory_share
    weights = 2 * 4 * 12 * seeds * 2 * D * scale.d_sae / gpu.memory / gpu.memory_share
    return scale.total_steps * layers * max(operators * LAUNCH, products + passes + weights)
