"""Whose folder this is: a run's configuration and files, compared with what was written."""

import json
from collections.abc import Iterator
from pathlib import Path

from lab.process import ExperimentError, require
from lab.storage import file_sha256, json_text


def differences(old: object, new: object, path: str = "") -> list[str]:
    """Where two configurations differ, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted({*old, *new}):
            there, now = old.get(name, "absent"), new.get(name, "absent")
            lines += differences(there, now, f"{path}.{name}".lstrip("."))
        return lines
    return [] if old == new else [f"{path} is {old!r} there and {new!r} now"]


WRITTEN = ("training_log.jsonl", "checkpoint", "sae", "eval")  # between config and final_info


def check_folder(out_dir: Path, identity: dict) -> bool:
    """Whether the run is finished.  Raises if the folder belongs to another configuration, or if
    what a finished run wrote has changed since."""
    config = out_dir / "config.json"
    if not config.exists():
        others = [n for n in ("final_info.json", *WRITTEN) if (out_dir / n).exists()]
        require(
            not others,
            f"{out_dir} holds {', '.join(others)} but no config.json, so it is not a run of this "
            "program: move it away or delete it",
        )
        return False
    try:
        there = json.loads(config.read_text(encoding="utf-8"))
        old = {name: there[name] for name in identity}
        sums = dict(there.get("sha256", {}))  # of a finished run's files
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"{config} is not a configuration this program wrote: move {out_dir} away or delete it"
        ) from error
    found = differences(old, json.loads(json_text(identity)))
    require(
        not found,
        f"{out_dir} was begun with another configuration ({'; '.join(found[:5])}): "
        "delete or rename the folder, or undo the change",
    )
    if not (out_dir / "final_info.json").exists():
        return False
    held = [name for name in sorted(sums) if (out_dir / name).is_file()]
    changed = [name for name in held if file_sha256(out_dir / name) != sums[name]]
    require(
        not changed,
        f"{out_dir} is finished, but {', '.join(changed[:5])} changed since: put back what the run "
        "wrote, or delete the folder and run the same command again",
    )
    return True


def written_files(out_dir: Path) -> Iterator[Path]:
    """What stays as it is once a run is finished, but for its configuration."""
    yield from (out_dir / name for name in ("experiment.py", "training_log.jsonl"))
    for name in ("sae", "eval"):
        yield from filter(Path.is_file, (out_dir / name).rglob("*"))
