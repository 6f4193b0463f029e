"""The hub: what a repository holds at a revision, there or in the copy that its client keeps.

The facts about repositories that this program counts on stand in docs/hub.md, with their sources.
"""

import json
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from lab.process import ExperimentError, require

# Where text has been found in repositories of the hub, the first that fits: OpenWebText's own
# layout since its loading script went, that of its automatic conversion to parquet before, and
# what datasets' push_to_hub() writes.
LAYOUTS = ("plain_text/train-*.parquet", "plain_text/train/*.parquet", "data/train-*.parquet")
# File k of n; older versions of push_to_hub() put a hash behind it.
OF = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]{16})?\.\w+$")
COUNTED = re.compile(r"/(\d+)\.parquet$")  # file k of the automatic conversion


def unreachable(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is that the hub could not be asked, or did not answer:
    not that it said no."""
    import requests
    from huggingface_hub import errors

    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status == 429 or status >= 500
        known = (ConnectionError, TimeoutError, requests.ConnectionError, requests.Timeout)
        transport = "TransportError" in {base.__name__ for base in type(error).__mro__}  # httpx's
        if transport or isinstance(error, (*known, errors.LocalEntryNotFoundError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def copy_of(name: str, kind: str, revision: str | None = None) -> Path | None:
    """The folder in which the hub's client keeps a repository ("model" or "dataset") at a revision,
    with all files that were ever asked for; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        where = {"repo_type": kind, "revision": revision, "local_files_only": True}
        return Path(snapshot_download(name, **where))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return None


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def stay_offline() -> None:
    """As HF_HUB_OFFLINE=1 from here on: where nobody answers, the client would ask five times, 31
    seconds long, about every file."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def model_is_kept(name: str) -> bool:
    """Whether the hub's client keeps all that a model is read from."""
    folder = copy_of(name, "model")
    if folder is None or not (folder / "config.json").exists():
        return False
    for weights in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{weights}.index.json"
        parts = [weights]
        if index.exists():
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if all((folder / part).exists() for part in parts):
            return any(folder.glob("tokenizer.*"))
    return False


def missing_files(files: Iterable[str]) -> list[str]:
    """Which of the files that call themselves "k of n" are not there, by the names of their
    kind ("data/train-00003-of-00080")."""
    groups: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if found := OF.search(file):
            groups.setdefault((file[: found.start()], int(found[2])), set()).add(int(found[1]))
    return [
        f"{stem}-{k:05d}-of-{n:05d}"
        for (stem, n), there in groups.items()
        for k in range(n)
        if k not in there
    ]


class TextFiles(NamedTuple):
    """The files that hold a text, in their order."""

    addresses: list[str]  # on the hub, or of the copies that its client keeps
    not_kept: str | None = None  # the file after the last, where only copies could be had


def text_files(source: str) -> TextFiles:
    """The files of "dataset@revision"; where the hub cannot be reached, of the client's copies as
    many as follow one another from the first.

    Raises ExperimentError where they lie in no known layout or are not all there, and what the
    hub's client raises where there is neither hub nor copy.
    """
    from huggingface_hub import HfApi

    name, revision = source.split("@")
    root, copied = f"hf://datasets/{source}", False
    try:
        names = HfApi().list_repo_files(name, repo_type="dataset", revision=revision)
    except Exception as error:
        folder = copy_of(name, "dataset", revision) if unreachable(error) else None
        if folder is None:
            raise
        root, copied, names = str(folder), True, files_in(folder)
    found = ([n for n in sorted(names) if fnmatch(n, layout)] for layout in LAYOUTS)
    files = next(filter(None, found), [])
    require(
        bool(files),
        f"{source} has no text in a layout that is known here ({', '.join(LAYOUTS)}): name a "
        f"revision that has, or add its layout to LAYOUTS in lab/hub.py; it holds "
        f"{', '.join(sorted(names)[:5]) or 'nothing'}",
    )
    numbered = [OF.search(file) or COUNTED.search(file) for file in files]
    counted = [int(found[1]) if found else -1 for found in numbered]
    follow = next((i for i, k in enumerate(counted) if i != k), len(files))
    missing = missing_files(files) or ([f"number {follow}"] if follow < len(files) else [])
    require(
        not missing or (copied and follow > 0),
        f"{source} has not all files of its text, but {len(files)}, beginning with {files[0]} (not "
        f"there: {missing[0] if missing else ''}): name a revision that has all",
    )
    addresses = [f"{root}/{file}" for file in files[:follow]]
    return TextFiles(addresses, missing[0] if missing else None)


def text_column(address: str) -> str:
    """The column of text in a parquet file: "text".  Raises ExperimentError where there is none."""
    from huggingface_hub import HfFileSystem
    from pyarrow import parquet

    system = HfFileSystem() if address.startswith("hf://") else None
    columns = parquet.read_schema(address.removeprefix("hf://"), filesystem=system).names
    return chosen_column(address, columns)


def chosen_column(address: str, columns: Collection[str]) -> str:
    if "text" not in columns:
        raise ExperimentError(
            f"{address} has no column 'text', but {', '.join(map(repr, columns))}: name a dataset "
            "whose documents stand in a column of that name"
        )
    return "text"
