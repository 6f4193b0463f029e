"""What training leaves on disk as it goes: its log, and states it can be taken up from."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lab.metrics import mean_or_none
from lab.process import say
from lab.storage import file_sha256, json_text


class TrainingLog:
    """training_log.jsonl, and Weights & Biases as well where WANDB_PROJECT is set."""

    def __init__(self, path: Path, name: str, config: dict, writes: bool = True):
        self.path, self.writes, self.wandb = path, writes, None
        self.records: list[dict] = []
        self.size, self.digest = 0, hashlib.sha256()
        if writes and os.environ.get("WANDB_PROJECT"):
            import wandb

            self.wandb = wandb.init(name=name, config=config)

    def take_up(self, size: int, sha256: str) -> bool:
        """Go on after the first `size` bytes, if they are those that were written; what follows
        them, a torn line or steps that will be made again, is cut off."""
        held = self.path.read_bytes()[:size] if self.path.exists() else b""
        if len(held) != size or hashlib.sha256(held).hexdigest() != sha256:
            return False
        self.records = [json.loads(line) for line in held.splitlines()]
        self.size, self.digest = size, hashlib.sha256(held)
        if self.writes:
            os.truncate(self.path, size)
        return True

    def __call__(self, records: list[dict]) -> None:
        self.records += records
        lines = "".join(json.dumps(r, allow_nan=False) + "\n" for r in records).encode()
        if not self.writes:
            return
        with self.path.open("ab") as file:
            file.write(lines)
        self.size += len(lines)
        self.digest.update(lines)
        for r in records if self.wandb else ():
            flat = {k: mean_or_none(v) if isinstance(v, list) else v for k, v in r.items()}
            self.wandb.log({f"layer_{r['layer']}/{k}": v for k, v in flat.items()}, step=r["step"])


class Checkpoints:
    """The last two states of training.

    A file's name holds its own checksum; its header holds the numbers of the state, the hash of the
    configuration, and how much of the training log belongs to it.
    """

    def __init__(self, folder: Path, identity: dict, writes: bool = True):
        self.folder, self.writes = folder, writes
        self.identity = hashlib.sha256(json_text(identity).encode()).hexdigest()

    def save(self, step: int, tensors: dict, state: dict, log: TrainingLog) -> None:
        if not self.writes:
            return
        header = {
            "identity": self.identity,
            "log": [log.size, log.digest.hexdigest()],
            "state": state,
        }
        self.folder.mkdir(exist_ok=True)
        partial = self.folder / "partial"
        save_file(tensors, partial, metadata={"header": json.dumps(header)})
        for path in (partial, log.path):  # on disk before it can be relied on
            with path.open("rb") as file:
                os.fsync(file.fileno())
        digest = file_sha256(partial)[:16]
        partial.replace(self.folder / f"step_{step:08d}_{digest}.safetensors")
        for old in self.newest_first()[2:]:
            old.unlink()

    def newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.safetensors"), reverse=True)

    def read(self, log: TrainingLog) -> tuple[dict, dict] | None:
        """(tensors, state) of the newest that is whole, the log cut back to it; else None."""
        for path in self.newest_first():
            with contextlib.suppress(OSError, SafetensorError, ValueError, LookupError, TypeError):
                if file_sha256(path)[:16] == path.stem.split("_")[2]:
                    with safe_open(path, "pt") as file:
                        header = json.loads(file.metadata()["header"])
                    if header["identity"] == self.identity and log.take_up(*header["log"]):
                        return load_file(path), header["state"]
            say(f"checkpoint {path.name} is damaged, or not of this run: not used")
        return None
