"""The hub: what a repository holds at a revision, there or in the copy that its client keeps.

The facts about repositories that this program counts on stand in docs/hub.md, with their sources.
"""

import re
from fnmatch import fnmatch
from pathlib import Path

from lab.process import ExperimentError, require

# Where text has been found in repositories of the hub, the first that fits: OpenWebText's own
# layout since its loading script went, that of its automatic conversion to parquet before, and
# what datasets' push_to_hub() writes.
LAYOUTS = ("plain_text/train-*.parquet", "plain_text/train/*.parquet", "data/train-*.parquet")
OF = re.compile(r"-(\d+)-of-(\d+)\.\w+$")  # file k of n


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


def stay_offline() -> None:
    """As HF_HUB_OFFLINE=1 from here on: where nobody answers, the client would ask five times, 31
    seconds long, about every file."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def model_is_kept(name: str) -> bool:
    """Whether the hub's client keeps all that a model is read from."""
    folder = copy_of(name, "model")
    if folder is None:
        return False
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    parts = [OF.search(path.name) for path in weights]
    whole = all(not part or len(weights) >= int(part[2]) for part in parts)
    tokenizer = any(folder.glob("tokenizer*"))
    return bool(weights) and whole and tokenizer and (folder / "config.json").exists()


def text_files(source: str) -> list[str]:
    """Addresses of the files that hold the text of "dataset@revision", in their order: on the hub,
    or of the client's copies, as many as follow one another from the first, where the hub cannot be
    reached.

    Raises ExperimentError where they lie in no known layout or are not all there, and what the
    hub's client raises where there is neither hub nor copy.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    name, revision = source.split("@")
    root, copied = f"hf://datasets/{source}", False
    try:
        names = HfApi().list_repo_files(name, repo_type="dataset", revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):  # a gated one is listed
        raise
    except Exception:  # no network: the libraries in between have their own errors
        folder = copy_of(name, "dataset", revision)
        if folder is None:
            raise
        root, copied = str(folder), True
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    found = ([n for n in sorted(names) if fnmatch(n, layout)] for layout in LAYOUTS)
    files = next(filter(None, found), [])
    require(
        bool(files),
        f"{source} has no text in a layout that is known here ({', '.join(LAYOUTS)}): name a "
        f"revision that has, or add its layout to LAYOUTS in lab/hub.py; it holds "
        f"{', '.join(sorted(names)[:5]) or 'nothing'}",
    )
    numbered = list(map(OF.search, files))
    if all(numbered):
        of = int(numbered[0][2])
        if copied:
            follows = (int(n[1]) == i for i, n in enumerate(numbered))
            files = [file for file, next_one in zip(files, follows, strict=True) if next_one]
        there = len(files) == of or (copied and files)
        require(
            bool(there),
            f"{source} has {len(numbered)} of the {of} files of its text, beginning with "
            f"{Path(numbered[0].string).name}: name a revision that has all",
        )
    return [f"{root}/{file}" for file in files]


def text_column(address: str) -> str:
    """The column of text in a parquet file: "text".  Raises ExperimentError where there is none."""
    from huggingface_hub import HfFileSystem
    from pyarrow import parquet

    system = HfFileSystem() if address.startswith("hf://") else None
    columns = parquet.read_schema(address.removeprefix("hf://"), filesystem=system).names
    return chosen_column(address, columns)


def chosen_column(address: str, columns: list[str]) -> str:
    if "text" not in columns:
        raise ExperimentError(
            f"{address} has no column 'text', but {', '.join(map(repr, columns))}: name a dataset "
            "whose documents stand in a column of that name"
        )
    return "text"
