"""training_log.jsonl, and Weights & Biases as well where WANDB_PROJECT is set."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from lab.process import ExperimentError, first_line
from lab.storage import write_atomically

WANDB_ID = "wandb_id"  # a file beside the log: which run of Weights & Biases is this training's


def told_by_wandb(ask: Callable[[ModuleType], object]) -> object:
    """ask(wandb), a question to Weights & Biases.  Raises ExperimentError where that is not
    installed, does not know who asks, or does not answer."""
    try:
        import wandb
    except ImportError as error:
        raise ExperimentError(
            f"WANDB_PROJECT is set, but wandb cannot be imported ({error}): install it, or unset "
            "WANDB_PROJECT"
        ) from error
    try:
        return ask(wandb)
    except (wandb.Error, ValueError) as error:  # ValueError: WANDB_MODE and the like
        raise ExperimentError(
            f"Weights & Biases refuses ({first_line(error)}): run `wandb login`, set "
            "WANDB_MODE=offline, or unset WANDB_PROJECT"
        ) from error


def check_wandb() -> None:
    """Before any work: the log can be sent where WANDB_PROJECT says.  Raises ExperimentError."""
    if os.environ.get("WANDB_PROJECT"):
        told_by_wandb(lambda wandb: wandb.login(verify=True))


class TrainingLog:
    """The log of one training: what it measured, a line per step and layer."""

    def __init__(self, path: Path, name: str, config: dict, writes: bool = True):
        self.path, self.writes, self.wandb = path, writes, None
        self.records: list[dict] = []
        self.size, self.digest = 0, hashlib.sha256()
        if writes and os.environ.get("WANDB_PROJECT"):
            self.wandb = told_by_wandb(lambda wandb: self._wandb_run(wandb, name, config))

    def _wandb_run(self, wandb: ModuleType, name: str, config: dict) -> object:
        """Of a training that is taken up the run that it had; its steps are not sent twice."""
        held = self.path.with_name(WANDB_ID)
        known = held.read_text(encoding="utf-8").strip() if held.exists() else None
        run = wandb.init(name=name, config=config, id=known, resume="allow")
        held.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(held, run.id)
        return run

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
        if not self.path.exists():  # somebody emptied the cache meanwhile
            whole = "".join(json.dumps(r, allow_nan=False) + "\n" for r in self.records).encode()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(whole[: self.size])
        with self.path.open("ab") as file:
            file.write(lines)
        self.size += len(lines)
        self.digest.update(lines)
        for r in records if self.wandb else ():
            flat = {k: sum(v) / len(v) if isinstance(v, list) else v for k, v in r.items()}
            self.wandb.log({f"layer_{r['layer']}/{k}": v for k, v in flat.items()}, step=r["step"])


def settled(records: list[dict]) -> list[dict]:
    """Records with lists for tensors, which leave the device together: each would have to be waited
    for.  Raises ExperimentError if a loss is not finite."""
    tensors = {
        (n, name): value.detach()
        for n, record in enumerate(records)
        for name, value in record.items()
        if isinstance(value, torch.Tensor)
    }
    lists: list[dict] = [{} for _ in records]
    for kind in dict.fromkeys((t.device, t.dtype) for t in tensors.values()):  # one, as it stands
        alike = {place: t for place, t in tensors.items() if (t.device, t.dtype) == kind}
        parts = torch.cat([t.flatten() for t in alike.values()]).cpu()
        parts = parts.split([t.numel() for t in alike.values()])
        for ((n, name), t), part in zip(alike.items(), parts, strict=True):
            lists[n][name] = part.view(t.shape).tolist()
    return [finite(record | plain) for record, plain in zip(records, lists, strict=True)]


def finite(plain: dict) -> dict:
    """A record as it is; raises ExperimentError if its loss is not finite."""
    for i, loss in enumerate(plain["loss"]):
        if not math.isfinite(loss):
            parts = ", ".join(
                f"{k}={plain[k][i]:.4g}" for k in ("mse", "l1", "lambda", "grad_norm")
            )
            raise ExperimentError(
                f"the loss is {loss} at step {plain['step']}, layer {plain['layer']}, SAE {i} "
                f"({parts}): lower learning_rate or look at the activations; nothing was evaluated"
            )
    return plain
