"""A GPU that is not there: tensors that say "cuda:0", compute on the CPU, refuse what CUDA refuses.

Inside `with pretend_cuda() as gpu:` torch.cuda says that there is a GPU, and whatever is made on or
moved to "cuda" is a GpuTensor around a tensor of the CPU.  As on a real one

  * operands on different devices are refused, but for what CUDA takes: scalars of the CPU where the
    operator is a TensorIterator's, indices of the CPU into a tensor of the GPU, and copies.  Which
    operator checks how is read from PyTorch's own table (native_functions.yaml, shipped with it);
  * a GpuTensor is no NumPy array, and a generator of the CPU does not draw on the GPU;
  * the GPU's generator is another than the CPU's, and torch.manual_seed() seeds both;
  * a file of torch.save() says of each storage where it lay, and torch.load() puts it there again,
    or where map_location says;
  * "nccl" wants tensors of the GPU that lie together, one GPU a process, and moves objects through
    the GPU (behind it stands gloo);
  * there are `devices` GPUs, of which a process has set_device()'s, and one that is full is so.

It also counts: `gpu.kernels` (operators that compute, by name: about the launches), `gpu.waits`
(where the CPU has to wait for the GPU, by kind) and the bytes of all storages on it, each once
however many tensors share it: `gpu.live`, `gpu.peak`, and by `with gpu.watched() as found:` the
peak of a part, with who made what lived then.

What it cannot show: speed, kernels' own rounding and working memory, what the allocator rounds up
or keeps, streams, a copy that is read before it has arrived, anything but strided tensors.  A
thread sees the tensors that it is given and makes none on the GPU.  The backend behind it
(PyTorch's privateuseone, with Python alone) is registered for good: use it in a process of its own.
"""

import atexit
import contextlib
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed.distributed_c10d as c10d
import torchgen
from torch.optim.optimizer import _foreach_supported_types as foreach
from torch.overrides import TorchFunctionMode
from torch.serialization import _package_registry as kinds_of_storage
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

BACKEND = "pretend"  # what C++ calls the device, which has no CUDA to talk to
PROGRAM = str(Path(__file__).resolve().parent.parent)
ANY_DEVICES = {"copy_", "_foreach_copy_", "_to_copy"}
INDEXING = {"index.Tensor", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index.Tensor"}
# How large their result is, or what it is, the CPU must know before it goes on.
READING = {
    *("nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"),
    *("unique_consecutive", "bincount", "repeat_interleave.Tensor"),
}
# What NCCL has a type for (its ncclDataType_t, and PyTorch's ncclDataType map).
BY_NCCL = {
    *(torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


@functools.cache
def unchecked() -> set[str]:
    """Operators whose CUDA kernels take a scalar of the CPU among tensors of the GPU; all others
    want every tensor on one device."""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    operators = re.split(r"(?m)^- func: ", table.read_text())[1:]
    return {o.split("(", 1)[0] for o in operators if "device_check: NoCheck" in o}


def leaves(values: object) -> Iterator:
    """What stands in lists, tuples and dictionaries (torch's own pytree knows more, slowly)."""
    for value in values.values() if isinstance(values, dict) else values:
        if type(value) in (list, tuple, dict):
            yield from leaves(value)
        else:
            yield value


def mapped(change: Callable, value: object) -> object:
    """The same lists, tuples and dictionaries of changed values."""
    if type(value) in (list, tuple):
        return type(value)([mapped(change, item) for item in value])
    if type(value) is dict:
        return {name: mapped(change, item) for name, item in value.items()}
    return change(value)


@functools.cache
def is_view(func) -> bool:
    views = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in views)


@functools.cache
def is_composite(func) -> bool:
    return func._can_decompose()


def is_cuda(device: object) -> bool:
    return str(device).split(":")[0] in ("cuda", BACKEND)


def number(device: object) -> int:
    """Which GPU a device is that is_cuda(): without a number, this process's.

    C++ knows of one GPU: what it is told as 0 is this process's, and as i + 1 another's cuda:i."""
    gpu, device = PretendGpu.active, torch.device(device)
    if device.type == BACKEND:
        return device.index - 1 if device.index else gpu.current
    index = gpu.current if device.index is None else device.index
    if index >= gpu.devices:
        raise torch.AcceleratorError("CUDA error: invalid device ordinal")
    return index


def in_cpp(argument: object) -> object:
    """A device as C++ is told it."""
    if type(argument) not in (torch.device, str) or not is_cuda(argument):
        return argument
    index = number(argument)
    return torch.device(BACKEND, 0 if index == PretendGpu.active.current else index + 1)


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────


class Allocation:
    """The bytes of a storage on the GPU, counted from here until the storage is freed: it hangs on
    the storage, and on nothing else."""

    def __init__(self, gpu: "PretendGpu", index: int, size: int, made_by: str):
        self.gpu, self.index, self.size, self.made_by = gpu, index, 0, made_by
        self.resize(size)

    def resize(self, size: int) -> None:
        gpu, more = self.gpu, size - self.size
        if gpu.live + more > gpu.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {more} bytes.")
        self.size = size
        gpu.count_bytes(self, more)

    def __del__(self):
        self.gpu.count_bytes(self, -self.size)


def allocated(inner: torch.Tensor, index: int, operator: str = "") -> Allocation:
    """What stands for a tensor's storage on the GPU, made if it is new there."""
    storage = inner.untyped_storage()
    if not hasattr(storage, "on_gpu"):
        made_by = f"{place()} {operator}".strip()
        storage.on_gpu = Allocation(PretendGpu.active, index, storage.nbytes(), made_by)
    return storage.on_gpu


def place() -> str:
    """The innermost line of the program that is being executed, "room.py:line"."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if path.startswith(PROGRAM) and "/tests/" not in path:
            return f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def by_maker(large: Iterable[tuple[int, str]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for size, made_by in large:
        found[made_by] += size
    return dict(found.most_common())


class Watched:
    """The peak inside a `with gpu.watched()`: its bytes, and what lived then."""

    def __init__(self, gpu: "PretendGpu"):
        self.gpu, self.large = gpu, []
        self.note()

    def note(self) -> None:
        self.peak, self.large = self.gpu.live, [*self.gpu.large.values()]

    def made_by(self) -> dict[str, int]:
        """Of what lived then and is large, its bytes by who made it."""
        return by_maker(self.large)


# ── Tensors ──────────────────────────────────────────────────────────────────────────────────────


class GpuTensor(torch.Tensor):
    """`inner`, a tensor of the CPU, that says it is on the GPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int = 0, operator: str = ""):
        assert type(inner) is torch.Tensor, type(inner)
        allocated(inner, index, operator)
        new = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(BACKEND, 0),
        )
        new.inner = inner
        return new

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendGpu.active.run(func, args, kwargs or {})

    device = property(lambda self: torch.device("cuda", self.get_device()))
    is_cuda = property(lambda self: True)

    def get_device(self) -> int:
        return self.inner.untyped_storage().on_gpu.index

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    __array__ = numpy

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor):
        if not isinstance(value, GpuTensor):
            raise NotImplementedError("a tensor of the CPU as .data of one of the GPU")
        torch._C.TensorBase.data.__set__(self, value)
        self.inner = value.inner

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    # torch.nn.utils.swap_tensors, which module.to() uses for such tensors: a parameter stays the
    # object that it was, as a real one does.
    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return GpuTensor(inner["inner"])

    def __deepcopy__(self, memo: dict):
        new = GpuTensor(self.inner.clone(), self.get_device())
        if isinstance(self, torch.nn.Parameter):
            new = torch.nn.Parameter(new, self.requires_grad)
        memo[id(self)] = new
        return new.requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol: int):
        """As a real one's, with the storage of `inner`, which says where it lies."""
        if isinstance(self, torch.nn.Parameter):
            data = GpuTensor(self.inner)
            return torch._utils._rebuild_parameter, (data, self.requires_grad, {})
        made, (*what, _, hooks) = self.inner._reduce_ex_internal(protocol)
        return made, (*what, self.requires_grad, hooks)

    def __repr__(self, **_):
        return f"{self.inner!r} on {self.device}"


def kept_at(storage) -> str | None:
    """torch.save() notes it down of a storage of the GPU."""
    on_gpu = getattr(storage, "on_gpu", None)
    return f"cuda:{on_gpu.index}" if on_gpu else None


def put_at(storage, location: str):
    """torch.load() puts a storage on the GPU."""
    if not is_cuda(location):
        return None
    storage.on_gpu = Allocation(
        PretendGpu.active, number(location), storage.nbytes(), f"{place()} torch.load"
    )
    return storage


def rebuilt(storage, *args, real=torch._utils._rebuild_tensor_v2):
    """A tensor out of a file, on the device of its storage."""
    tensor = real(storage, *args)
    if not hasattr(storage._untyped_storage, "on_gpu"):
        return tensor
    return GpuTensor(tensor.detach()).requires_grad_(tensor.requires_grad)


functools.update_wrapper(rebuilt, torch._utils._rebuild_tensor_v2)  # a pickle names it


class Named(TorchFunctionMode):
    """Tells C++ "pretend" where the caller says "cuda"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0].to(torch.device("cuda"))
        if func is torch.Tensor.pin_memory:
            args[0].untyped_storage().pinned = True
            return args[0]
        if func is torch.Tensor.to and isinstance(args[0], GpuTensor):
            named = (
                a for a in (*args, *(kwargs or {}).values()) if isinstance(a, str | torch.device)
            )
            if any(is_cuda(a) and number(a) != args[0].get_device() for a in named):
                raise NotImplementedError("a copy between two GPUs")
        kwargs = {name: in_cpp(value) for name, value in kwargs.items()} if kwargs else {}
        return func(*map(in_cpp, args), **kwargs)


# ── The GPU ──────────────────────────────────────────────────────────────────────────────────────


class PretendGpu(TorchDispatchMode):
    """Sees every operator, of the CPU's tensors as well."""

    active: "PretendGpu"

    def __init__(self, memory: float, devices: int):
        super().__init__()
        self.memory, self.devices, self.current = int(memory), devices, 0
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.live = self.peak = 0  # bytes
        self.large_from = 1 << 16  # bytes: what is remembered by its maker
        self.large: dict[int, tuple[int, str]] = {}  # (bytes, maker) of what lives and is
        self.watching: list[Watched] = []
        self.random_state = torch.Generator().manual_seed(0).get_state()
        self.alone: set[str] = set()  # groups of processes that have been seen to have a GPU each

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args: tuple, kwargs: dict):
        if is_composite(func):  # in inference mode composite operators come whole
            with self:
                return func.decompose(*args, **kwargs)
        name = func.name().removeprefix("aten::")
        given = list(leaves((args, kwargs)))
        operands = [value for value in given if isinstance(value, torch.Tensor)]
        gpu = [t for t in operands if isinstance(t, GpuTensor)]
        device = kwargs.get("device")
        if name in ANY_DEVICES | INDEXING and device is None and gpu:
            first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
            here = isinstance(first, GpuTensor)
            index = first.get_device() if here else 0
        elif device is not None:
            here = is_cuda(device)
            index = number(device) if here else 0
        else:
            here = bool(gpu)
            index = gpu[0].get_device() if here else 0
        if name.startswith("c10d::"):
            self.check_collective(name, operands)
        elif gpu:
            check(name, func, args, operands)
        if not gpu and not here:
            return func(*args, **kwargs)
        self.count(name, func, args, kwargs, operands, here)
        for generator in (value for value in given if isinstance(value, torch.Generator)):
            if here:
                raise RuntimeError(
                    f"Expected a 'cuda' device type for generator but found '{generator.device}'"
                )
        if device is not None:
            kwargs = kwargs | {"device": torch.device("cpu") if here else device}
        if here and kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        wrappers = {id(t.inner): t for t in gpu}
        inner_args, inner_kwargs = mapped(unwrapped, (args, kwargs))
        draws = here and torch.Tag.nondeterministic_seeded in func.tags
        with self.own_generator() if draws else contextlib.nullcontext():
            found = func(*inner_args, **inner_kwargs)
        for wrapper in wrappers.values():
            if wrapper.shape != wrapper.inner.shape:  # resize_()
                storage = wrapper.inner.untyped_storage()
                storage.on_gpu.resize(storage.nbytes())
                torch._C.TensorBase.data.__set__(wrapper, GpuTensor(wrapper.inner))

        def wrapped(value: object) -> object:
            if not isinstance(value, torch.Tensor):
                return value
            known = wrappers.get(id(value))
            if known is not None:
                return known
            return GpuTensor(value, index, name) if here else value

        if torch.is_inference_mode_enabled() and is_view(func) and not gpu[0].is_inference():
            with torch.inference_mode(False):  # a view of an ordinary tensor is one itself
                return mapped(wrapped, found)
        return mapped(wrapped, found)

    def check_collective(self, name: str, operands: list[torch.Tensor]) -> None:
        """Raise where NCCL, or PyTorch before it, would.

        Tensors of the CPU: docs.pytorch.org/docs/stable/distributed.html (the table of backends),
        github.com/mistralai/mistral-inference/issues/252.  Two processes on one GPU:
        github.com/NVIDIA/nccl/issues/1241, github.com/NVIDIA/Megatron-LM/issues/661.  Tensors that
        do not lie together, and types: pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp
        (check_gpu_single_tensor) and NCCLUtils.cpp (getNcclDataType).
        """
        for t in operands:
            if not isinstance(t, GpuTensor):
                raise RuntimeError(f"No backend type associated with device type cpu (in {name})")
            if not t.is_contiguous():
                raise ValueError("Tensors must be contiguous")
            if t.dtype not in BY_NCCL:
                raise RuntimeError(f"Input tensor data type is not supported for NCCL: {t.dtype}")
        if operands and "nccl" not in self.alone:
            store, rank = c10d._get_default_store(), c10d.get_rank()
            store.set(f"gpu of {rank}", str(operands[0].get_device()))
            others = [store.get(f"gpu of {i}") for i in range(c10d.get_world_size())]
            if len(set(others)) < len(others):
                raise torch.distributed.DistBackendError(
                    f"NCCL error: Duplicate GPU detected : {len(others)} processes are on CUDA "
                    f"devices {', '.join(i.decode() for i in others)}"
                )
            self.alone.add("nccl")

    # ── What is counted ──

    def count(self, name: str, func, args: tuple, kwargs: dict, operands: list, here: bool) -> None:
        """Note what is launched, and what the CPU waits for."""
        gpu = [t for t in operands if isinstance(t, GpuTensor)]
        masks = [m for m in args[1] if m is not None] if name in INDEXING else []
        moved = name in ("_to_copy", "copy_")
        if name == "_local_scalar_dense":
            self.waits["item"] += 1
        elif name in READING:
            self.waits[name] += 1
        elif any(m.dtype == torch.bool for m in masks):
            self.waits["mask"] += 1
        elif moved and gpu and not here:
            self.waits["to the CPU"] += not self.is_asynchronous(name, args, kwargs)
        elif moved and len(gpu) < len(operands):
            self.waits["from the CPU"] += not self.is_asynchronous(name, args, kwargs)
        elif not all(isinstance(m, GpuTensor) for m in masks):
            self.waits["from the CPU"] += 1
        self.waits += Counter()  # none of 0
        if not is_view(func) and not name.startswith(
            ("empty", "new_empty", "detach", "_unsafe_view", "_local_scalar")
        ):
            self.kernels[name] += 1

    def is_asynchronous(self, name: str, args: tuple, kwargs: dict) -> bool:
        """Whether a copy between CPU and GPU is only queued: with non_blocking=True, and pinned
        memory on the CPU's side, which to("cpu", non_blocking=True) makes itself.  From memory that
        is not pinned the driver may wait for the stream.

        docs.nvidia.com/cuda/cuda-runtime-api/api-sync-behavior.html ("Asynchronous", 1 and 3);
        pytorch/aten/src/ATen/native/TensorConversions.cpp (_to_copy: pin_out).
        """
        asked = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
        if name == "_to_copy" and isinstance(args[0], GpuTensor):
            return bool(asked)
        on_cpu = next(t for t in args if not isinstance(t, GpuTensor))
        return bool(asked) and getattr(on_cpu.untyped_storage(), "pinned", False)

    def count_bytes(self, allocation: Allocation, more: int) -> None:
        self.live += more
        if more < 0:
            self.large.pop(id(allocation), None)
            return
        if allocation.size >= self.large_from:
            self.large[id(allocation)] = allocation.size, allocation.made_by
        self.peak = max(self.peak, self.live)
        for watched in self.watching:
            if self.live > watched.peak:
                watched.note()

    def large_by_maker(self) -> dict[str, int]:
        """Of what lives now and is large, its bytes by who made it."""
        return by_maker(self.large.values())

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watched]:
        """The peak of what lives on the GPU inside the `with`."""
        found = Watched(self)
        self.watching.append(found)
        try:
            yield found
        finally:
            self.watching.remove(found)

    # ── Random numbers ──

    @contextlib.contextmanager
    def own_generator(self) -> Iterator[None]:
        """The CPU's generator stands for the GPU's inside the `with`."""
        state = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        try:
            yield
        finally:
            self.random_state = torch.get_rng_state()
            torch.set_rng_state(state)

    def seed(self, seed: int) -> None:
        self.random_state = torch.Generator().manual_seed(seed).get_state()

    def set_random_state(self, state: torch.Tensor, *_) -> None:
        if isinstance(state, GpuTensor) or state.dtype != torch.uint8:
            raise TypeError("RNG state must be a torch.ByteTensor")
        self.random_state = state.clone()


def unwrapped(value: object) -> object:
    return value.inner if isinstance(value, GpuTensor) else value


def check(name: str, func, args: tuple, operands: list[torch.Tensor]) -> None:
    """Raise where CUDA would: operands on several devices."""

    def refuse(reason: str) -> None:
        raise RuntimeError(f"{reason} (in {func})")

    if name in ANY_DEVICES:
        return
    devices = sorted({t.get_device() for t in operands if isinstance(t, GpuTensor)})
    if len(devices) > 1:
        refuse(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:{devices[0]} and cuda:{devices[1]}!"
        )
    cpu = [t for t in operands if not isinstance(t, GpuTensor)]
    if not cpu:
        return
    if name in INDEXING:
        indexed, indices, *values = args
        on_gpu = isinstance(indexed, GpuTensor)
        if not on_gpu and any(isinstance(i, GpuTensor) for i in indices):
            refuse(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        for value in values[:1]:
            if isinstance(value, GpuTensor) != on_gpu and not (on_gpu and value.dim() == 0):
                refuse("Expected all tensors to be on the same device: indexed tensor and values")
        return
    written = {
        id(value)
        for value, argument in zip(args, func._schema.arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    scalars = [t for t in cpu if t.dim() == 0 and id(t) not in written]
    allowed = name.split(".out", 1)[0] in unchecked() or name in unchecked()
    if not allowed or len(scalars) < len(cpu) or (len(scalars) > 1 and "foreach" not in name):
        refuse(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:{devices[0]} and cpu!"
        )


class PretendModule(torch.nn.Module):
    """What torch asks of a backend."""

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)


@functools.cache
def register() -> None:
    """The backend behind GpuTensor: autograd asks for one."""
    backend_registration._setup_privateuseone_for_python_backend(BACKEND, PretendModule)


def over_gloo(backend=None, *args, real=c10d.init_process_group, **how):
    return real("gloo" if backend == "nccl" else backend, *args, **how)


@contextlib.contextmanager
def pretend_cuda(memory: float = 80e9, devices: int = 1) -> Iterator[PretendGpu]:
    """There are `devices` GPUs inside the `with`, this process's own with `memory` bytes."""
    register()
    gpu = PretendGpu.active = PretendGpu(memory, devices)

    def nothing(*_, **__) -> None:
        pass

    def set_device(device) -> None:
        gpu.current = number(device if isinstance(device, str | torch.device) else f"cuda:{device}")

    def reset_peak(*_) -> None:
        gpu.peak = gpu.live

    properties = {"name": "pretend GPU", "total_memory": gpu.memory, "major": 9, "minor": 0}
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": nothing,
        "device_count": lambda: gpu.devices,
        "current_device": lambda: gpu.current,
        "set_device": set_device,
        "get_device_name": lambda *_: properties["name"],
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(**properties),
        "is_bf16_supported": lambda *_: True,
        "mem_get_info": lambda *_: (gpu.memory - gpu.live, gpu.memory),
        "memory_allocated": lambda *_: gpu.live,
        "max_memory_allocated": lambda *_: gpu.peak,
        "reset_peak_memory_stats": reset_peak,
        **dict.fromkeys(("synchronize", "empty_cache"), nothing),
        **dict.fromkeys(("manual_seed", "manual_seed_all"), gpu.seed),
        "get_rng_state": lambda *_: gpu.random_state.clone(),
        "get_rng_state_all": lambda: [gpu.random_state.clone()],
        "set_rng_state": gpu.set_random_state,
        "set_rng_state_all": lambda states: gpu.set_random_state(*states),
    }
    lifts = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        foreach.append(GpuTensor)  # the optimisers' own list of what foreach takes
        stack.callback(foreach.remove, GpuTensor)
        kind = (0, kept_at, put_at)
        kinds_of_storage.insert(0, kind)
        stack.callback(kinds_of_storage.remove, kind)
        stack.enter_context(mock.patch.object(torch._utils, "_rebuild_tensor_v2", rebuilt))
        for module in (c10d, torch.distributed):
            stack.enter_context(mock.patch.object(module, "init_process_group", over_gloo))
        stack.enter_context(mock.patch.object(c10d, "_get_object_coll_device", lambda _: "cuda"))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device=...) by way of the CPU
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        stack.enter_context(Named())
        stack.enter_context(gpu)
        yield gpu


def pretend_for_good(**how) -> PretendGpu:
    """There is a GPU until this process ends."""
    context = pretend_cuda(**how)
    gpu = context.__enter__()
    atexit.register(context.__exit__, None, None, None)
    return gpu
