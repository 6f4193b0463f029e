"""A run's folder: which run it is of, whether it is begun, finished or somebody else's."""

import argparse
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from lab.devices import processor
from lab.identity import laboratory_fingerprint, local_files, source
from lab.process import Clock, ExperimentError, require
from lab.storage import file_sha256, json_text, versions, write_atomically
from lab.work import Work, remove_work

PACKAGES = ("torch", "transformers", "datasets", "sae-lens", "sae-bench", "sae-probes", "numpy")
FEATURES = ("features.jsonl", "features.html")  # of a run on a language model
WRITTEN = ("training_log.jsonl", "sae", "eval", *FEATURES)  # between config and final_info.json
CODE = ("experiment", "laboratory")  # fingerprints


def usage(titles: dict[str, str]) -> str:
    rows = [f"  {name:<7} {title}" for name, title in titles.items()]
    return "\n".join(["the runs:", "  run_0   the given baseline (never re-run)", *rows])


def chosen_run(titles: dict[str, str], arguments: list[str]) -> tuple[Path, str]:
    """--out_dir, and the row of RUNS that its last part names.  Raises ExperimentError, or shows
    the runs ({name: title}) and exits, where it names none."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate one run.",
        epilog=usage(titles),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out_dir", help="folder of the run; its last part names a row of RUNS")
    out_dir = parser.parse_args(arguments).out_dir
    require(
        bool(out_dir),
        f"{usage(titles)}\nerror: --out_dir is missing: say --out_dir=run_1, for example",
    )
    path = Path(out_dir)
    name = Path(os.path.normpath(path)).name
    require(
        name != "run_0",
        "run_0 holds the given baseline and is never re-run: choose another row, say run_1",
    )
    require(
        name in titles,
        f"{usage(titles)}\nerror: {name!r} is not a row of RUNS: choose one of {', '.join(titles)}",
    )
    require(not path.exists() or path.is_dir(), f"--out_dir={out_dir} is a file: name a folder")
    return path, name


def differences(old: object, new: object, path: str = "") -> list[str]:
    """Where two configurations differ, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted({*old, *new}):
            there, now = old.get(name, "absent"), new.get(name, "absent")
            lines += differences(there, now, f"{path}.{name}".lstrip("."))
        return lines
    return [] if old == new else [f"{path} is {old!r} there and {new!r} now"]


def is_finished(out_dir: Path, identity: dict) -> bool:
    """Whether the run is finished.  Raises ExperimentError if the folder belongs to another
    configuration or to other code, or if what a finished run wrote has changed since."""
    config = out_dir / "config.json"
    if not config.exists():
        others = [n for n in ("final_info.json", *WRITTEN) if (out_dir / n).exists()]
        require(
            not others,
            f"{out_dir} holds {', '.join(others)} but no config.json, so it is not a run of this "
            "program: move it away or delete it",
        )
        return False
    identity = json.loads(json_text(identity | {"laboratory": laboratory_fingerprint()}))
    try:
        there = json.loads(config.read_text(encoding="utf-8"))
        old = {name: there[name] for name in identity}
        sums = dict(there.get("sha256", {}))  # of a finished run's files
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"{config} is not a configuration this program wrote: move {out_dir} away or delete it"
        ) from error
    values = [{n: v for n, v in side.items() if n not in CODE} for side in (old, identity)]
    found = differences(*values)
    require(
        not found,
        f"{out_dir} was begun with another configuration ({'; '.join(found[:5])}): "
        "delete or rename the folder, or undo the change",
    )
    changed = [name for name in CODE if old[name] != identity[name]]
    code = {"experiment": f"experiment.py (it was {out_dir}/experiment.py)", "laboratory": "lab/"}
    require(
        not changed,
        f"the code has changed since {out_dir} was begun: {' and '.join(code[n] for n in changed)}."
        "  Its numbers would not be this code's: delete or rename the folder, or undo the change "
        "(a comment, a docstring or another row of RUNS changes nothing)",
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
    if isinstance(work := there.get("work"), str) and work.isalnum():
        remove_work(work)  # it may have been killed in its last moment
    return True


def begin(out_dir: Path, identity: dict, script: str, derived: dict) -> dict:
    """Write the run's configuration and its script, and return the configuration: its identity,
    what is `derived` from it, and the machine."""
    cuda = torch.cuda.is_available()
    config = (
        identity
        | derived
        | {
            "laboratory": laboratory_fingerprint(),
            "device": torch.cuda.get_device_name() if cuda else platform.machine(),
            "processor": processor()[1],
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": versions(*PACKAGES),
        }
    )
    write_atomically(out_dir / "config.json", json_text(config))
    for path in local_files(Path(script).resolve()):  # as they were read, whatever is there now
        name = "experiment.py" if path == Path(script).resolve() else path.name
        write_atomically(out_dir / name, source(path))
    return config


def written_files(out_dir: Path) -> Iterator[Path]:
    """What stays as it is once a run is finished, but for its configuration and its results."""
    yield from (out_dir / name for name in ("experiment.py", "training_log.jsonl"))
    yield from (out_dir / name for name in FEATURES if (out_dir / name).is_file())
    for name in ("sae", "eval"):
        yield from filter(Path.is_file, (out_dir / name).rglob("*"))


def finish(
    out_dir: Path, work: Work, config: dict, clock: Clock, results: dict, evaluated: Path
) -> None:
    """Put everything into the run's folder, final_info.json last, and let go of the work.

    `evaluated`: the folder of SAE-Bench's own files; beside it lie those of FEATURES, if any.
    """
    sources = {name: evaluated.parent / name for name in FEATURES} | {
        "training_log.jsonl": work.folder / "training_log.jsonl",
        "sae": work.folder / "sae",
        "eval": evaluated,
    }
    for name, origin in sources.items():
        target = out_dir / name
        if target.is_dir():  # of an execution that was killed while it did this
            shutil.rmtree(target)
        # One by one: shutil.copytree's errors are lists, and say neither what nor where.
        for file in origin.rglob("*") if origin.is_dir() else (origin,):
            copy = target / file.relative_to(origin)
            if file.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    text = json_text(results)
    sums = {str(p.relative_to(out_dir)): file_sha256(p) for p in written_files(out_dir)}
    sums["final_info.json"] = hashlib.sha256(text.encode()).hexdigest()
    config = config | {"seconds": clock.seconds | {"total": clock.total}}
    config |= {"work": work.name, "sha256": sums}
    write_atomically(out_dir / "config.json", json_text(config))
    work.mark_finished()
    write_atomically(out_dir / "final_info.json", text)
    remove_work(work.name)
