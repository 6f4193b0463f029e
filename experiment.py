# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [  # requirements.txt; pip fetches the language model
#   "torch==2.13.0", "transformers==5.23.0", "datasets==3.6.0", "tokenizers==0.23.3",
#   "safetensors==0.8.0", "gguf==0.19.0", "sae-lens==6.54.12", "sae-bench==0.6.0",
#   "sae-probes==0.4.2", "transformer-lens==3.9.0", "beartype==0.14.1", "jaxtyping==0.3.3",
#   "numpy==1.26.4", "pyarrow==25.0.1", "scipy==1.17.1", "pandas==2.3.3", "zstandard==0.25.0",
#   "scikit-learn==1.9.1", "matplotlib==3.11.2", "jinja2==3.1.6",
#   "tqdm==4.70.1", "pip",
# ]
# [tool.uv]
# override-dependencies = ["torchvision; python_version < '3'"]  # none: sae-bench never uses it
# ///
"""Do sparse autoencoders get better when their encoder starts as cosine similarity?

Trains sparse autoencoders (SAEs) on a language model's residual stream, several seeds at once, and
scores them with SAE-Bench.  A run is a row of the table RUNS; the machine picks the scale.

    python experiment.py --out_dir=run_1    # train and evaluate one run: there is no other argument
    python plot.py                          # compare all runs found in the current folder

What to expect on two CPU cores (scale "laptop": SmolLM2-135M layer 8, 2,304 latents, 3 seeds): the
first run takes about 10 minutes with all one-time preparation, later ones under 4.  The control,
run_7, ends near L0 = 36 with FVU < 0.25; its best latents probe better than the model's channels.

A token's activation x is seen through a blend of two scores, alpha moving it from cosine to linear:

    x_c = x - b_dec       r = ||x_c||       c_i = cos(x_c, w_i)       w_i = column i of W_enc
    z_i = g_i [ (1 - alpha) c_i + alpha x_c . w_i ] + b_enc_i
    f   = ReLU(z)         x_hat = f @ W_dec + b_dec                   rows of W_dec have unit norm

Since x_c . w_i = r ||w_i|| c_i, alpha only decides how much of a token's norm reaches its latents.
In run_10 the cosine decides what fires, and all of the norm passes: f = r ReLU(z) at alpha = 0.

This file is the experiment: edit it.  What must be the same for every run stands in lab/: the
model, the text, the scores, the files.  All that an SAE uses is a parameter or a buffer of it, or
follows from its run and recipe: optimiser, average, checkpoint, saving and loading follow by
themselves, every score goes through encode() and decode() below, and after training each saved SAE
is loaded afresh and must compute what was trained.  A folder belongs to the code that began it:
an edited script wants another folder, or that one deleted.

Shape letters: S seeds (each once for every target L0), B tokens of a batch, N tokens or words,
L positions, D d_in, F d_sae latents
"""

import lab  # isort: skip: before any package, it says which Python and systems have them all

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lab import saved_sae
from lab.activations import ActivationStream, Calibration, harvest
from lab.checkpoints import Checkpoints, Keeper
from lab.devices import Ranks, on_device, training_device
from lab.evaluation import check_all, evaluate, prepare
from lab.features import write_features
from lab.folders import begin, chosen_run, finish, is_finished
from lab.ground_truth import evaluate_truth, online_truth
from lab.hub import is_offline, stay_offline
from lab.identity import experiment_fingerprint
from lab.language_model import LanguageModel, load_language_model
from lab.online_absorption import OnlineAbsorption, online_absorption
from lab.preflight import preflight
from lab.process import Clock, Interrupted, Signals, locked, progress_bar, require, say, told
from lab.saved_sae import save_saes
from lab.scales import Scale, choose_scale, refuse_bad_numbers
from lab.seeds import generators, seed_everything, seed_for, set_generators
from lab.state import check_kept, check_outside, outside
from lab.summary import add_to_table, print_summary
from lab.synthetic import load_world
from lab.text import WATCHED, heldout_contexts
from lab.training_log import TrainingLog
from lab.work import Work, training_identity

# ┌────────────────────────────────────────────────────────────────────┐
# │ Runs and recipes: EDIT HERE.  A new idea is a new row of RUNS.     │
# └────────────────────────────────────────────────────────────────────┘


@dataclass(frozen=True)
class Run:
    """One row of the plan: what a run tries.  As it stands: the method."""

    title: str
    schedule: str = "linear"  # how alpha moves from start to end: a row of ALPHA_SCHEDULES
    alpha_start: float = 0.1  # 0 is cosine only
    alpha_end: float = 0.9  # 1 is the ordinary linear encoder
    ema: bool = True  # evaluate and save the moving average of the weights instead of the weights
    norm_restored: bool = False  # what the cosine lets fire is multiplied by the token's norm
    readout_alphas: tuple[float, ...] = ()  # also probe with alpha swapped to these at read time

    def __post_init__(self):
        for name in ("alpha_start", "alpha_end", "readout_alphas"):
            value = getattr(self, name)
            alphas = value if isinstance(value, list | tuple) else (value,)
            good = all(0 <= alpha <= 1 for alpha in alphas)
            require(good, f"RUNS: {name}={value} must lie in [0, 1]")
        alphas = self.alpha_start, self.alpha_end, *self.readout_alphas
        require(
            not self.norm_restored or not any(alphas),
            "RUNS: norm_restored is for the cosine, which lost the norm: all of the alphas "
            f"{alphas} must be 0",
        )


def constant(alpha: float) -> dict:
    return {"schedule": "fixed", "alpha_start": alpha, "alpha_end": alpha}


# Every run ends at the scale's target_l0s (36 on a laptop), so at one sparsity.
RUNS: dict[str, Run] = {
    "run_1": Run("the method: alpha 0.1 -> 0.9 linearly, EMA on", readout_alphas=(0.0, 1.0)),
    "run_2": Run("alpha and L0 target paced by measured absorption", schedule="adaptive"),
    "run_3": Run("ablation: alpha fixed at 0.5", **constant(0.5)),
    "run_4": Run("ablation: alpha 0.1 -> 0.9 in half the time, then held", schedule="fast"),
    "run_5": Run("ablation: cosine annealing of alpha, 0.1 -> 0.9", schedule="cosine"),
    "run_6": Run("ablation: exponential approach of alpha, 0.1 -> 0.9", schedule="exponential"),
    "run_7": Run(
        "control: the vanilla ReLU SAE (alpha = 1, no EMA)",
        **constant(1.0),
        ema=False,
        readout_alphas=(0.0, 1.0),
    ),
    "run_8": Run("predecessor: cosine only (alpha = 0, no EMA)", **constant(0.0), ema=False),
    "run_9": Run("ablation: run_1 without the EMA", ema=False),
    "run_10": Run(
        "prior art, a variant: cosine decides what fires, its norm restored (arXiv 2606.15054)",
        **constant(0.0),
        ema=False,
        norm_restored=True,
    ),
}
CONTROL = "run_7"  # what every other run is compared with


@dataclass(frozen=True)
class Recipe:
    """How SAEs are trained: all runs of a scale alike, after equal tuning (notes.txt)."""

    learning_rate: float = 4e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.2  # last part of training, learning rate falling linearly to 0
    gate_init: float = 0.2  # one constant for every latent of every arm
    initial_l0_fraction: float = 0.5  # of the latents: what fires at initialisation
    tightening_fraction: float = 0.5  # first part of training: L0 falls from there to its target
    initial_lambda: float = 0.04
    ema_horizon_fraction: float = 0.01  # of the steps; decay = alpha ** (1 / horizon)
    heldout_every: int = 10  # steps between two looks at the L0 on held-out rows

    def __post_init__(self):
        refuse_bad_numbers("RECIPES", self, may_be_zero=("warmup_steps", "decay_fraction"))


RECIPES: dict[str, Recipe] = {
    "laptop": Recipe(learning_rate=8e-3),
    "laptop-long": Recipe(learning_rate=8e-3),
    "synthetic": Recipe(),
    "pythia-70m": Recipe(),
    "gemma-2-2b": Recipe(learning_rate=3e-4, warmup_steps=1000),
}


# ┌────────────────────────────────────────────────────────────────────┐
# │ Alpha schedules: pure functions of progress in [0, 1]              │
# └────────────────────────────────────────────────────────────────────┘


def linear(progress: float) -> float:
    return progress


def fixed(progress: float) -> float:
    return 0.0  # alpha_start, throughout


def fast(progress: float) -> float:
    """All of the way in half of the time, then held."""
    return min(1.0, 2.0 * progress)


def cosine_annealing(progress: float) -> float:
    """Slow, fast, slow: half a cosine period."""
    return (1.0 - math.cos(math.pi * progress)) / 2.0


def exponential(progress: float, rate: float = 5.0) -> float:
    """Fast, then ever slower: an exponential approach, scaled so that it arrives at progress 1."""
    return (1.0 - math.exp(-rate * progress)) / (1.0 - math.exp(-rate))


# Each maps progress to the fraction of the way from alpha_start to alpha_end.
ALPHA_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": linear,
    "fixed": fixed,
    "fast": fast,
    "cosine": cosine_annealing,
    "exponential": exponential,
    "adaptive": linear,  # at its own pace: see paced_progress
}


def alpha_at(run: Run, progress: float) -> float:
    """Weight of the linear score at `progress`: 0 at the first step, 1 at the last."""
    require(0 <= progress <= 1, f"progress={progress} must lie in [0, 1]")
    way = ALPHA_SCHEDULES[run.schedule](progress)
    return run.alpha_start + way * (run.alpha_end - run.alpha_start)


def check_schedule(run: Run, points: int = 1001) -> None:
    """Raises ExperimentError if alpha would leave [0, 1] anywhere on the way."""
    require(
        run.schedule in ALPHA_SCHEDULES,
        f"RUNS: schedule={run.schedule!r} is not one of {', '.join(ALPHA_SCHEDULES)}",
    )
    for i in range(points):
        alpha = alpha_at(run, i / (points - 1))
        require(
            0 <= alpha <= 1,
            f"ALPHA_SCHEDULES[{run.schedule!r}] gives alpha = {alpha:.6g} at progress "
            f"{i / (points - 1):g}: it must map [0, 1] into [0, 1], and alpha with it",
        )


def l0_target_at(scale: Scale, recipe: Recipe, progress: float, target_l0: float) -> float:
    """The sparsity constraint: from the initial L0 to the one of the scale's targets, in log ever
    more slowly: of a target that falls evenly and then stands, L0 falls on past it."""
    initial_l0 = recipe.initial_l0_fraction * scale.d_sae
    left = 1.0 - min(1.0, progress / recipe.tightening_fraction)
    return initial_l0 * (target_l0 / initial_l0) ** (1.0 - left**2)


def learning_rate_factor(scale: Scale, recipe: Recipe, step: int) -> float:
    """Linear warm-up, constant, and a linear fall that reaches 0 just after the last step: what the
    rate of every group of the optimiser is multiplied by."""
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    left = (scale.total_steps - step) / max(1.0, recipe.decay_fraction * scale.total_steps)
    return min(warm, left)


# ┌────────────────────────────────────────────────────────────────────┐
# │ The sparse autoencoder                                             │
# └────────────────────────────────────────────────────────────────────┘


class BlendedScores(torch.autograd.Function):
    """z = (x_c @ W + shift) * (linear + token * cosine) + b, in one matmul and two passes over
    [S, B, F]; shift is 0 and is there for its gradient.  In training x_c is data and gets none.

    The passes over [S, B, F], not the multiplications, are what training spends its time on, so the
    backward is by hand: sums over tokens and latents are matmuls with the vectors they weight.

    x_c [S, B, D], W [S, D, F], token [S, B, 1], shift, linear, cosine and b [S, 1, F], all of one
    dtype.
    """

    @staticmethod
    def forward(ctx, x_c, W, shift, token, linear, cosine, b):
        score = torch.bmm(x_c, W)
        gain = torch.addcmul(linear, token, cosine)
        kept = W if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x_c, kept, token, cosine, score, gain)
        return torch.addcmul(b, score, gain)

    @staticmethod
    def backward(ctx, grad):
        x_c, W, token, cosine, score, gain = ctx.saved_tensors
        by_gain = grad * score
        ones = torch.ones_like(token)
        d_linear, d_cosine = torch.bmm(torch.cat([ones, token], -1).mT, by_gain).split(1, dim=1)
        d_token = torch.bmm(by_gain, cosine.mT)
        d_b = torch.bmm(ones.mT, grad)
        d_score = grad * gain
        # Matrix units want rows that lie together: turning x_c round is quicker than not to.
        d_W = torch.bmm(x_c.mT.contiguous(), d_score)
        d_shift = torch.bmm(ones.mT, d_score)
        d_x_c = None if W is None else torch.bmm(d_score, W.mT)
        return d_x_c, d_W, d_shift, d_token, d_linear, d_cosine, d_b


def gains(
    W_enc: torch.Tensor, gate: torch.Tensor, alpha: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(linear, cosine) [S, 1, F]: a score x_c . w_i counts linear_i + cosine_i / r times."""
    gate = gate[:, None, :]
    unit = gate / W_enc.norm(dim=1, keepdim=True).clamp_min(1e-8)
    return alpha * gate, (1 - alpha) * unit


def distances(x: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
    """r = ||x - b_dec|| [S, B, 1] of activations x [B, D] or [S, B, D]."""
    return (x - b_dec[:, None, :]).norm(dim=-1, keepdim=True).clamp_min(1e-8)


def pre_activations(
    x: torch.Tensor,
    b_dec: torch.Tensor,
    W_enc: torch.Tensor,
    gate: torch.Tensor,
    b_enc: torch.Tensor,
    alpha: float | torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """z_i = g_i [ (1 - alpha) cos(x_c, w_i) + alpha x_c . w_i ] + b_enc_i, x_c = x - b_dec.

    Both scores share a product, since cos(x_c, w_i) = x_c . w_i / (r ||w_i||): the blend is one
    matmul times a gain that depends on the token (its norm) and on the latent (its gate, ||w_i||).
    A float alpha of exactly 1 rules the cosine out, and the gate goes into the matmul.

    x is data and gets no gradient.  b_dec moves every token alike, so its gradient is that of one
    row `move` per seed, whose value is 0: not a matmul over all tokens, a sixth of a step's.

    Args:
        x: activations [B, D] or [S, B, D].
        b_dec, W_enc, gate, b_enc: [S, D], [S, D, F], [S, F], [S, F].
        alpha: a float, or a tensor [S, 1, 1].
        dtype: of the large operations; that of x, unless another is asked for.
    Returns: pre-activations [S, B, F], in the units of x.
    """
    dtype, b, at = dtype or x.dtype, b_enc[:, None, :], b_dec[:, None, :]
    move = at.detach() - at
    x_c = (x - at.detach()).to(dtype)
    if isinstance(alpha, float) and alpha == 1.0:
        W = gate[:, None, :] * W_enc
        return torch.baddbmm((b + move @ W.detach()).to(dtype), x_c, W.to(dtype))
    parts = W_enc, move @ W_enc.detach(), 1 / distances(x, b_dec), *gains(W_enc, gate, alpha), b
    return BlendedScores.apply(x_c, *(part.to(dtype) for part in parts))


class Forward(NamedTuple):
    """One pass over a batch.  All per seed: the seeds never mix."""

    loss_S: torch.Tensor  # mse + lambda * l1: what is minimised
    mse_S: torch.Tensor  # mean over tokens of ||x - x_hat||^2: 1 if x_hat = mean, by the units
    l1_S: torch.Tensor  # mean over tokens of sum_i f_i
    l0_S: torch.Tensor  # mean over tokens of the number of latents that fire
    fired_SF: torch.Tensor  # whether a latent fired on any token of the batch


class BlendedSAE(torch.nn.Module):
    """The SAEs of one layer, stacked, in training units (E||x - b_dec||^2 = 1 at the start).

    W_enc [S, D, F]  W_dec [S, F, D]  b_enc, gate [S, F]  b_dec [S, D]

    Every parameter has the seeds first (a buffer that has not belongs to all of them).  A saved SAE
    is one of these with a single seed, built from the same run and recipe.

    With norm_restored f = r ReLU(z) at alpha = 0, a linear encoder whose bias grows with the
    token's norm: it tells "cosine decides what fires" from "latents cannot see the norm" (a variant
    of "Size Doesn't Matter: Cosine-Scored SAEs", arXiv 2606.15054).
    """

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        d_in: int,
        d_sae: int,
        seeds: Iterable[int] = (0,),
        b_dec: torch.Tensor | None = None,
    ):
        """`b_dec` [D], training units: where to start."""
        super().__init__()
        rows = [
            torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        W_dec = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
        self.run, self.recipe = run, recipe
        S, param = len(rows), torch.nn.Parameter
        start = torch.zeros(d_in) if b_dec is None else b_dec.float()
        self.W_dec = param(W_dec)
        self.W_enc = param(W_dec.transpose(1, 2).contiguous())
        self.b_enc = param(torch.zeros(S, d_sae))
        self.b_dec = param(start.expand(S, d_in).clone())
        self.gate = param(torch.full((S, d_sae), recipe.gate_init))

    def encode(self, x: torch.Tensor, alphas: list[float], dtype: torch.dtype) -> torch.Tensor:
        """Latents [S, B, F] of activations x [B, D] in training units, with one alpha a seed.  A
        single seed takes any number A of alphas and gives [A, B, F]: read-outs of one SAE.  `dtype`
        is that of the large operations."""
        if all(alpha == 1.0 for alpha in alphas):
            alpha = 1.0
        else:
            alpha = on_device(alphas, x.device)[:, None, None]
        weights = self.b_dec, self.W_enc, self.gate, self.b_enc
        f = pre_activations(x, *weights, alpha, dtype).relu()
        return f * distances(x, self.b_dec).to(dtype) if self.run.norm_restored else f

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """Reconstructions [S, B, D] in float32 from latents [S, B, F]."""
        return torch.bmm(f, self.W_dec.to(f.dtype)).float() + self.b_dec[:, None, :]

    def linear_encoder(self, alphas: list[float]) -> torch.Tensor:
        """W_enc [S, D, F] of the linear encoder that this one is where r = 1 (at alpha = 1, all
        over): what a saved SAE shows as its W_enc."""
        alpha = on_device(alphas, self.W_enc.device)[:, None, None]
        linear, cosine = gains(self.W_enc, self.gate, alpha)
        return self.W_enc * (linear + cosine)

    def forward(
        self,
        x: torch.Tensor,
        alphas: list[float],
        lambda_S: torch.Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> Forward:
        """Loss and its parts on a batch x [B, D]; `dtype` is the dtype of the large matmuls."""
        f = self.encode(x, alphas, dtype)
        mse_S = (x - self.decode(f)).square().sum(-1).mean(-1)
        # Sums in the dtype of f: they accumulate in float32 and only round at the end (counts up to
        # 256 stay exact); asking for a float32 result costs 20 times as much on a CPU.
        l1_S = f.sum(-1).float().mean(-1)
        with torch.no_grad():
            l0_S = f.sign().sum(-1).float().mean(-1)
            fired_SF = f.sum(1) > 0  # f is never negative; amax takes five times as long
        return Forward(mse_S + lambda_S * l1_S, mse_S, l1_S, l0_S, fired_SF)

    @torch.no_grad()
    def project_decoder_gradient_(self) -> None:
        """Remove the component along each row: it would only change the norm, which is undone."""
        grad = self.W_dec.grad
        if grad is not None:  # another decoder may not use it
            grad.sub_(self.W_dec * (grad * self.W_dec).sum(-1, keepdim=True))

    @torch.no_grad()
    def normalize_(self) -> None:
        """Back to unit decoder rows."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8))


# ┌────────────────────────────────────────────────────────────────────┐
# │ EMA and constraint                                                 │
# └────────────────────────────────────────────────────────────────────┘


def ema_horizon(scale: Scale, recipe: Recipe) -> float:
    """In steps."""
    return max(1.0, recipe.ema_horizon_fraction * scale.total_steps)


def ema_decay_at(alpha: float | torch.Tensor, horizon: float) -> float | torch.Tensor:
    """decay = alpha ** (1 / horizon): the average remembers longer as the encoder turns linear."""
    return alpha ** (1.0 / horizon)


class WeightAverage:
    """Exponential moving average of parameters whose decay changes from step to step.

    Step t enters with weight 1, and every later step multiplies it by that step's decay:

        mass_t    = decay_t mass_{t-1} + 1
        average_t = (decay_t mass_{t-1} average_{t-1} + w_t) / mass_t

    With a constant decay this is the bias-corrected EMA (Adam's correction).  At decay 1 it becomes
    the plain mean instead of freezing at its start, at decay 0 the weights themselves.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]):
        self.parameters = list(parameters)
        self.average = [p.detach().clone() for p in self.parameters]
        self.mass_S = torch.zeros(len(self.parameters[0]), device=self.parameters[0].device)

    @torch.no_grad()
    def update_(self, decay_S: torch.Tensor) -> None:
        self.mass_S = decay_S * self.mass_S + 1
        for average, p in zip(self.average, self.parameters, strict=True):
            average.lerp_(p, (1 / self.mass_S).view(-1, *[1] * (p.dim() - 1)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside the `with`, and their own values after it."""
        own = [p.detach().clone() for p in self.parameters]
        try:
            self._assign(self.average)
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, values: list[torch.Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)


def next_lambda(
    lambda_S: torch.Tensor,
    error_S: torch.Tensor,
    change_S: torch.Tensor,
    gain: float = 0.15,
    ahead: float = 5.0,
) -> torch.Tensor:
    """One step of the controller that holds L0 at its target.

    `error_S` is how far L0 is off, log(L0 / target), and `change_S` by how much that changed in the
    last step.  lambda follows the error to be expected `ahead` steps from now, since weights answer
    to it late; it moves by at most a factor e^gain a step.
    Of an activation that fixes L0 itself, at or below the target (TopK), lambda falls to its floor.
    """
    expected_S = error_S.clamp(-0.5, 0.5) + ahead * change_S
    return (lambda_S * (gain * expected_S.clamp(-1, 1)).exp()).clamp(1e-6, 1e3)


def recent_best(best: float, absorption: float, leak: float = 0.5) -> float:
    """Best absorption so far, forgetting: it gives way to the present by `leak` a measurement.

    An untrained SAE, whose latents all fire, absorbs nothing: an unforgetting best would be that 0,
    and every run would stand still.  This one makes the pace answer to rises, not to the level.
    """
    return absorption if math.isinf(best) else min(absorption, best + leak * (absorption - best))


def adaptive_rate(absorption: float, best: float, rate: float, tolerance: float = 0.05) -> float:
    """Pace of adaptive tightening, in units of the linear schedule's, from measured absorption.

    2 while absorption is at its recent best, 1 at one tolerance above it, 0 from two tolerances on;
    never negative, and never more than 0.5 away from the pace before.
    """
    wanted = min(max(2.0 - (absorption - best) / tolerance, 0.0), 2.0)
    return min(max(wanted, rate - 0.5), rate + 0.5)


def paced_progress(done: float, rate: float, progress: float, elapsed: float) -> float:
    """Schedule progress of an adaptive run: monotone, clamped to [0, 1], never over twice linear.

    `done` so far, `progress` of training, `elapsed` since the last call.  The floor 2 progress - 1
    is where doubling the pace only just arrives at the end: there the constraint wins over the
    measurement, because every arm must end at the same target L0.
    """
    return min(1.0, max(done + rate * elapsed, 2.0 * progress - 1.0))


# ┌────────────────────────────────────────────────────────────────────┐
# │ Training                                                           │
# └────────────────────────────────────────────────────────────────────┘


class Trainer:
    """The SAEs of one layer, all seeds at once, with everything that changes from step to step.

    With several target L0s each seed is there once for each: the same start, the same batches.

    A checkpoint holds all of it as it stands: what could not be put back is refused by name.
    """

    def __init__(
        self, scale: Scale, recipe: Recipe, run: Run, layer: int, units: Calibration, ranks: Ranks
    ):
        self.scale, self.recipe, self.run, self.layer = scale, recipe, run, layer
        self.units, self.ranks = units, ranks
        self.device, self.dtype = training_device(), getattr(torch, scale.training_dtype)
        S = len(scale.sae_targets)
        seeds = [seed_for("init", scale.name, layer, seed % scale.n_seeds) for seed in range(S)]
        sae = BlendedSAE(run, recipe, len(units.b_dec), scale.d_sae, seeds, units.b_dec.cpu())
        for parameter, p in sae.named_parameters():
            shape = tuple(p.shape)
            require(
                shape[:1] == (S,),
                f"BlendedSAE.{parameter} has shape {shape}: the first dimension must be that of "
                f"the {S} seeds, which are trained side by side and never mix",
            )
        self.sae = sae.to(self.device)
        trained = [p for p in self.sae.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=recipe.learning_rate, fused=True)
        self.average = WeightAverage(self.sae.parameters()) if run.ema else None
        self.lambda_S = torch.full((S,), recipe.initial_lambda, device=self.device)
        self.smoothed_l0_S = torch.full((S,), math.nan, device=self.device)  # not measured yet
        self.l0_error_S = torch.full((S,), math.nan, device=self.device)  # log(L0 / target)
        # L0 of what is evaluated, on held-out rows, to that of the weights on their batch.
        self.l0_ratio_S = torch.ones(S, device=self.device)
        self.heldout_ND: torch.Tensor | None = None  # some residuals that are never trained on
        self.idle_steps_SF = torch.zeros(S, scale.d_sae, dtype=torch.int32, device=self.device)
        self.paced = [0.0] * S  # schedule progress of each seed, when absorption drives it
        self.rate = [1.0] * S
        self.best_absorption = [math.inf] * S
        self.online: OnlineAbsorption | None = None
        self.steps_done = 0

    def schedule_at(self, step: int) -> tuple[list[float], list[float]]:
        """alpha and L0 target of each seed at a step."""
        progress = step / max(1, self.scale.total_steps - 1)
        adaptive = self.run.schedule == "adaptive"
        finals = self.scale.sae_targets
        ways = self.paced if adaptive else [progress] * len(finals)
        targets = [
            l0_target_at(self.scale, self.recipe, way, final)
            for way, final in zip(ways, finals, strict=True)
        ]
        return [alpha_at(self.run, way) for way in ways], targets

    def final_alphas(self) -> list[float]:
        """The blend that is evaluated, of each seed."""
        return self.schedule_at(self.scale.total_steps - 1)[0]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the `with` the SAEs are what is evaluated: the average, if any, in eval mode."""
        self.sae.eval()
        try:
            with self.average.applied() if self.average else nullcontext():
                yield
        finally:
            self.sae.train()

    def step(self, x: torch.Tensor) -> dict:
        """One optimiser step on residuals [n_seeds, B, D], a batch of each seed's own, or [B, D],
        one for all; returns the record to log."""
        step, sae = self.steps_done, self.sae
        alphas, targets = self.schedule_at(step)
        factor = learning_rate_factor(self.scale, self.recipe, step)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

        x = x.to(self.device).float() * self.units.scale
        if x.dim() == 3:  # a seed reads the same whatever its target
            x = x.repeat(len(self.scale.target_l0s), 1, 1)
        forward = sae(x, alphas, self.lambda_S, self.dtype)
        self.optimizer.zero_grad()
        forward.loss_S.sum().backward()
        self.ranks.average_(*(p.grad for p in sae.parameters() if p.grad is not None))
        measured = torch.stack([forward.loss_S, forward.mse_S, forward.l1_S, forward.l0_S]).detach()
        self.ranks.average_(measured)
        loss_S, mse_S, l1_S, l0_S = measured
        last = step == self.scale.total_steps - 1
        look = last or step % self.recipe.heldout_every == 0
        measure = last or step % self.scale.online_every == 0
        falling = factor < 1 and step >= self.recipe.warmup_steps
        l0_heldout_S = self.measure_heldout(alphas, l0_S, falling) if look else None
        grad_norm_S = self.gradient_norm()
        # The order must not move: project, step, normalise, average.
        sae.project_decoder_gradient_()
        self.optimizer.step()
        sae.normalize_()
        horizon = ema_horizon(self.scale, self.recipe)
        decays = [ema_decay_at(a, horizon) for a in alphas]
        if self.average:
            self.average.update_(on_device(decays, self.device))

        record = {
            "layer": self.layer,
            "step": step,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "alpha": alphas,
            "ema_decay": decays if self.average else None,
            "l0_target": targets,
            "lambda": self.lambda_S,
            "loss": loss_S,
            "mse": mse_S,
            "l1": l1_S,
            "l0": l0_S,
            "l0_heldout": l0_heldout_S,
            "grad_norm": grad_norm_S,
            "dead": self.dead_fraction(forward.fired_SF),
            **self.measure_absorption(step, alphas, measure),
        }
        self.control_sparsity(l0_S, on_device(targets, self.device))
        self.steps_done += 1
        return record

    def gradient_norm(self) -> torch.Tensor:
        """Norm of all gradients together, per seed [S]."""
        grads = [p.grad.flatten(1) for p in self.sae.parameters() if p.grad is not None]
        return torch.stack([g.norm(dim=1) for g in grads]).norm(dim=0)

    def dead_fraction(self, fired_SF: torch.Tensor, window: int = 50) -> torch.Tensor:
        """Share of latents that fired on no token of the last `window` batches, per seed [S]."""
        fired_SF = fired_SF.to(torch.uint8)
        self.ranks.largest_(fired_SF)
        self.idle_steps_SF = (self.idle_steps_SF + 1).masked_fill_(fired_SF.bool(), 0)
        return (self.idle_steps_SF >= window).float().mean(-1)

    @torch.no_grad()
    def measure_heldout(
        self, alphas: list[float], l0_S: torch.Tensor, falling: bool, keep: float = 0.5
    ) -> torch.Tensor | None:
        """L0 on held-out rows [S], of the average where there is one: it is the L0 that runs are
        compared at.  Other text fires other numbers of latents, and an average more than the
        weights of the moment.  `l0_S` is the weights' own on the batch of this step.

        An average below the weights only lags behind them: that passes, and steering by it would
        push L0 past the target, so theirs counts then.  Not once the learning rate is `falling`:
        weights come to rest, and the average is read.
        """
        if self.heldout_ND is None:
            return None
        batches = (self.heldout_ND * self.units.scale).split(self.scale.batch_tokens)

        def fired() -> torch.Tensor:
            found = (self.sae.encode(x, alphas, self.dtype).sign().sum(-1) for x in batches)
            return sum(count.float().sum(-1) for count in found) / len(self.heldout_ND)

        self.sae.eval()
        heldout_S = fired()
        self.sae.train()
        if self.average:
            with self.averaged():
                heldout_S = fired() if falling else torch.maximum(heldout_S, fired())
        self.ranks.average_(heldout_S)
        ratio_S = heldout_S / l0_S.clamp_min(1e-3)
        first = self.steps_done == 0
        self.l0_ratio_S = ratio_S if first else keep * self.l0_ratio_S + (1 - keep) * ratio_S
        return heldout_S

    def control_sparsity(
        self, l0_S: torch.Tensor, target_S: torch.Tensor, keep: float = 0.9
    ) -> None:
        l0_S = l0_S * self.l0_ratio_S
        old = torch.where(self.smoothed_l0_S.isnan(), l0_S, self.smoothed_l0_S)
        self.smoothed_l0_S = keep * old + (1 - keep) * l0_S
        error_S = (self.smoothed_l0_S.clamp_min(1e-3) / target_S).log()
        change_S = (error_S - self.l0_error_S).nan_to_num(nan=0.0)
        self.l0_error_S = error_S
        self.lambda_S = next_lambda(self.lambda_S, error_S, change_S)

    def measure_absorption(self, step: int, alphas: list[float], measure: bool) -> dict:
        """Online absorption, now and then; in an adaptive run it sets the pace."""
        if self.run.schedule == "adaptive":
            # For the next step, which is where the floor of paced_progress has to arrive in time.
            last = max(1, self.scale.total_steps - 1)
            progress, elapsed = min(1.0, (step + 1) / last), 1 / last
            self.paced = [
                paced_progress(done, rate, progress, elapsed)
                for done, rate in zip(self.paced, self.rate, strict=True)
            ]
        if self.online is None or not measure:
            nothing = ("online_absorption_fraction", "online_absorption_full", "pace")
            return dict.fromkeys(nothing)
        self.sae.eval()
        found = self.online.measure(self.sae, alphas, self.units.scale, self.dtype)
        self.sae.train()
        # One process measures for all: the pace must not come to depend on rounding.
        fractions, full = self.ranks.first([list(score) for score in zip(*found, strict=True)])
        for s, fraction in enumerate(fractions):
            self.best_absorption[s] = recent_best(self.best_absorption[s], fraction)
            self.rate[s] = adaptive_rate(fraction, self.best_absorption[s], self.rate[s])
        return {
            "online_absorption_fraction": fractions,
            "online_absorption_full": full,
            "pace": list(self.rate) if self.run.schedule == "adaptive" else None,
        }


def train(scale: Scale, trainers: list[Trainer], stream: ActivationStream, keeper: Keeper) -> None:
    """Step to the end of the budget.  Raises Interrupted, with a checkpoint written, when asked to
    stop; ExperimentError if a loss is not finite or the text is too short."""
    done = begun_at = trainers[0].steps_done

    script = outside(__name__)

    def state() -> dict:
        check_outside(__name__, script)
        return {"stream": stream.state(), "trainers": trainers, "generators": generators()}

    batches = stream.batches([trainer.units for trainer in trainers])
    batches = progress_bar(batches, scale.total_steps, "training step", done)
    try:
        while done < scale.total_steps:
            position, batch = next(batches, (None, None))
            require(
                position is not None,
                f"the text of scale {scale.name!r} ended after {done} of {scale.total_steps} "
                "steps: lower training_tokens or add text",
            )
            with keeper.signals.kept():  # a step is made whole or not at all
                records = [t.step(batch[:, :, i]) for i, t in enumerate(trainers)]
                stream.position, done = position, done + 1
                keeper.note(done, scale.batch_tokens, records)
            if done == begun_at + 1:
                check_kept(state())  # refuse now, not in two minutes
            keeper.look(done, state)
    except Interrupted:
        keeper.checkpoint(done, state)
        raise
    stream.close()
    if done > begun_at:
        keeper.checkpoint(done, state)
    if keeper.signals.received:  # in the last steps
        raise Interrupted(keeper.signals.received)


def begun(
    scale: Scale,
    recipe: Recipe,
    run: Run,
    lm: LanguageModel,
    heldout_NL: torch.Tensor,
    first_document: int,
    ranks: Ranks,
    checkpoint: dict | None,
) -> tuple[list[Trainer], ActivationStream]:
    """The trainer of every layer and the stream that feeds them all with one pass of the language
    model: anew, or as a checkpoint left them."""
    stream = ActivationStream(scale, lm, ranks, first_document, (checkpoint or {}).get("stream"))
    if checkpoint:
        trainers = checkpoint["trainers"]
        set_generators(checkpoint["generators"])
    else:
        trainers = [
            Trainer(scale, recipe, run, layer, units, ranks)
            for layer, units in zip(scale.layers, stream.calibrations(), strict=True)
        ]
        seed_everything("training", scale.name)  # whoever draws without a generator of their own
    some_NL = heldout_NL[:: max(1, len(heldout_NL) // WATCHED)]  # from all of it
    heldout_NLD = harvest(lm, some_NL, scale.lm_batch)
    for i, trainer in enumerate(trainers):  # what belongs to this execution, not to the training
        trainer.scale, trainer.ranks, trainer.device = scale, ranks, training_device()
        measure = online_truth if scale.world else online_absorption
        trainer.online = measure(scale, lm, trainer.layer)
        trainer.heldout_ND = trainer.units.ordinary(heldout_NLD[:, i])
    return trainers, stream


# ┌────────────────────────────────────────────────────────────────────┐
# │ main                                                               │
# └────────────────────────────────────────────────────────────────────┘


def build_sae(d_in: int, d_sae: int, run: dict, recipe: dict) -> BlendedSAE:
    """The SAE of one seed that a saved one's settings describe."""
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in run.items()}
    return BlendedSAE(Run(**values), Recipe(**recipe), d_in, d_sae)


def register_with_sae_lens() -> type:
    """From here on sae_lens.SAE.load_from_disk reads the SAEs that this code trained."""
    return saved_sae.register(experiment_fingerprint(__file__), build_sae)


def chosen_recipe(scale: Scale, run: Run) -> Recipe:
    """Raises ExperimentError for a scale without one, and where run, recipe and scale disagree."""
    require(scale.name in RECIPES, f"RECIPES has no row {scale.name!r}: add one for this scale")
    recipe = RECIPES[scale.name]
    initial = recipe.initial_l0_fraction * scale.d_sae
    highest = max(scale.target_l0s)
    require(
        highest < initial,
        f"target_l0s: {highest:g} must be below what fires at initialisation, "
        f"initial_l0_fraction x d_sae = {initial:g}",
    )
    check_schedule(run)
    return recipe


def execute(out_dir: Path, name: str, scale: Scale, ranks: Ranks, signals: Signals) -> None:
    """One run, from its row of RUNS to its final_info.json."""
    clock, first, run = Clock(), ranks.rank == 0, RUNS[name]
    recipe, experiment = chosen_recipe(scale, run), experiment_fingerprint(__file__)
    settings = {"run": asdict(run), "recipe": asdict(recipe)}
    identity = settings | {"run_name": name, "scale": asdict(scale), "experiment": experiment}
    if ranks.first(is_finished(out_dir, identity) if first else None):
        say(f"{out_dir} is finished (final_info.json is there): nothing to do")
        return
    config = {
        "total_steps": scale.total_steps,
        "ema_horizon_steps": ema_horizon(scale, recipe),
        "processes": ranks.world,
    }
    if first:
        preflight(scale, out_dir, len(run.readout_alphas))
        config = begin(out_dir, identity, __file__, config)
    if ranks.first(is_offline()):
        stay_offline()

    lm = load_world(scale) if scale.world else load_language_model(scale)
    heldout, first_document = heldout_contexts(scale, lm)
    clock.lap("language model and text")
    config |= {"probing_texts": None} if scale.world else prepare(scale, lm)
    clock.lap("first-letter probes and probing texts")

    work = Work(ranks.first(training_identity(name, scale, lm, settings, experiment)))
    with work.claimed() if first else nullcontext():
        log = TrainingLog(work.folder / "training_log.jsonl", name, config, writes=first)
        checkpoints = Checkpoints(work.folder, work.identity, writes=first)
        checkpoint = checkpoints.newest(log, ranks)
        parts = begun(scale, recipe, run, lm, heldout, first_document, ranks, checkpoint)
        train(scale, *parts, Keeper(log, checkpoints, signals, ranks, scale.checkpoint_seconds))
        ranks.part()
        clock.lap("training")
        if not first:
            return  # the first process evaluates, alone

        signals.keep = False
        register_with_sae_lens()
        trainers, _ = parts
        saved = save_saes(scale, lm, trainers, work.folder / "sae", name, experiment, settings)
        check_all(scale, lm, trainers, saved, heldout, log.records)
        units = {trainer.layer: trainer.units for trainer in trainers}
        score = evaluate_truth if scale.world else evaluate
        results, scored = score(
            scale, run.readout_alphas, lm, units, saved, heldout, log.records, work.folder, clock
        )
        write_features(scored, config, scale, lm, units, saved, heldout, clock)
        config["language_model"] = lm.identity
        finish(out_dir, work, config, clock, results, scored)
        add_to_table(out_dir, run.title, results, config, clock)
    print_summary(f"{name}, {run.title}", results, clock, config, out_dir.parent / CONTROL)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error (last on stderr), 75 stopped by SIGTERM, 130 by Ctrl-C: the
    same command goes on after the last two."""
    lab.speak_plainly()
    try:
        signals = Signals()
        titles = {name: run.title for name, run in RUNS.items()}
        out_dir, name = chosen_run(titles, sys.argv[1:] if arguments is None else arguments)
        scale, ranks = choose_scale(), Ranks()
        say(f"scale {scale.name}: {name}, {RUNS[name].title}")
        with locked(out_dir) if ranks.rank == 0 else nullcontext():
            execute(out_dir, name, scale, ranks, signals)
    except (Exception, Interrupted) as error:
        return told(error, experiment=__file__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
