"""Random numbers: every stream has a name, and a stopped run goes on with the same ones."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def seed_for(*names: object) -> int:
    """The seed of a named stream of random numbers: no two uses share one or depend on order."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:6], "big")


def seed_everything(*names: object) -> None:
    """The global generators of Python, numpy and torch, for code that draws from those."""
    seed = seed_for(*names) % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator SAE-Bench's libraries use
    torch.manual_seed(seed)


def generators() -> dict[str, Any]:
    """Where the global generators stand."""
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_generators(state: dict[str, Any]) -> None:
    """Put the global generators where generators() found them."""
    random.setstate(state["random"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
