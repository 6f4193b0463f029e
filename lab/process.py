"""The process: what it says, its errors, its signals, its clock and its lock."""

import contextlib
import fcntl
import io
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm


class ExperimentError(Exception):
    """Something the user can mend: main() prints it, last on stderr, and exits with 1."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ExperimentError(message)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
def file_lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether the lock was free; if so, or after waiting for it, it is ours inside the `with`.

    It goes with the process, however that ends.  Raises ExperimentError where the file system of
    `path` knows no locks.
    """
    with path.open("w") as lock:
        free = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            free = False
        except OSError as error:
            raise ExperimentError(
                f"the file system of {path.parent} has no locks ({_reason(error)}), and without "
                "them two processes would write over each other: use a folder on another one "
                "(COSINE_SAE_CACHE says where the cache is, --out_dir where the run is)"
            ) from error
        yield free


@contextlib.contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """One process per run folder."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with file_lock(out_dir / ".lock") as free:
        require(free, f"another process is working on {out_dir}: wait for it")
        yield


NETWORK = ("httpx", "httpx2", "requests", "urllib3", "aiohttp", "huggingface_hub", "datasets")
AGAIN = "run the same command again"


def told(error: BaseException, experiment: str) -> int:
    """Say an error in one sentence, last on stderr, and return the exit status: 1, or 75 where
    SIGTERM and 130 where Ctrl-C asked the run to stop.

    An error of the experimenter's own code (in the file `experiment`), or one that nobody foresaw,
    is raised again: its traceback says more than any advice.
    """
    if isinstance(error, Interrupted):
        what = signal.Signals(error.signal_number).name
        status = 130 if error.signal_number == signal.SIGINT else 75
        return _complain(f"stopped by {what}: {AGAIN} to go on from where it stood", status)
    if isinstance(error, ExperimentError):
        return _complain(str(error))
    theirs = _raised_in(error, Path(experiment).resolve()) == "experiment"
    if memory := _of_memory(error):
        if theirs:
            traceback.print_exception(error)
        return _complain(memory)
    sentence = None if theirs else _of_disk(error) or _of_network(error)
    if sentence is None:
        raise error
    return _complain(sentence)


def _complain(message: str, status: int = 1) -> int:
    print(f"error: {message}".replace("error: the runs:", "the runs:"), file=sys.stderr)
    return status


def _raised_in(error: BaseException, experiment: Path) -> str:
    """Whose innermost line stands in an error's traceback: the experiment's or the laboratory's."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        path = Path(frame.f_code.co_filename).resolve()
        if path == experiment or path.parent == Path(__file__).resolve().parent:
            return "experiment" if path == experiment else "laboratory"
    return "nobody"


def _reason(error: BaseException) -> str:
    known = getattr(error, "strerror", None)
    return str(known).splitlines()[0] if known else first_line(error)


def _of_memory(error: BaseException) -> str | None:
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is full: free it, or lower block_contexts, n_seeds or d_sae of "
            f"the scale, or name fewer target_l0s, then {AGAIN}"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in _reason(error):  # torch's words
        return f"memory is full: free some, or lower block_contexts or n_seeds, then {AGAIN}"
    return None


def _of_disk(error: BaseException) -> str | None:
    lost = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
    unwritten = "inline_container" in _reason(error)  # torch.save, of a full disk
    if lost or not (unwritten or getattr(error, "errno", None)):
        return None
    reason = "a file could not be written" if unwritten else _reason(error)
    # Of a copy the second file is the one that was written.
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)
    where = f" at {path}" if path else ""
    return (
        f"{reason}{where}: free space or fix the folder, then {AGAIN} (what was written before is "
        "still valid)"
    )


def _of_network(error: BaseException) -> str | None:
    if isinstance(error, shutil.Error):
        return None
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in NETWORK:
        return f"{_reason(error)}: check the network, then {AGAIN}"
    return None
