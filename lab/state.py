"""Everything that decides what the next steps do: whole objects in a file, nothing listed by hand.

A checkpoint pickles the trainers as they stand, with torch.save: a new parameter, buffer, average,
window, generator or optimiser group needs no line here, and what two names share stays shared.
What cannot be put back is refused by name instead of being lost.
"""

import contextlib
import io
import pickle
import sys
import types
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.serialization import default_restore_location

from lab.devices import training_device
from lab.process import ExperimentError, first_line
from lab.storage import disk_errors_named


def check_kept(state: dict) -> None:
    """Raises ExperimentError, naming the attribute, if a checkpoint would lose part of `state`.

    Nothing is written, and no tensor copied."""
    for name, value in _within(state, "training", set()):
        if isinstance(value, torch.Tensor) and (
            value._backward_hooks or getattr(value, "_post_accumulate_grad_hooks", None)
        ):
            raise ExperimentError(
                f"a checkpoint would lose the hooks of {name}: do what they do in the step itself"
            )
    if found := _culprit(state | _unpickled(state), "training", set()):
        name, value, error = found
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise ExperimentError(
            f"a checkpoint would lose {name}, of type {kind} ({error}): keep what it needs as "
            "numbers, tensors, a torch.Generator or other things that can be pickled"
        )


def outside(module: str) -> dict[str, bytes]:
    """What a module and its classes hold beside objects, functions left out: {name: pickled}."""
    space = vars(sys.modules[module])
    values = {name: v for name, v in space.items() if not name.startswith("__")}
    for name, kind in [*values.items()]:
        if isinstance(kind, type) and kind.__module__ == module:
            own = {f"{name}.{key}": v for key, v in vars(kind).items() if not key.startswith("_")}
            values |= own
    found = {}
    for name, value in values.items():
        if not callable(value) and not isinstance(value, types.ModuleType):
            with contextlib.suppress(Exception):  # what cannot be pickled cannot be watched
                found[name] = pickle.dumps(value)
    return found


def check_outside(module: str, before: dict[str, bytes]) -> None:
    """Raises ExperimentError if anything of outside() has changed: no checkpoint and no saved SAE
    would hold it."""
    now = outside(module)
    changed = sorted(
        name for name in before.keys() | now.keys() if before.get(name) != now.get(name)
    )
    if changed:
        raise ExperimentError(
            f"training changed {', '.join(changed)}, of the script and not of an object: a "
            "checkpoint and a saved SAE would lose it; make it an attribute of the trainer, or a "
            "buffer of the SAE"
        )


def save_state(state: dict, path: Path) -> None:
    """Raises ExperimentError as check_kept() does; OSError, with the path, where it cannot be
    written."""
    check_kept(state)
    with disk_errors_named(path):
        torch.save(state | _unpickled(state), path)


def load_state(path: Path) -> dict:
    """What save_state() wrote; a GPU's tensors come to this process's GPU.

    It is unpickled, and so can execute code: only for files of one's own, checked beforehand.
    """
    device = str(training_device())

    def place(storage, location: str):
        return storage if location == "cpu" else default_restore_location(storage, device)

    state = torch.load(path, map_location=place, weights_only=False)
    for tensor, gradient in state.pop("gradients"):
        tensor.grad = gradient
    for optimizer, own in state.pop("optimizers"):
        vars(optimizer).update(own)
    return state


def _unpickled(state: dict) -> dict:
    """What torch leaves out when it pickles: gradients, which whoever sums them over steps still
    needs, and what somebody hung on an optimiser."""
    gradients, optimizers = [], []
    for _, value in _within(state, "training", set()):
        if isinstance(value, torch.Tensor) and value.is_leaf and value.grad is not None:
            gradients.append((value, value.grad))
        if isinstance(value, torch.optim.Optimizer):
            fresh = type(value).__new__(type(value))
            fresh.__setstate__(value.__getstate__())
            own = {name: v for name, v in vars(value).items() if name not in vars(fresh)}
            own = {name: v for name, v in own.items() if name[0] != "_" and not callable(v)}
            optimizers.append((value, own))
    return {"gradients": gradients, "optimizers": optimizers}


def _children(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from ((str(i), item) for i, item in enumerate(value))
    elif not isinstance(value, type | torch.Tensor | types.ModuleType):
        yield from getattr(value, "__dict__", {}).items()
        for kind in type(value).__mro__:
            slots = getattr(kind, "__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    yield name, getattr(value, name)


def _within(value: object, name: str, seen: set[int]) -> Iterator[tuple[str, object]]:
    """An object and all that hangs on it, with the names of the way there."""
    if id(value) not in seen:
        seen.add(id(value))
        yield name, value
        for key, child in _children(value):
            yield from _within(child, f"{name}.{key}", seen)


class _Trial(pickle.Pickler):
    """Pickles into nothing, passing over tensors."""

    def __init__(self):
        super().__init__(io.BytesIO())

    def reducer_override(self, value: object):
        return (torch.empty, (0,)) if isinstance(value, torch.Tensor) else NotImplemented


def _culprit(value: object, name: str, seen: set[int]) -> tuple[str, object, str] | None:
    """(name, object, why) of the innermost thing in `value` that cannot be pickled."""
    try:
        _Trial().dump(value)
        return None
    except Exception as error:  # every kind of object has its own
        reason = first_line(error)
    seen.add(id(value))
    for key, child in _children(value):
        if id(child) not in seen and (found := _culprit(child, f"{name}.{key}", seen)):
            return found
    return name, value, reason
