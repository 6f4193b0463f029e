"""The laboratory: what must be the same for every run.  Each room has one subject, and none knows
experiment.py: the experiment asks, the laboratory answers.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

# Said here, before any package is imported that may not be there for want of a wheel.
if sys.platform == "win32":
    raise SystemExit("error: Windows lacks the file locks used here: run this inside WSL")
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    raise SystemExit(
        "error: not every pinned package has a wheel for Python {}.{}: use Python 3.11 or 3.12 "
        "(python3.12 -m venv .venv)".format(*sys.version_info)
    )


def speak_plainly() -> None:
    """Where stdout or stderr is not UTF-8, what it cannot say becomes "?": nobody should lose a
    run's last lines to a sign."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # else it is somebody's substitute
            stream.reconfigure(errors="replace")


# Paths that the environment gives mean the folder where the command was typed; SAE-Bench works in
# another one, and would look there.  Must stand before the hub's client reads them.
for _name in (
    *("COSINE_SAE_CACHE", "XDG_CACHE_HOME", "TMPDIR", "WANDB_DIR", "WANDB_CACHE_DIR"),
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"),
    *("HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH", "TRANSFORMERS_CACHE", "TORCH_HOME"),
):
    if os.environ.get(_name):
        os.environ[_name] = str(Path(os.environ[_name]).expanduser().absolute())

# sae-bench requires torchvision but never imports it; transformers does if it can, and one built
# for another torch breaks that import.  Must stand before transformers is first imported.
sys.modules.setdefault("torchvision", None)

# glibc hands large tensors back to the system and faults them in again at every step, which doubles
# the time of elementwise work: let it keep them (no mmap for malloc, no trimming).
if sys.platform == "linux":
    with contextlib.suppress(OSError, AttributeError):
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
