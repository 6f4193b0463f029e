"""Do sparse autoencoders get better when their encoder starts as cosine similarity?

Trains sparse autoencoders (SAEs) on a language model's residual stream, several seeds at once, and
scores them with SAE-Bench.  A run is a row of the table RUNS; the machine picks the row of SCALES.

    python experiment.py --out_dir=run_1    # train and evaluate one run: there is no other argument
    python plot.py                          # compare all runs found in the current folder

What to expect on two CPU cores (scale "laptop": SmolLM2-135M layer 8, 2,304 latents, 3 seeds): the
first run takes about 9 minutes with all one-time preparation (less where the cores have bfloat16
matrix units), later ones under 4.  The control, run_7, ends near L0 = 36 with FVU < 0.25, and its
best latents probe better than the model's best channels.

A token's activation x is seen through a blend of two scores, alpha moving it from cosine to linear:

    x_c = x - b_dec       r = ||x_c||       c_i = cos(x_c, w_i)       w_i = column i of W_enc
    z_i = g_i [ (1 - alpha) k r^e c_i + alpha x_c . w_i ] + b_enc_i   (k = 1, e = 0 outside run_10)
    f   = ReLU(z)         x_hat = f @ W_dec + b_dec                   rows of W_dec have unit norm

Since x_c . w_i = r ||w_i|| c_i, alpha only decides how much of a token's norm reaches its latents.

Shape letters: S seeds, B tokens of a batch, N tokens or words, L positions, D d_in, F d_sae latents
"""

import argparse
import contextlib
import hashlib
import math
import os
import platform
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from lab.absorption import first_letter_probes
from lab.activations import (
    Calibration,
    Position,
    calibrate,
    residual_blocks,
    shuffled_batches,
    without_outliers,
)
from lab.checkpoints import Checkpoints, TrainingLog
from lab.evaluation import evaluate
from lab.folders import WRITTEN, check_folder, written_files
from lab.language_model import LanguageModel, load_language_model
from lab.online_absorption import OnlineAbsorption, online_absorption
from lab.preflight import preflight
from lab.process import (
    Clock,
    ExperimentError,
    Interrupted,
    Ranks,
    Signals,
    locked,
    progress_bar,
    require,
    say,
    seed_for,
    training_device,
)
from lab.results import print_summary
from lab.saved_sae import save_saes
from lab.scales import Scale, choose_scale
from lab.storage import file_sha256, json_text, versions, write_atomically
from lab.text import Lane, ahead, heldout_contexts, text_blocks

# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Scales and runs: EDIT HERE.  A new idea is a new row of RUNS.                                  │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


PACKAGES = ("torch", "transformers", "datasets", "sae-lens", "sae-bench", "sae-probes", "numpy")


# "adaptive" walks the linear schedule at a pace set by measured absorption; "learned" has no alpha.
SCHEDULES = ("linear", "fixed", "fast", "cosine", "exponential", "adaptive", "learned")


@dataclass(frozen=True)
class Run:
    """One row of the plan: what a run tries."""

    title: str
    schedule: str = "linear"  # how alpha moves from start to end: one of SCHEDULES
    alpha_start: float = 0.1  # 0 is cosine only
    alpha_end: float = 0.9  # 1 is the ordinary linear encoder
    ema: bool = True  # evaluate and save the moving average of the weights instead of the weights
    readout_alphas: tuple[float, ...] = ()  # also probe with alpha swapped to these at read time

    def __post_init__(self):
        require(
            self.schedule in SCHEDULES,
            f"RUNS: schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}",
        )
        for name in ("alpha_start", "alpha_end"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"RUNS: {name}={value} must lie in [0, 1]")
        require(
            self.schedule != "learned" or self.alpha_start == self.alpha_end == 0,
            "RUNS: a learned blend is a learned cosine gain, so it needs alpha_start=alpha_end=0",
        )
        require(
            all(0 <= alpha <= 1 for alpha in self.readout_alphas),
            f"RUNS: readout_alphas={self.readout_alphas} must lie in [0, 1]",
        )


METHOD = Run("the method: alpha 0.1 -> 0.9 linearly, EMA on")


def variant(title: str, **changes) -> Run:
    return replace(METHOD, title=title, **changes)


def constant(alpha: float) -> dict:
    return {"schedule": "fixed", "alpha_start": alpha, "alpha_end": alpha}


RUNS: dict[str, Run] = {
    "run_1": replace(METHOD, readout_alphas=(0.0, 1.0)),
    "run_2": variant("alpha and L0 target paced by measured absorption", schedule="adaptive"),
    "run_3": variant("ablation: alpha fixed at 0.5", **constant(0.5)),
    "run_4": variant("ablation: alpha 0.1 -> 0.9 in half the time, then held", schedule="fast"),
    "run_5": variant("ablation: cosine annealing of alpha, 0.1 -> 0.9", schedule="cosine"),
    "run_6": variant("ablation: exponential approach of alpha, 0.1 -> 0.9", schedule="exponential"),
    "run_7": variant(
        "control: the vanilla ReLU SAE (alpha = 1, no EMA)",
        **constant(1.0),
        ema=False,
        readout_alphas=(0.0, 1.0),
    ),
    "run_8": variant("predecessor: cosine only (alpha = 0, no EMA)", **constant(0.0), ema=False),
    "run_9": variant("ablation: run_1 without the EMA", ema=False),
    "run_10": variant(
        "prior art: the learned blend of arXiv 2606.15054",
        **constant(0.0) | {"schedule": "learned"},
        ema=False,
    ),
}


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Alpha schedules: pure functions of progress in [0, 1]                                          │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


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
    "learned": fixed,
}


def alpha_at(run: Run, progress: float) -> float:
    """Weight of the linear score at `progress`: 0 at the first step, 1 at the last."""
    require(0 <= progress <= 1, f"progress={progress} must lie in [0, 1]")
    way = ALPHA_SCHEDULES[run.schedule](progress)
    return run.alpha_start + way * (run.alpha_end - run.alpha_start)


def l0_target_at(scale: Scale, progress: float) -> float:
    """The sparsity constraint: geometric, initial_l0 to target_l0 in tightening_fraction."""
    way = min(1.0, progress / scale.tightening_fraction)
    return scale.initial_l0 * (scale.target_l0 / scale.initial_l0) ** way


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ The sparse autoencoder                                                                         │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


class BlendedScores(torch.autograd.Function):
    """z = (x_c @ W + shift) * (linear + token * cosine) + b, in one matmul and two passes over
    [S, B, F]; shift is 0 and is there for its gradient, x_c is data and gets none.

    The passes over [S, B, F], not the multiplications, are what training spends its time on, so the
    backward is by hand: sums over tokens and latents are matmuls with the vectors they weight.

    x_c [S, B, D], W [S, D, F], token [S, B, 1], shift, linear, cosine and b [S, 1, F], all of one
    dtype.
    """

    @staticmethod
    def forward(ctx, x_c, W, shift, token, linear, cosine, b):
        score = torch.bmm(x_c, W)
        gain = torch.addcmul(linear, token, cosine)
        ctx.save_for_backward(x_c, token, cosine, score, gain)
        return torch.addcmul(b, score, gain)

    @staticmethod
    def backward(ctx, grad):
        x_c, token, cosine, score, gain = ctx.saved_tensors
        by_gain = grad * score
        ones = torch.ones_like(token)
        d_linear, d_cosine = torch.bmm(torch.cat([ones, token], -1).mT, by_gain).split(1, dim=1)
        d_token = torch.bmm(by_gain, cosine.mT)
        d_b = torch.bmm(ones.mT, grad)
        d_score = grad * gain
        # Matrix units want rows that lie together: turning x_c round is quicker than not to.
        d_W = torch.bmm(x_c.mT.contiguous(), d_score)
        d_shift = torch.bmm(ones.mT, d_score)
        return None, d_W, d_shift, d_token, d_linear, d_cosine, d_b


def pre_activations(
    x: torch.Tensor,
    b_dec: torch.Tensor,
    W_enc: torch.Tensor,
    gate: torch.Tensor,
    b_enc: torch.Tensor,
    alpha: float | torch.Tensor,
    k: float | torch.Tensor = 1.0,
    exponent: float | torch.Tensor = 0.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """z_i = g_i [ (1 - alpha) k r^e cos(x_c, w_i) + alpha x_c . w_i ] + b_enc_i, x_c = x - b_dec.

    Both scores share a product, since cos(x_c, w_i) = x_c . w_i / (r ||w_i||): the blend is one
    matmul times a gain that depends on the token (its norm) and on the latent (its gate, ||w_i||).
    A float alpha of exactly 1 rules the cosine out, and the gate goes into the matmul.

    x is data and gets no gradient.  b_dec moves every token alike, so its gradient is that of one
    row `move` per seed, whose value is 0: not a matmul over all tokens, a sixth of a step's.

    Args:
        x: activations [B, D] or [S, B, D].
        b_dec, W_enc, gate, b_enc: [S, D], [S, D, F], [S, F], [S, F].
        alpha, k, exponent: floats, or tensors [S, 1, 1].
        dtype: of the large operations; that of x, unless another is asked for.
    Returns: pre-activations [S, B, F], in the units of x.
    """
    dtype, gate, b, at = dtype or x.dtype, gate[:, None, :], b_enc[:, None, :], b_dec[:, None, :]
    move = at.detach() - at
    x_c = (x - at.detach()).to(dtype)
    if isinstance(alpha, float) and alpha == 1.0:
        W = gate * W_enc
        return torch.baddbmm((b + move @ W.detach()).to(dtype), x_c, W.to(dtype))
    r = (x_c.to(W_enc.dtype) + move).norm(dim=-1, keepdim=True).clamp_min(1e-8)
    token = k * r ** (exponent - 1)
    unit = gate / W_enc.norm(dim=1, keepdim=True).clamp_min(1e-8)
    parts = W_enc, move @ W_enc.detach(), token, alpha * gate, (1 - alpha) * unit, b
    return BlendedScores.apply(x_c, *(part.to(dtype) for part in parts))


class Forward(NamedTuple):
    """One pass over a batch.  All per seed: the seeds never mix."""

    loss_S: torch.Tensor  # mse + lambda * l1: what is minimised
    mse_S: torch.Tensor  # mean over tokens of ||x - x_hat||^2: 1 if x_hat = mean, by the units
    l1_S: torch.Tensor  # mean over tokens of sum_i f_i
    l0_S: torch.Tensor  # mean over tokens of the number of latents that fire
    fired_SF: torch.Tensor  # whether a latent fired on any token of the batch


class BlendedSAE(torch.nn.Module):
    """n_seeds SAEs of one layer, stacked, in training units (E||x - b_dec||^2 = 1 at the start).

    x_c = x - b_dec      r = ||x_c||      c_i = cos(x_c, w_i)      w_i = column i of W_enc
    z_i = gate_i [ (1 - alpha) k r^e c_i + alpha x_c . w_i ] + b_enc_i
    f   = ReLU(z)        x_hat = f @ W_dec + b_dec                 rows of W_dec have unit norm

    W_enc [S, D, F]  W_dec [S, F, D]  b_enc, gate [S, F]  b_dec [S, D]  log_k, exponent [S, 1, 1]

    k = 1 and e = 0, except in the learned blend ("Size Doesn't Matter: Cosine-Scored SAEs",
    arXiv 2606.15054), where both are learned, the gate stays 1 and W_enc keeps unit columns.
    """

    def __init__(
        self,
        seeds: Iterable[int],
        d_in: int,
        d_sae: int,
        gate_init: float,
        b_dec: torch.Tensor,
        learned: bool = False,
        mean_norm: float = 1.0,
    ):
        super().__init__()
        rows = [
            torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        W_dec = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
        S, param = len(rows), torch.nn.Parameter
        self.W_dec = param(W_dec)
        self.W_enc = param(W_dec.transpose(1, 2).contiguous())
        self.b_enc = param(torch.zeros(S, d_sae))
        self.b_dec = param(b_dec.float().expand(S, d_in).clone())
        self.gate = param(torch.full((S, d_sae), 1.0 if learned else gate_init), not learned)
        self.log_k = param(torch.full((S, 1, 1), math.log(mean_norm) if learned else 0.0), learned)
        self.exponent = param(torch.zeros(S, 1, 1), learned)
        self.learned = learned

    def encode(
        self, x: torch.Tensor, alpha: float | torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Latents [S, B, F] of activations x [B, D] in training units."""
        k, exponent = (self.log_k.exp(), self.exponent) if self.learned else (1.0, 0.0)
        weights = self.b_dec, self.W_enc, self.gate, self.b_enc
        return pre_activations(x, *weights, alpha, k, exponent, dtype).relu()

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """Reconstructions [S, B, D] in float32 from latents [S, B, F]."""
        return torch.bmm(f, self.W_dec.to(f.dtype)).float() + self.b_dec[:, None, :]

    def forward(
        self,
        x: torch.Tensor,
        alpha: float | torch.Tensor,
        lambda_S: torch.Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> Forward:
        """Loss and its parts on a batch x [B, D]; `dtype` is the dtype of the large matmuls."""
        f = self.encode(x, alpha, dtype)
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
        grad.sub_(self.W_dec * (grad * self.W_dec).sum(-1, keepdim=True))

    @torch.no_grad()
    def normalize_(self) -> None:
        """Back to unit decoder rows (and, in the learned blend, unit encoder columns)."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8))
        if self.learned:
            self.W_enc.div_(self.W_enc.norm(dim=1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def export(self, seed_index: int, scale: float, alpha: float) -> tuple[dict, dict]:
        """One seed's SAE for raw residual-stream activations: weights and blend.

        Training saw x = scale * residual.  Dividing z by scale gives latents in residual-stream
        units: SAE-Bench's absorption is only meaningful there, with unit decoder rows.  Rows that
        are not unit (an average of unit rows is shorter) hand their norm to gate and bias, which
        leaves the reconstruction unchanged because ReLU is positively homogeneous.
        """
        i = seed_index
        norm_F = self.W_dec[i].norm(dim=-1).clamp_min(1e-8)
        weights = {
            "W_enc": self.W_enc[i],
            "W_dec": self.W_dec[i] / norm_F[:, None],
            "gate": self.gate[i] * norm_F,
            "b_enc": self.b_enc[i] * norm_F / scale,
            "b_dec": self.b_dec[i] / scale,
        }
        exponent = self.exponent[i].item()
        blend = {
            "alpha": alpha,
            "cosine_scale": self.log_k[i].exp().item() * scale ** (exponent - 1),
            "norm_exponent": exponent,
        }
        return {name: w.detach().cpu().contiguous().clone() for name, w in weights.items()}, blend


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ EMA and constraint                                                                             │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


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

    @contextlib.contextmanager
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
    smoothed_l0_S: torch.Tensor,
    l0_target_S: torch.Tensor,
    gain: float = 0.05,
) -> torch.Tensor:
    """One step of the controller that holds L0 at its target.

    lambda moves by at most a factor e^gain a step, in proportion to how far (in log) L0 is off:
    without this rate limit L0, which falls from a thousand to thirty in 300 steps, overshoots.
    """
    error_S = (smoothed_l0_S.clamp_min(1e-3) / l0_target_S).log().clamp(-1, 1)
    return (lambda_S * (gain * error_S).exp()).clamp(1e-6, 1e3)


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


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Language model and text                                                                        │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Activations                                                                                    │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Training                                                                                       │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def learning_rate_at(scale: Scale, step: int) -> float:
    """Linear warm-up, constant, and a linear fall that reaches 0 just after the last step."""
    warm = min(1.0, (step + 1) / max(1, scale.warmup_steps))
    left = (scale.total_steps - step) / max(1.0, scale.decay_fraction * scale.total_steps)
    return scale.learning_rate * min(warm, left)


class Trainer:
    """The SAEs of one layer, all seeds at once, with everything that changes from step to step."""

    def __init__(self, scale: Scale, run: Run, layer: int, units: Calibration, ranks: Ranks):
        self.scale, self.run, self.layer, self.units, self.ranks = scale, run, layer, units, ranks
        self.device, self.dtype = training_device(), getattr(torch, scale.training_dtype)
        S = scale.n_seeds
        self.sae = BlendedSAE(
            seeds=[seed_for("init", scale.name, layer, seed) for seed in range(S)],
            d_in=len(units.b_dec),
            d_sae=scale.d_sae,
            gate_init=scale.gate_init,
            b_dec=units.b_dec.cpu(),
            learned=run.schedule == "learned",
            mean_norm=units.mean_norm,
        ).to(self.device)
        trained = [p for p in self.sae.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=scale.learning_rate, fused=True)
        self.average = WeightAverage(self.sae.parameters()) if run.ema else None
        self.lambda_S = torch.full((S,), scale.initial_lambda, device=self.device)
        self.smoothed_l0_S = torch.full((S,), math.nan, device=self.device)  # not measured yet
        self.l0_ratio_S = torch.ones(S, device=self.device)  # of the average's L0 to the weights'
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
        ways = self.paced if adaptive else [progress] * self.scale.n_seeds
        return [alpha_at(self.run, w) for w in ways], [l0_target_at(self.scale, w) for w in ways]

    def alpha_for(self, alphas: list[float]) -> float | torch.Tensor:
        """A float 1 where the run is linear throughout: the cosine is not computed then."""
        if self.run.alpha_start == self.run.alpha_end == 1.0:
            return 1.0
        return torch.tensor(alphas, device=self.device)[:, None, None]

    def step(self, x: torch.Tensor) -> dict:
        """One optimiser step on a batch of residuals [B, D]; returns the record to log."""
        step, sae = self.steps_done, self.sae
        alphas, targets = self.schedule_at(step)
        rate = learning_rate_at(self.scale, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        x, alpha = x.to(self.device).float() * self.units.scale, self.alpha_for(alphas)
        forward = sae(x, alpha, self.lambda_S, self.dtype)
        self.optimizer.zero_grad()
        forward.loss_S.sum().backward()
        self.ranks.average_(*(p.grad for p in sae.parameters() if p.grad is not None))
        measured = torch.stack([forward.loss_S, forward.mse_S, forward.l1_S, forward.l0_S]).detach()
        self.ranks.average_(measured)
        loss_S, mse_S, l1_S, l0_S = measured
        grad_norm_S = self.gradient_norm()
        # The order must not move: project, step, normalise, average.
        sae.project_decoder_gradient_()
        self.optimizer.step()
        sae.normalize_()
        decays = [ema_decay_at(a, self.scale.ema_horizon) for a in alphas]
        if self.average:
            self.average.update_(torch.tensor(decays, device=self.device))

        measure = step % self.scale.online_every == 0 or step == self.scale.total_steps - 1
        record = {
            "layer": self.layer,
            "step": step,
            "learning_rate": rate,
            "alpha": alphas,
            "ema_decay": decays if self.average else None,
            "l0_target": targets,
            "lambda": self.lambda_S,
            "loss": loss_S,
            "mse": mse_S,
            "l1": l1_S,
            "l0": l0_S,
            "l0_average": self.measure_average(x, alpha, l0_S) if measure else None,
            "grad_norm": grad_norm_S,
            "dead": self.dead_fraction(forward.fired_SF),
            **self.measure_absorption(step, alphas, measure),
        }
        if self.sae.learned:
            record |= {
                "norm_exponent": sae.exponent.detach().flatten().clone(),
                "log_cosine_scale": sae.log_k.detach().flatten().clone(),
            }
        self.control_sparsity(l0_S, torch.tensor(targets, device=self.device))
        self.steps_done += 1
        return record

    def gradient_norm(self) -> torch.Tensor:
        """Norm of all gradients together, per seed [S]."""
        grads = [p.grad for p in self.sae.parameters() if p.grad is not None]
        return sum(g.flatten(1).square().sum(1) for g in grads).sqrt()

    def dead_fraction(self, fired_SF: torch.Tensor, window: int = 50) -> torch.Tensor:
        """Share of latents that fired on no token of the last `window` batches, per seed [S]."""
        fired_SF = fired_SF.to(torch.uint8)
        self.ranks.largest_(fired_SF)
        self.idle_steps_SF = (self.idle_steps_SF + 1).masked_fill_(fired_SF.bool(), 0)
        return (self.idle_steps_SF >= window).float().mean(-1)

    @torch.no_grad()
    def measure_average(
        self, x: torch.Tensor, alpha: float | torch.Tensor, l0_S: torch.Tensor
    ) -> torch.Tensor | None:
        """L0 of the averaged weights on a batch [S]: they are what is evaluated, and they fire more
        latents than the weights of the moment, so theirs is the L0 to hold at the target.

        An average below the weights only lags behind them: that passes, and steering by it would
        push L0 past the target, so the ratio is at least 1.
        """
        if not self.average:
            return None
        names = [name for name, _ in self.sae.named_parameters()]
        averages = dict(zip(names, self.average.average, strict=True))
        inputs = (x, alpha, self.lambda_S, self.dtype)
        average_S = torch.func.functional_call(self.sae, averages, inputs).l0_S
        self.ranks.average_(average_S)
        self.l0_ratio_S = (average_S / l0_S.clamp_min(1e-3)).clamp_min(1.0)
        return average_S

    def control_sparsity(
        self, l0_S: torch.Tensor, target_S: torch.Tensor, keep: float = 0.8
    ) -> None:
        l0_S = l0_S * self.l0_ratio_S
        old = torch.where(self.smoothed_l0_S.isnan(), l0_S, self.smoothed_l0_S)
        self.smoothed_l0_S = keep * old + (1 - keep) * l0_S
        self.lambda_S = next_lambda(self.lambda_S, self.smoothed_l0_S, target_S)

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
            return {"online_absorption": None, "online_full_absorption": None, "pace": None}
        found = self.online.measure(self.sae, self.alpha_for(alphas), self.units.scale, self.dtype)
        # One process measures for all: the pace must not come to depend on rounding.
        fractions, full = self.ranks.first([list(score) for score in zip(*found, strict=True)])
        for s, fraction in enumerate(fractions):
            self.best_absorption[s] = recent_best(self.best_absorption[s], fraction)
            self.rate[s] = adaptive_rate(fraction, self.best_absorption[s], self.rate[s])
        return {
            "online_absorption": fractions,
            "online_full_absorption": full,
            "pace": list(self.rate) if self.run.schedule == "adaptive" else None,
        }

    def export(self, seed: int, averaged: bool) -> tuple[dict, dict]:
        """Weights and blend of one seed in residual-stream units; the average's, where asked."""
        alpha = self.schedule_at(self.scale.total_steps - 1)[0][seed]
        use = self.average.applied() if averaged and self.average else contextlib.nullcontext()
        with use:
            return self.sae.export(seed, self.units.scale, alpha)

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Everything that decides what the next steps do: tensors, and numbers for JSON."""
        tensors = {f"sae.{name}": p for name, p in self.sae.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in moments.items()}
        if self.average:
            tensors |= {f"average.{i}": a for i, a in enumerate(self.average.average)}
            tensors["average_mass"] = self.average.mass_S
        tensors |= {name: getattr(self, name) for name in self._tensors}
        tensors["b_dec"] = self.units.b_dec
        numbers = {name: getattr(self, name) for name in self._numbers}
        return tensors, numbers | {"units": self.units._replace(b_dec=None)._asdict()}

    _tensors = ("lambda_S", "smoothed_l0_S", "l0_ratio_S", "idle_steps_SF")
    _numbers = ("paced", "rate", "best_absorption", "steps_done")

    @classmethod
    def restored(
        cls, scale: Scale, run: Run, layer: int, ranks: Ranks, tensors: dict, numbers: dict
    ) -> "Trainer":
        """The trainer whose state() this was."""
        units = Calibration(**numbers["units"] | {"b_dec": tensors["b_dec"].to(training_device())})
        new = cls(scale, run, layer, units, ranks)
        for name, p in new.sae.state_dict().items():
            p.copy_(tensors[f"sae.{name}"])
        adam = new.optimizer.state_dict()
        steps_done = numbers["steps_done"]  # at 0 the optimiser has nothing yet
        for i in adam["param_groups"][0]["params"] if steps_done else ():
            moments = ("step", "exp_avg", "exp_avg_sq")
            adam["state"][i] = {name: tensors[f"adam.{i}.{name}"] for name in moments}
        new.optimizer.load_state_dict(adam)
        if new.average:
            for i, average in enumerate(new.average.average):
                average.copy_(tensors[f"average.{i}"])
            new.average.mass_S = tensors["average_mass"].to(new.device)
        for name in cls._tensors:
            setattr(new, name, tensors[name].to(new.device))
        for name in cls._numbers:
            setattr(new, name, numbers[name])
        return new


class Training:
    """All layers' trainers and their place in the text: one pass of the language model feeds all.

    Begun anew, or taken up where a checkpoint left it.
    """

    def __init__(
        self,
        scale: Scale,
        run: Run,
        lm: LanguageModel,
        first_document: int,
        ranks: Ranks,
        checkpoint: tuple[dict, dict] | None = None,
    ):
        self.scale, self.ranks = scale, ranks
        mine = ranks.lanes(scale.lanes)
        if checkpoint:
            tensors, state = checkpoint
            lanes = {i: Lane(**state["lanes"][str(i)]) for i in mine}
            self.position = Position(state["block"], state["batch"], lanes)
        else:
            self.position = Position(0, 0, {i: Lane(first_document, []) for i in mine})
        self.text = ahead(text_blocks(scale, lm, self.position.lanes))
        self.blocks = residual_blocks(scale, lm, self.text)
        self.trainers = []
        if checkpoint:
            for layer in scale.layers:
                start = f"{layer}."
                own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
                numbers = state["layers"][str(layer)]
                self.trainers.append(Trainer.restored(scale, run, layer, ranks, own, numbers))
        else:
            first = next(self.blocks, None)
            require(
                first is not None,
                f"the text of scale {scale.name!r} is shorter than one block of "
                f"{scale.block_contexts} contexts: add text or lower block_contexts",
            )
            self.blocks = chain([first], self.blocks)
            for i, layer in enumerate(scale.layers):
                units = calibrate(ranks.joined(first.rows[:, i]))
                self.trainers.append(Trainer(scale, run, layer, units, ranks))
        for trainer in self.trainers:
            trainer.online = online_absorption(scale, lm, trainer.layer)

    @property
    def steps_done(self) -> int:
        return self.trainers[0].steps_done

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """What __init__ takes as a checkpoint; of several processes all must call it."""
        tensors, layers = {}, {}
        for trainer in self.trainers:
            own, layers[str(trainer.layer)] = trainer.state()
            tensors |= {f"{trainer.layer}.{name}": t for name, t in own.items()}
        block, batch, lanes = self.position
        lanes = {i: lane for part in self.ranks.gathered(lanes) for i, lane in part.items()}
        place = {
            "step": self.steps_done,
            "block": block,
            "batch": batch,
            "lanes": {i: asdict(lanes[i]) for i in lanes},
        }
        return tensors, place | {"layers": layers}

    def train(
        self, log: TrainingLog, checkpoints: Checkpoints, signals: Signals, flush_every: int = 10
    ) -> None:
        """Step to the end of the budget.  Raises Interrupted, with a checkpoint written, when asked
        to stop; ExperimentError if a loss is not finite or the text is too short."""
        scale, waiting, started = self.scale, [], time.monotonic()
        begun_at = self.steps_done
        units = [trainer.units for trainer in self.trainers]
        blocks = (without_outliers(block, units) for block in self.blocks)
        batches = shuffled_batches(scale, blocks, self.ranks, self.position)
        batches = progress_bar(batches, scale.total_steps, "training step", self.steps_done)
        signals.keep = self.ranks.world > 1
        last_checkpoint = time.monotonic()

        def flush() -> None:
            # Numbers leave the device only here: reading one is a synchronisation point.
            nonlocal waiting, started
            steps = len(waiting) / len(self.trainers)
            speed = steps * scale.batch_tokens / (time.monotonic() - started)
            log([settled(record, speed) for record in waiting])
            waiting, started = [], time.monotonic()

        def checkpoint() -> None:
            with signals.kept():
                flush()
                checkpoints.save(self.steps_done, *self.state(), log)

        try:
            while self.steps_done < scale.total_steps:
                position, batch = next(batches, (None, None))
                require(
                    position is not None,
                    f"the text of scale {scale.name!r} ended after {self.steps_done} of "
                    f"{scale.total_steps} steps: lower training_tokens or add text",
                )
                with signals.kept():
                    waiting += [t.step(batch[:, i]) for i, t in enumerate(self.trainers)]
                    self.position = position
                    if self.steps_done % flush_every == 0:
                        flush()
                if self.ranks.world > 1 and self.steps_done % flush_every:
                    continue  # several processes agree on the next only now and then
                due = time.monotonic() - last_checkpoint >= scale.checkpoint_seconds
                wishes = self.ranks.gathered((signals.received or 0, due))
                stop, due = (max(wish) for wish in zip(*wishes, strict=True))
                if stop:
                    raise Interrupted(stop)
                if due:
                    checkpoint()
                    last_checkpoint = time.monotonic()
        except Interrupted:
            checkpoint()
            raise
        self.text.close()  # its thread must not tokenise while SAE-Bench does
        if self.steps_done > begun_at:
            checkpoint()
        if signals.received:  # during the last step
            raise Interrupted(signals.received)


def settled(record: dict, tokens_per_second: float) -> dict:
    """A record as plain numbers; raises if a loss is not finite."""
    plain = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in record.items()}
    for seed, loss in enumerate(plain["loss"]):
        if not math.isfinite(loss):
            parts = ", ".join(
                f"{k}={plain[k][seed]:.4g}" for k in ("mse", "l1", "lambda", "grad_norm")
            )
            raise ExperimentError(
                f"the loss is {loss} at step {plain['step']}, layer {plain['layer']}, seed {seed} "
                f"({parts}): lower learning_rate or look at the activations; nothing was evaluated"
            )
    return plain | {"tokens_per_second": round(tokens_per_second)}


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ main                                                                                           │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def usage() -> str:
    rows = [f"  {name:<7} {run.title}" for name, run in RUNS.items()]
    return "\n".join(["the runs:", "  run_0   the given baseline (never re-run)", *rows])


def chosen_run(arguments: list[str]) -> tuple[Path, str, Run]:
    parser = argparse.ArgumentParser(
        description="Train and evaluate one run.",
        epilog=usage(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out_dir", help="folder of the run; its last part names a row of RUNS")
    out_dir = parser.parse_args(arguments).out_dir
    require(
        bool(out_dir), f"{usage()}\nerror: --out_dir is missing: say --out_dir=run_1, for example"
    )
    path = Path(out_dir)
    name = Path(os.path.normpath(path)).name
    require(
        name != "run_0",
        "run_0 holds the given baseline and is never re-run: choose another row, say run_1",
    )
    require(
        name in RUNS,
        f"{usage()}\nerror: {name!r} is not a row of RUNS: choose one of {', '.join(RUNS)}",
    )
    require(not path.exists() or path.is_dir(), f"--out_dir={out_dir} is a file: name a folder")
    return path, name, RUNS[name]


def execute(out_dir: Path, name: str, run: Run, scale: Scale, ranks: Ranks, signals: Signals):
    identity = {"run_name": name, "run": asdict(run), "scale": asdict(scale)}
    first = ranks.rank == 0
    if ranks.first(check_folder(out_dir, identity) if first else None):
        say(f"{out_dir} is finished (final_info.json is there): nothing to do")
        if first:  # it may have been killed in its last moment
            shutil.rmtree(out_dir / "checkpoint", ignore_errors=True)
        return
    clock = Clock()
    if first:
        preflight(scale, out_dir)
    config = identity | {
        "total_steps": scale.total_steps,
        "ema_horizon_steps": scale.ema_horizon,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "processes": ranks.world,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(*PACKAGES),
    }
    if first:
        write_atomically(out_dir / "config.json", json_text(config))
        shutil.copyfile(__file__, out_dir / "experiment.py")

    lm = load_language_model(scale)
    config["language_model"] = lm.identity
    heldout, first_document = heldout_contexts(scale, lm)
    clock.lap("language model and text")
    for layer in scale.layers:
        first_letter_probes(scale, lm, layer)
    clock.lap("first-letter probes")

    log = TrainingLog(out_dir / "training_log.jsonl", name, config, writes=first)
    checkpoints = Checkpoints(out_dir / "checkpoint", identity, writes=first)
    checkpoint = checkpoints.read(log)
    if checkpoint:
        say(f"going on from the checkpoint of step {checkpoint[1]['step']}")
    elif first:
        for leftover in WRITTEN:  # by an execution that did not reach a checkpoint
            path = out_dir / leftover
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    training = Training(scale, run, lm, first_document, ranks, checkpoint)
    training.train(log, checkpoints, signals)
    ranks.part()
    clock.lap("training")
    if not first:
        return  # the first process evaluates, alone

    signals.keep = False
    hashes = save_saes(scale, lm, training.trainers, out_dir / "sae")
    saved = {
        layer: {
            f"{name}_{folder}_{digest[:12]}": out_dir / "sae" / folder
            for folder, digest in hashes.items()
            if folder.startswith(f"layer_{layer}_")
        }
        for layer in scale.layers
    }
    finished = out_dir / "checkpoint" / "evaluated"
    units = {trainer.layer: trainer.units for trainer in training.trainers}
    alphas = run.readout_alphas
    results = evaluate(scale, alphas, lm, units, saved, heldout, log.records, finished, clock)
    text = json_text(results)
    sums = {str(p.relative_to(out_dir)): file_sha256(p) for p in written_files(out_dir)}
    sums["final_info.json"] = hashlib.sha256(text.encode()).hexdigest()
    config |= {"weights_sha256": hashes, "seconds": clock.seconds | {"total": clock.total}}
    write_atomically(out_dir / "config.json", json_text(config | {"sha256": sums}))
    write_atomically(out_dir / "final_info.json", text)
    shutil.rmtree(checkpoints.folder)
    print_summary(results, clock)


NETWORK = ("httpx", "httpx2", "requests", "urllib3", "aiohttp", "huggingface_hub", "datasets")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error (last on stderr), 75 stopped by SIGTERM, 130 by Ctrl-C: the
    same command goes on after the last two."""

    def complain(message: str, status: int = 1) -> int:
        print(f"error: {message}".replace("error: the runs:", "the runs:"), file=sys.stderr)
        return status

    again = "run the same command again"
    try:
        signals = Signals()
        out_dir, name, run = chosen_run(sys.argv[1:] if arguments is None else arguments)
        scale = choose_scale()
        ranks = Ranks()
        say(f"scale {scale.name}: {name}, {run.title}")
        with locked(out_dir) if ranks.rank == 0 else contextlib.nullcontext():
            execute(out_dir, name, run, scale, ranks, signals)
    except ExperimentError as error:
        return complain(str(error))
    except torch.OutOfMemoryError:
        return complain(
            "the GPU's memory is full: free it, or lower block_contexts, n_seeds or d_sae of the "
            f"scale, then {again}"
        )
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        reason = reason.splitlines()[0]
        if isinstance(error, MemoryError) or "can't allocate memory" in reason:  # torch's own words
            return complain(
                f"memory is full: free some, or lower block_contexts or n_seeds, then {again}"
            )
        lost = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
        on_disk = getattr(error, "errno", None) or isinstance(error, SafetensorError)
        if "inline_container" in reason:  # torch.save, of a full disk
            on_disk, reason = True, "a file could not be written"
        if on_disk and not lost:  # of a full disk safetensors has an error of its own
            where = f" at {error.filename}" if getattr(error, "filename", None) else ""
            return complain(
                f"{reason}{where}: free space or fix the folder, then {again} (what was written "
                "before is still valid)"
            )
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in NETWORK:
            return complain(f"{reason}: check the network, then {again}")
        raise
    except Interrupted as stop:
        what = signal.Signals(stop.signal_number).name
        status = 130 if stop.signal_number == signal.SIGINT else 75
        return complain(f"stopped by {what}: {again} to go on from where it stood", status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
