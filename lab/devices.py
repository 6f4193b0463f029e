"""Where a run computes: its GPU or kind of CPU, and the processes that train together."""

import os
import platform
from pathlib import Path

import torch
import torch.distributed as dist

from lab.process import require


def training_device() -> torch.device:
    """This process's GPU where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16")  # the best first


def processor() -> tuple[str, str]:
    """The CPU: (model, the best of BFLOAT16_UNITS it has, or "no_bf16"; "unknown" off Linux).

    bfloat16 products are rounded in another order by other units, so runs of two kinds of CPU
    differ in their last digits, and then in more.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), "unknown"
    about = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    about = {name.strip(): value.strip() for name, value in about.items()}
    flags = about.get("flags", "").split()
    units = next((unit for unit in BFLOAT16_UNITS if unit in flags), "no_bf16")
    return about.get("model name", platform.machine()), units


def device_kind() -> str:
    """What rounds this process's products: the GPU by its name, or the kind of CPU."""
    if torch.cuda.is_available():
        return f"cuda {torch.cuda.get_device_name(training_device())}"
    return f"cpu {processor()[1]}"


def on_device(numbers: list[float], device: torch.device) -> torch.Tensor:
    """[len(numbers)], float32, made there one by one: copying a list to a GPU is waiting for all
    that it has still to do."""
    made = [torch.full((), n, dtype=torch.float32, device=device) for n in numbers]
    return torch.stack(made)


class Ranks:
    """The processes that train together under torchrun; for a single one all of it is a no-op."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world > 1:
            if torch.cuda.is_available():
                here, gpus = training_device(), torch.cuda.device_count()
                require(
                    here.index < gpus,
                    f"{here.index + 1} processes or more share this machine, and it has "
                    f"{gpus} GPU{'s' * (gpus != 1)}: start one a GPU, torchrun "
                    f"--nproc_per_node={gpus}",
                )
                torch.cuda.set_device(here)
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

    def total_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which becomes its sum over the processes."""
        if self.world > 1:
            shared = tensor.to(training_device())  # NCCL takes none of the CPU
            dist.all_reduce(shared)
            if shared is not tensor:
                tensor.copy_(shared)
        return tensor

    def average_(self, *tensors: torch.Tensor) -> None:
        """Each tensor becomes its mean over the processes."""
        for tensor in tensors if self.world > 1 else ():
            self.total_(tensor).div_(self.world)

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
