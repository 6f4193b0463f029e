"""How much of a GPU's memory training takes, counted on the pretend one (pretend_cuda.py).

Sizes are scaled so that a block of activations is larger than all else: a block too many cannot
hide behind the model, the SAEs, or what a step and a pass of the model take for a moment.
"""

import json

import pytest
import tiny
from hub import make_gemma
from test_cuda import ON_THE_GPU

from lab.preflight import gpu_needs, needs_of_model

WIDTH = 256  # of the model: four times as many columns as calibrate() sums at a time

# Prints {phase: [bytes at its peak, {who made what lived then: bytes}]}, what lives when the
# evaluation begins, and what there is beside the blocks.
COUNTED = """
import os
phases = {}

def counted(phase, function):
    def call(*args):
        with gpu.watched() as part:
            found = function(*args)
        phases[phase] = [part.peak, part.made_by()]
        return found
    return call

def size(tensors):
    storages = {t.data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())

def residuals(lm, tokens_BL):  # in no time: what a pass of the model takes is not what is asked
    rows = lm.model.get_input_embeddings()(tokens_BL.to(lm.device)).detach()
    return {layer: rows + layer for layer in lm.layers}

def begun(*args, real=experiment.begun):
    parts = real(*args)
    weights = [p for trainer in parts[0] for p in trainer.sae.parameters()]
    phases["weights"] = size(weights)
    return parts

def evaluated(scale, alphas, lm, *args):
    phases["evaluation"] = [gpu.live, gpu.large_by_maker()]
    models = [held.model for held in (lm, *lm.others.values())]
    phases["model"] = size(t for model in models for t in (*model.parameters(), *model.buffers()))
    print("counted", json.dumps(phases))
    sys.stdout.flush()
    os._exit(0)

lab.language_model.LanguageModel.residuals = residuals
experiment.begun = counted("calibrations", begun)
experiment.train = counted("training", experiment.train)
experiment.evaluate = evaluated
experiment.prepare = lambda *args: {}
experiment.online_absorption = lambda *args: None
"""


@pytest.mark.parametrize(("layers", "contexts"), [((0, 1, 2), 256), ((1,), 512)])
def test_training_takes_two_blocks_at_most_and_what_the_preflight_asks_for(
    layers, contexts, cache, tmp_path
):
    """From the calibrations on the first block into the third one, nothing kept on disk; and none
    is left when the evaluation begins."""
    sizes = {
        "context_length": 64,
        "block_contexts": contexts,
        "batch_tokens": 512,
        "d_sae": 48,
        "n_seeds": 1,
        "keep_activations": False,
    }
    tokens = contexts * 63  # of a block: all but BOS
    model = make_gemma(tmp_path / "tiny-gemma", width=WIDTH)
    scale = tiny.tiny_scale(model, layers=layers, training_tokens=2 * tokens + 2048, **sizes)
    done = tiny.run_script(
        "--out_dir=run_1", scale=scale, cache=cache, cwd=tmp_path, patch=ON_THE_GPU + COUNTED
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("counted ")]
    counted = json.loads(line.removeprefix("counted "))

    block = tokens * len(layers) * WIDTH * 2  # bfloat16
    # Weights, gradients, two moments of Adam, and the average.  There are no logits: training
    # stops the model before them.
    beside = counted["model"] + 5 * counted["weights"]
    assert beside < block, "or it would be no test of blocks"
    found, who = {}, {}
    for phase in ("calibrations", "training", "evaluation"):
        peak, made_by = counted[phase]
        found[phase] = round((peak - beside) / block, 2)
        who[phase] = {at: round(n / block, 2) for at, n in made_by.items() if n > block / 20}
    most = {"calibrations": 2.2, "training": 2.2, "evaluation": 0.2}
    assert all(found[phase] <= most[phase] for phase in most), f"{found} blocks, by {who}"

    needed = sum(gpu_needs(scale, needs_of_model(scale)).values())
    peak = max(counted[phase][0] for phase in most)
    assert 0.7 * needed < peak <= needed, (peak, needed)
