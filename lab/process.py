"""The process: its errors and what it says, named seeds, devices, ranks, signals, its lock."""

import contextlib
import fcntl
import hashlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


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


def seed_for(*names: object) -> int:
    """The seed of a named stream of random numbers: no two uses share one or depend on order."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:6], "big")


def training_device() -> torch.device:
    """This process's GPU where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


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
