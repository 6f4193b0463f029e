"""Files that can be trusted later: checksums, atomic writes, the cache, remembered results."""

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lab.identity import code_behind
from lab.process import file_lock, say


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def json_text(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the whole new one, whatever happens in between."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # a full disk does not say which file it was
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Errors of torch.save and safetensors as an OSError that says which file it was."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        known = isinstance(error, SafetensorError)
        reason = str(error) if known else "the file could not be written"
        raise OSError(errno.EIO, reason, str(path)) from error


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """safetensors' save_file(), whose errors do not say which file it was."""
    with disk_errors_named(path):
        save_file(tensors, path, metadata=metadata)


def remembered(path: Path, compute: Callable[[], object], beside: Path | None = None) -> object:
    """compute(), as JSON has it: kept in a file with its checksum, and read back from there as long
    as the files that compute() wrote to the folder `beside` are what they were."""

    def checksum(value: object) -> str:
        return hashlib.sha256(json_text(value).encode()).hexdigest()

    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        held = json.loads(path.read_text(encoding="utf-8"))
        whole = all(file_sha256(beside / name) == s for name, s in held["beside"].items())
        if whole and held["sha256"] == checksum([held["value"], held["beside"]]):
            return held["value"]
        say(f"{path.name}, or what was written with it, is damaged and is made again")
    value = json.loads(json_text(compute()))
    files = sorted(beside.glob("*")) if beside else []
    sums = {file.name: file_sha256(file) for file in files}
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {"sha256": checksum([value, sums]), "value": value, "beside": sums}
    write_atomically(path, json_text(held))
    return value


def disjoint(*parts: dict, **more: object) -> dict:
    """Dictionaries as one.  Raises ValueError for a name they share: one would lose its value, and
    a key would no longer tell two contents apart."""
    whole: dict = {}
    for part in (*parts, more):
        if shared := whole.keys() & part.keys():
            raise ValueError(f"a key would lose one of two values of {', '.join(sorted(shared))}")
        whole |= part
    return whole


def cache_root() -> Path:
    return Path(os.environ.get("COSINE_SAE_CACHE") or "~/.cache/cosine-sae").expanduser()


def cached(kind: str, key: dict, build: Callable[[Path], None]) -> Path:
    """The folder holding what `build(folder)` writes: made once per key, then reused by every run.

    `key` names everything the content depends on but the code: the fingerprint of the room that
    `build` stands in, and of those it uses, is added here.  An entry appears under its name only
    when it is whole, with a manifest of SHA-256 sums that is checked on every use; a damaged one is
    rebuilt.  A lock makes concurrent runs build it once.
    """
    key = disjoint(key, code=code_behind(build.__module__))
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    entry = cache_root() / kind / name
    entry.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(entry.parent / f"{name}.lock", wait=True):
        if entry.exists():
            if _entry_is_whole(entry, key):
                return entry
            say(f"cache: {kind}/{name} is damaged and is made again")
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for leftover in entry.parent.glob(f"{name}.partial-*"):  # of a process that was killed
            shutil.rmtree(leftover)
        partial = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=entry.parent))
        try:
            build(partial)
            files = sorted(p for p in partial.rglob("*") if p.is_file())
            sums = {str(p.relative_to(partial)): file_sha256(p) for p in files}
            write_atomically(partial / "manifest.json", json_text({"key": key, "sha256": sums}))
            partial.rename(entry)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return entry


def _entry_is_whole(entry: Path, key: dict) -> bool:
    """Whether an entry is the one that was asked for, every file of it as it was written."""
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        sums = manifest["sha256"]
        same_key = json_text(manifest["key"]) == json_text(key)
        return same_key and all(file_sha256(entry / name) == sums[name] for name in sums)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def versions(*packages: str) -> dict[str, str | None]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
