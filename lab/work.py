"""Unfinished work: it lives in the cache under its identity, not in the run's folder.

Whoever deletes the folder of a run that was stopped loses nothing: the next identical command goes
on.  Work that nobody comes back to is removed, the oldest first, when all of it together grows
beyond LIMIT.
"""

import contextlib
import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from lab import activations, checkpoints, devices, ground_truth, online_absorption, state
from lab.identity import code_behind
from lab.language_model import LanguageModel
from lab.process import ExperimentError, file_lock, say
from lab.scales import Scale
from lab.storage import cache_root, json_text, write_atomically

FINISHED = "finished"  # a file in work that is over
LIMIT = 20e9  # bytes: a gemma-2-2b run's two checkpoints take 3


class Work:
    """The log, checkpoints, SAEs and finished evaluations of one training."""

    def __init__(self, identity: dict):
        """`identity`: everything that decides what training computes, for JSON."""
        self.identity = identity
        self.name = hashlib.sha256(json_text(identity).encode()).hexdigest()[:16]
        self.folder = work_root() / self.name

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Ours alone inside the `with`.  Raises ExperimentError if another process works on it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _lock(self.name) as free:
            if not free:
                raise ExperimentError(
                    "another process is training the same run (its work is the same, whatever its "
                    "folder is called): wait for it"
                )
            write_atomically(self.folder / "identity.json", json_text(self.identity))
            remove_abandoned(besides=self.name)
            yield

    def mark_finished(self) -> None:
        """All that was needed of it lies in the run's folder: from here on it may be removed."""
        (self.folder / FINISHED).touch()


def work_root() -> Path:
    return cache_root() / "training"


def _lock(name: str) -> contextlib.AbstractContextManager[bool]:
    """Whether the work of this name was free; if so, nobody else's inside the `with`."""
    return file_lock(work_root() / f"{name}.lock")


def remove_work(name: str) -> None:
    """Of a run that is finished, if it is marked so: work of the same name without the mark is that
    of the same run in another folder."""
    if (work_root() / name / FINISHED).exists():
        shutil.rmtree(work_root() / name, ignore_errors=True)


def remove_abandoned(besides: str, limit: float | None = None) -> None:
    """Remove the oldest work, but that of `besides` and of living processes, until what is left
    takes at most `limit` bytes; say what was removed."""
    limit, found = LIMIT if limit is None else limit, []
    for folder in filter(Path.is_dir, work_root().iterdir()):
        with contextlib.suppress(FileNotFoundError):  # finished by its own process meanwhile
            files = [path.stat() for path in folder.rglob("*") if path.is_file()]
            newest = max((file.st_mtime for file in files), default=folder.stat().st_mtime)
            found.append((newest, sum(file.st_size for file in files), folder))
    total = sum(size for _, size, _ in found)
    for newest, size, folder in sorted(found):
        if total <= limit:
            return
        if folder.name == besides:
            continue
        with _lock(folder.name) as free:
            if free:
                days = (time.time() - newest) / 86400
                say(
                    f"removed unfinished work of {days:.0f} days ago ({size / 1e6:.0f} MB, "
                    f"{folder.name}): all of it together took over {limit / 1e9:g} GB"
                )
                shutil.rmtree(folder, ignore_errors=True)
                total -= size


def training_identity(
    run_name: str, scale: Scale, lm: LanguageModel, settings: dict, experiment: str
) -> dict:
    """Everything that decides what training computes, and nothing that only scores it."""
    unread = ("title", "readout_alphas")
    online = ground_truth if scale.world else online_absorption
    rooms = (activations, checkpoints, devices, online, state)
    return {
        "run_name": run_name,
        "run": {name: v for name, v in settings["run"].items() if name not in unread},
        "recipe": settings["recipe"],
        "scale": scale.training_settings(),
        "language_model": lm.identity,
        "experiment": experiment,
        "code": {room.__name__: code_behind(room.__name__) for room in rooms},
    }
