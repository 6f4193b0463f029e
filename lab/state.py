"""Everything that decides what the next steps do: found in an object, not listed by hand.

A checkpoint holds all attributes of the trainer, and of what hangs on it: a new parameter, buffer,
average, schedule or optimiser group needs no line here.  What could not be put back is refused by
name instead of being lost.
"""

import sys
import types
from collections import deque
from dataclasses import fields, is_dataclass, replace

import numpy as np
import torch

from lab.devices import training_device
from lab.process import ExperimentError

PLAIN = (bool, int, float, str, type(None))
# Made anew by whoever makes their owner, and the same ever after.
REBUILT = (torch.device, torch.dtype, torch.Size, type, types.BuiltinFunctionType)
OF_A_MODULE = frozenset(vars(torch.nn.Module()))  # what every torch.nn.Module has


def _is_python(value: object) -> bool:
    """Of a class written in Python all the way up, so that all it holds are its attributes."""
    modules = [sys.modules.get(kind.__module__) for kind in type(value).__mro__[:-1]]
    files = [getattr(module, "__file__", None) or "" for module in modules]
    return hasattr(value, "__dict__") and all(file.endswith(".py") for file in files)


def _is_rebuilt(value: object) -> bool:
    function = isinstance(value, types.FunctionType) and not value.__closure__
    return function or isinstance(value, REBUILT) or getattr(type(value), "rebuilt", False)


class Packing:
    """JSON that stands for an object, and its tensors beside it: {name: tensor}, shared storage
    taken once.  Raises ExperimentError for what it would lose."""

    def __init__(self, value: object, name: str):
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple, str] = {}  # of tensors already taken, by where they lie
        self._storages: set[int] = set()
        self._objects: dict[int, object] = {}  # already packed; kept, so that no id comes again
        self.json = self._pack(value, name)

    def _pack(self, value: object, name: str):
        if isinstance(value, PLAIN):
            return value.item() if isinstance(value, np.generic) else value
        if isinstance(value, torch.Tensor):
            return {"tensor": self._take(value, name), "cpu": value.device.type == "cpu"}
        if isinstance(value, np.ndarray | np.generic):
            array = torch.from_numpy(np.array(value))
            return {"array": self._take(array, name), "dtype": str(value.dtype)}
        if isinstance(value, list | tuple | set | deque):
            kind = next(k for k in ("list", "tuple", "set", "deque") if isinstance(value, _KIND[k]))
            items = sorted(value, key=repr) if kind == "set" else value
            return {kind: [self._pack(item, f"{name}.{i}") for i, item in enumerate(items)]}
        if isinstance(value, dict):
            if wrong := [key for key in value if not isinstance(key, PLAIN)]:
                raise _lost(f"the key {wrong[0]!r} of {name}", wrong[0])
            pairs = [[key, self._pack(item, f"{name}.{key}")] for key, item in value.items()]
            return {"dict": pairs}
        if isinstance(value, torch.Generator):
            return {"generator": self._take(value.get_state(), name)}
        if id(value) in self._objects or _is_rebuilt(value):
            return {"same": True}
        self._objects[id(value)] = value
        if isinstance(value, torch.nn.Module):
            state = self._pack(dict(value.state_dict()), name)
            return {"module": state, "beside": self._beside(value, name)}
        if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            return {"stateful": self._pack(value.state_dict(), name)}
        if is_dataclass(value) and type(value).__dataclass_params__.frozen:
            own = {field.name: getattr(value, field.name) for field in fields(value)}
            return {"frozen": self._pack(own, name)}
        if _is_python(value):
            return {"object": self._pack(vars(value), name)}
        raise _lost(name, value)

    def _beside(self, module: torch.nn.Module, name: str):
        """Attributes of a module and its parts that its state_dict does not hold."""
        found = {}
        for path, part in module.named_modules():
            own = {key: v for key, v in vars(part).items() if key not in OF_A_MODULE}
            own |= {key: part.get_buffer(key) for key in sorted(part._non_persistent_buffers_set)}
            found[path] = self._pack(own, f"{name}.{path}".rstrip("."))
        return {"dict": [[path, own] for path, own in found.items()]}

    def _take(self, tensor: torch.Tensor, name: str) -> str:
        """The name under which a tensor is held: its own, or that of the same one elsewhere."""
        held, storage = tensor.detach(), tensor.untyped_storage().data_ptr()
        place = storage, held.storage_offset(), held.shape, held.stride(), held.dtype
        if place not in self._names:
            whole = held.is_contiguous() and storage not in self._storages
            self.tensors[name] = held if whole else held.clone().contiguous()
            self._storages.add(storage)
            self._names[place] = name
        return self._names[place]


_KIND = {"list": list, "tuple": tuple, "set": set, "deque": deque}


def _lost(name: str, value: object) -> ExperimentError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return ExperimentError(
        f"a checkpoint would lose {name}, a {kind}: make it a number, a string, a tensor, a "
        "torch.Generator, a list or dict of these, or something with state_dict() and "
        "load_state_dict()"
    )


def put_back(value: object, held, tensors: dict[str, torch.Tensor]) -> object:
    """What a Packing held, in place where `value` (the object made anew) has room for it.

    Tensors are copied into those that are there, so that an optimiser's or an average's parameters
    stay the model's own.  Returns what the attribute is to be; raises LookupError or TypeError if
    `held` is not of such an object.
    """
    if not isinstance(held, dict):
        return held
    (kind, inner), *more = held.items()
    if kind == "tensor":
        tensor = tensors[inner]
        if _has_room_for(value, tensor):
            with torch.no_grad():
                return value.copy_(tensor)
        return tensor if dict(more)["cpu"] else tensor.to(training_device())
    if kind == "array":
        array = tensors[inner].numpy().astype(dict(more)["dtype"])
        return array if array.shape else array[()]
    if kind in _KIND:
        own = list(value) if isinstance(value, list | tuple | deque) else []
        own += [None] * (len(inner) - len(own))
        items = [put_back(old, item, tensors) for old, item in zip(own, inner, strict=False)]
        if hasattr(value, "_make"):  # a NamedTuple
            return value._make(items)
        more = {"maxlen": getattr(value, "maxlen", None)} if kind == "deque" else {}
        return _KIND[kind](items, **more)
    if kind == "dict":
        own = value if isinstance(value, dict) else {}
        new = {key: put_back(own.get(key), item, tensors) for key, item in inner}
        own.clear()
        own.update(new)
        return own
    if kind == "generator":
        value.set_state(tensors[inner].cpu())
    elif kind == "module":
        value.load_state_dict(put_back(None, inner, tensors))
        for path, own in dict(more)["beside"]["dict"]:
            _put_attributes_back(value.get_submodule(path), own, tensors)
    elif kind == "stateful":
        value.load_state_dict(put_back(None, inner, tensors))
    elif kind == "frozen":
        return replace(value, **put_back(None, inner, tensors))
    elif kind == "object":
        _put_attributes_back(value, inner, tensors)
    return value


def _has_room_for(value: object, tensor: torch.Tensor) -> bool:
    alike = isinstance(value, torch.Tensor) and value.dtype == tensor.dtype
    return alike and value.shape == tensor.shape


def _put_attributes_back(owner: object, held: dict, tensors: dict[str, torch.Tensor]) -> None:
    for name, item in held["dict"]:
        if not (isinstance(item, dict) and "same" in item):
            setattr(owner, name, put_back(getattr(owner, name, None), item, tensors))
