"""The states that training can be taken up from, and when they are written."""

import contextlib
import hashlib
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from lab.devices import Ranks
from lab.process import ExperimentError, Interrupted, Signals, say
from lab.state import load_state, save_state
from lab.storage import file_sha256, json_text
from lab.training_log import WANDB_ID, TrainingLog, settled

UNREADABLE = (pickle.UnpicklingError, AttributeError, ImportError, EOFError)  # as a pickle


class Checkpoints:
    """The last two states of training.

    A file's name holds a checksum of its content and of the training's identity: what is damaged,
    or another training's, is not even opened.
    """

    def __init__(self, folder: Path, identity: dict, writes: bool = True):
        self.folder, self.writes = folder, writes
        self.identity = json_text(identity).encode()

    def save(self, step: int, state: dict, log: TrainingLog) -> None:
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "partial"
        save_state({"step": step, "log": [log.size, log.digest.hexdigest()], **state}, partial)
        for path in (partial, log.path):  # on disk before it can be relied on
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(self.folder / f"step_{step:08d}_{self._checksum(partial)}.pt")
        for old in self.newest_first()[2:]:
            old.unlink()

    def _checksum(self, path: Path) -> str:
        return hashlib.sha256(self.identity + file_sha256(path).encode()).hexdigest()[:16]

    def newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.pt"), reverse=True)

    def newest(self, log: TrainingLog, ranks: Ranks) -> dict | None:
        """What read() gives.  Raises ExperimentError if several processes do not see the same."""
        found = self.read(log)
        step = found["step"] if found else None
        if len(set(ranks.gathered(step))) > 1:
            raise ExperimentError(
                "the processes do not see the same checkpoint: on several machines set "
                "COSINE_SAE_CACHE to a folder that all of them share"
            )
        if found:
            say(f"going on from the checkpoint of step {step}")
        elif self.writes:
            self.clear()
        return found

    def clear(self) -> None:
        """Remove what executions that reached no checkpoint left."""
        for path in self.folder.iterdir() if self.folder.exists() else ():
            if path.name not in ("identity.json", WANDB_ID):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def read(self, log: TrainingLog) -> dict | None:
        """The newest state that is whole, the log cut back to it; else None."""
        for path in self.newest_first():
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, *UNREADABLE):
                if self._checksum(path) == path.stem.split("_")[2]:
                    state = load_state(path)
                    if log.take_up(*state["log"]):
                        return state
            say(f"checkpoint {path.name} is damaged, or not of this run: not used")
        return None


class Keeper:
    """Writes down what training does: records as they come, states now and then, and the last one
    when it is asked to stop."""

    def __init__(
        self,
        log: TrainingLog,
        checkpoints: Checkpoints,
        signals: Signals,
        ranks: Ranks,
        seconds: float,  # between two checkpoints
        flush_every: int = 10,  # steps: a number that leaves the device is a synchronisation point
    ):
        self.log, self.checkpoints, self.signals, self.ranks = log, checkpoints, signals, ranks
        self.seconds, self.flush_every = seconds, flush_every
        self.waiting: list[dict] = []
        self.tokens = 0
        self.started = self.last = time.monotonic()
        signals.keep = ranks.world > 1  # several processes must stop at the same step

    def note(self, step: int, tokens: int, records: list[dict]) -> None:
        """The records of one step, a layer each; raises ExperimentError if a loss is not finite."""
        self.waiting += records
        self.tokens += tokens
        if step % self.flush_every == 0:
            self.flush()

    def flush(self) -> None:
        speed = round(self.tokens / (time.monotonic() - self.started))
        self.log([record | {"tokens_per_second": speed} for record in settled(self.waiting)])
        self.waiting, self.tokens, self.started = [], 0, time.monotonic()

    def look(self, step: int, state: Callable[[], dict]) -> None:
        """After a step: a checkpoint where one is due; raises Interrupted where a signal came."""
        if self.ranks.world > 1 and step % self.flush_every:
            return  # several processes agree only now and then
        due = time.monotonic() - self.last >= self.seconds
        wishes = self.ranks.gathered((self.signals.received or 0, due))
        stop, due = (max(wish) for wish in zip(*wishes, strict=True))
        if stop:
            raise Interrupted(stop)
        if due:
            self.checkpoint(step, state)

    def checkpoint(self, step: int, state: Callable[[], dict]) -> None:
        with self.signals.kept():
            self.flush()
            self.checkpoints.save(step, state(), self.log)
            self.last = time.monotonic()
