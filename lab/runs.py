"""Runs as they lie on disk: what plot.py compares, read without trusting any of it.

A run that is unfinished, damaged or no result is named and passed over; a log or a configuration
that is none is named and left out.  Beside the reading stands which values of two runs belong
together.  Needs numpy, and neither torch nor matplotlib.
"""

import contextlib
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lab.comparison import Difference, Value, mean_and_error, paired_difference

AT_L0, READ_OUT = ", L0 ", ", read out with alpha = "  # in titles of entries, in this order
# Two metrics had other names when results/laptop was made; they now agree with absorption_*.
RENAMED = {
    "online_absorption": "online_absorption_fraction",
    "online_full_absorption": "online_absorption_full",
}
# Of runs that are compared, these are the same: they decide numbers, and no experiment edits them.
MADE_WITH = ("laboratory", "processor", "device", "probing_texts")
# These compare seeds with each other: they are one number, with no error over the seeds.
BETWEEN_SEEDS = ("_over_seeds", "_rank_correlation", "_pw_mcc", "_pw_mcc_null")

Label = str | tuple[str, str]  # a run's; with it the title of the row it was written for


@dataclass
class Arm:
    """One run at one scale and layer, or its SAEs read out with another alpha."""

    name: str
    label: str
    key: str  # "<scale> layer <L>"
    entry: dict  # of final_info.json
    look: dict  # colour, marker and dash, the same in every figure
    written_for: str = ""  # the title of the run that `label` was written for, where it says so
    records: list[dict] = field(default_factory=list)  # of training_log.jsonl, this layer's
    config: dict = field(default_factory=dict)
    readouts: list["Arm"] = field(default_factory=list)

    @property
    def row(self) -> str:
        return self.name if self.label == self.name else f"{self.name} {self.label}"

    def value(self, metric: str) -> Value:
        """From the seeds where the run kept them, since "means" is rounded."""
        seeds, error = self.seeds(metric), self.entry["stderrs"].get(metric)
        mean = seeds.mean() if len(seeds) else self.entry["means"].get(metric)
        return tuple(np.array([mean, None if metric.endswith(BETWEEN_SEEDS) else error], float))

    def seeds(self, metric: str) -> np.ndarray:
        return np.array(self.entry["final_info_dict"].get(metric, []), dtype=float)

    def tasks(self) -> dict[str, list[float]]:
        """Top-1 probing accuracy of every seed, by task."""
        return self.entry["per_task"].get("probing_top_1", {})

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps at which a quantity was measured, its mean over seeds there, and the error."""
        found = [(r["step"], r[name]) for r in self.records if r.get(name) is not None]
        return np.array([step for step, _ in found]), *mean_and_error([v for _, v in found] or [[]])


def natural(text: str) -> list:
    """Sort key that puts run_2 before run_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def as_written(path: Path) -> str:
    """The text of a run's file.  Raises ValueError if it is not the one the run wrote: a finished
    run keeps the SHA-256 of its files in its config.json."""
    content, sums = path.read_bytes(), {}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        sums = dict(json.loads((path.parent / "config.json").read_text(encoding="utf-8"))["sha256"])
    digest = hashlib.sha256(content).hexdigest()
    if sums.get(path.name, digest) != digest:
        raise ValueError("it changed since the run wrote it")
    return content.decode("utf-8")


def parsed(text: str) -> dict | list:
    """JSON of a run, whose metrics have today's names whenever it was written."""
    return json.loads(text, object_hook=lambda o: {RENAMED.get(k, k): v for k, v in o.items()})


def found_runs(folder: Path) -> dict[str, dict]:
    """final_info.json of every finished run, in natural order; others are named and passed over."""
    runs = {}
    for path in sorted(filter(Path.is_dir, folder.glob("run_*")), key=lambda p: natural(p.name)):
        try:
            info = parsed(as_written(path / "final_info.json"))
            for entry in info.values():  # the contract: numbers or nulls under "means"
                np.array(list(entry["means"].values()), dtype=float)
            runs[path.name] = info
        except FileNotFoundError:
            print(f"{path.name}: skipped, not finished (it has no final_info.json)")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            print(f"{path.name}: skipped, its final_info.json is no result ({error!r})")
    return runs


def chosen(runs: dict[str, dict], labels: dict[str, Label]) -> dict[str, dict]:
    """The runs that `labels` names; all of them, and said so, where it names none of them."""
    named = {name: info for name, info in runs.items() if name in labels}
    if runs and not named:
        print(f"labels names none of the runs found, so all are plotted: {', '.join(runs)}")
    elif others := [name for name in runs if name not in labels]:
        print(f"left out, since labels does not name them: {', '.join(others)}")
    return named or runs


def read_optional(path: Path, otherwise: list | dict) -> list | dict:
    """JSON, or its lines as a list; `otherwise` where the file is missing or, said so, damaged."""
    try:
        text = as_written(path)
        lines = path.suffix == ".jsonl"
        found = parsed(f"[{','.join(text.splitlines())}]" if lines else text)
        if type(found) is not type(otherwise) or (lines and not all("layer" in r for r in found)):
            raise ValueError("it is not what a run writes")
        return found
    except FileNotFoundError:
        return otherwise
    except (OSError, ValueError, TypeError) as error:
        print(f"{path.parent.name}: {path.name} is left out ({error!r})")
        return otherwise


def own_records(records: list[dict], key: str, config: dict) -> list[dict]:
    """The lines of a training log that an entry is of: its layer's, and of a run with several
    target L0s the values of the seeds trained to its own."""
    name, _, target = key.partition(AT_L0)
    found = [r for r in records if name.endswith(f" layer {r['layer']}")]
    if not target:
        return found
    scale = config.get("scale", {})
    targets = [f"{l0:g}" for l0 in scale.get("target_l0s", ())]
    if target not in targets:
        return []
    first, n = targets.index(target) * scale["n_seeds"], scale["n_seeds"]
    return [
        {k: v[first : first + n] if isinstance(v, list) else v for k, v in record.items()}
        for record in found
    ]


def arms_of(
    folder: Path, runs: dict[str, dict], labels: dict[str, Label], looks: dict[str, dict]
) -> dict[str, list[Arm]]:
    """The runs of each "<scale> layer <L>"; those with a training log, which get figures, first."""
    groups = {}
    parts = ("stderrs", "final_info_dict", "per_letter", "per_task", "notes")
    for name, info in runs.items():
        records = read_optional(folder / name / "training_log.jsonl", [])
        config = read_optional(folder / name / "config.json", {})
        arms, look, label = {}, looks[name], labels.get(name, name)
        label, written_for = (label, "") if isinstance(label, str) else label
        for title in sorted(info, key=natural):  # a read-out check stands behind its run
            key, _, alpha = title.partition(READ_OUT)
            entry = {part: {} for part in parts} | info[title]
            if not alpha:
                own = own_records(records, key, config)
                arms[key] = Arm(name, label, key, entry, look, written_for, own, config)
                groups.setdefault(key, []).append(arms[key])
            elif key in arms:
                opened = look | {"markerfacecolor": "white"}
                readout = Arm(name, f"read as α = {alpha}", key, entry, opened)
                arms[key].readouts.append(readout)
    order = sorted(groups, key=lambda key: (not any(a.records for a in groups[key]), natural(key)))
    return {key: groups[key] for key in order}


def with_readouts(arms: list[Arm]) -> list[Arm]:
    """The runs with a read-out check, each followed by its read-outs."""
    return [scored for arm in arms if arm.readouts for scored in (arm, *arm.readouts)]


def find(arms: list[Arm], name: str) -> Arm | None:
    return next((arm for arm in arms if arm.name == name), None)


def paired(arm: Arm, other: Arm, metric: str) -> Value | Difference:
    """`arm` less `other`, paired by seed; of what compares seeds with each other, no more than the
    difference of the two numbers."""
    if metric.endswith(BETWEEN_SEEDS):
        return arm.value(metric)[0] - other.value(metric)[0], math.nan
    return paired_difference(arm.seeds(metric), other.seeds(metric))


def task_differences(arm: Arm, control: Arm) -> dict[str, np.ndarray]:
    """Top-1 probing accuracy by task that both have: seed s of `arm` minus seed s of `control`."""
    a, b = arm.tasks(), control.tasks()
    n = min((min(len(a[task]), len(b[task])) for task in a if task in b), default=0)
    return {t: np.array(a[t][:n], float) - np.array(b[t][:n], float) for t in a if t in b and n}
