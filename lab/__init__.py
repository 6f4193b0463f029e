"""The laboratory: what must be the same for every run.  Each room has one subject, and none knows
experiment.py: the experiment asks, the laboratory answers.
"""

import contextlib
import ctypes
import sys

# sae-bench requires torchvision but never imports it; transformers does if it can, and one built
# for another torch breaks that import.  Must stand before transformers is first imported.
sys.modules.setdefault("torchvision", None)

# glibc hands large tensors back to the system and faults them in again at every step, which doubles
# the time of elementwise work: let it keep them (no mmap for malloc, no trimming).
if sys.platform == "linux":
    with contextlib.suppress(OSError, AttributeError):
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
