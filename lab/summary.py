"""What a finished run says last: its means, its differences to the control, its time.

All of it on stdout, and a line of each of its entries in results.tsv, beside its folder.
"""

import csv
import io
import json
import math
from pathlib import Path

from lab.comparison import Difference, missed_target, paired_difference, within_noise
from lab.process import Clock, say
from lab.runs import MADE_WITH, as_written

ALIKE = ("scale", "recipe", *MADE_WITH)  # of runs that can be compared
COMPARED = (
    "mse_roughness",
    "loss_roughness",
    "grad_norm_cv",
    "absorption_full",
    "absorption_fraction",
    "absorption_gap",
    "probing_top_1",
    "probing_top_5",
    "probing_top_1_sd_over_tasks",
    "fvu",
    "l0",
)
WITHIN = ", less than the sd over the control's own seeds"


def print_summary(title: str, results: dict, clock: Clock, config: dict, control: Path) -> None:
    """`key: value` lines; with the differences to the run in the folder `control`, where that is
    finished and comparable."""
    say("---")
    say(f"run: {title}")
    for name, entry in results.items():
        say(f"entry: {name}")
        for metric, value in entry["means"].items():
            say(f"{metric}: {_with_error(value, entry['stderrs'][metric])}")
    for name, entry in results.items():
        if said := missed_target(entry["means"]):
            say(f"{name}, {said}: read what differs with care")
    if config["run_name"] != control.name:
        for line in differences_to(control, results, config):
            say(line)
    for phase, seconds in clock.seconds.items():
        say(f"seconds {phase}: {seconds}")
    say(f"seconds total: {clock.total}")


def add_to_table(out_dir: Path, title: str, results: dict, config: dict, clock: Clock) -> None:
    """A line an entry in results.tsv beside the run's folder, whatever became of the runs before:
    folders are deleted, and a loop wants to see what it has tried.  A missing value is empty."""
    path, lines = out_dir.parent / "results.tsv", io.StringIO()
    table = csv.writer(lines, delimiter="\t", lineterminator="\n")
    if not path.exists():
        about = "run", "title", "entry", "experiment", "laboratory"
        table.writerow((*about, *COMPARED, "seconds"))
    for name, entry in results.items():
        about = out_dir.name, title, name, config["experiment"], config["laboratory"]
        means = ("" if (v := entry["means"].get(m)) is None else f"{v:.4g}" for m in COMPARED)
        table.writerow((*about, *means, f"{clock.total:.0f}"))
    with path.open("a", encoding="utf-8") as file:  # in one write: runs may end side by side
        file.write(lines.getvalue())


def differences_to(control: Path, results: dict, config: dict) -> list[str]:
    """Paired: seed s has the same start and the same batches in every run.  A line each, or one
    that says why there are none."""
    title = f"differences to {control.name}"
    try:
        theirs = json.loads(as_written(control / "final_info.json"))
        its = json.loads((control / "config.json").read_text(encoding="utf-8"))
        entries = {name: theirs[name]["final_info_dict"] for name in results if name in theirs}
        other = [name for name in ALIKE if _but_seeds(its[name]) != _but_seeds(config[name])]
    except FileNotFoundError:
        return [f"{title}: none, it has not been run beside this one"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"{title}: none, its files are not what a run of this program wrote ({error!r})"]
    if other:
        return [f"{title}: none, NOT COMPARABLE (another {', another '.join(other)})"]
    lines = [f"{title}, paired by seed:"]
    for name, values in entries.items():
        own = results[name]["final_info_dict"]
        for metric in COMPARED:
            found = paired_difference(own.get(metric, ()), values.get(metric, ()))
            if math.isfinite(found.mean):
                noise = within_noise(found.mean, values[metric])
                lines.append(f"{name}, {metric}: {_said(found)}{WITHIN if noise else ''}")
    return lines


def _but_seeds(setting: object) -> str:
    """As JSON; runs with another number of seeds are paired by those that both have."""
    if isinstance(setting, dict):
        setting = {name: value for name, value in setting.items() if name != "n_seeds"}
    return json.dumps(setting, sort_keys=True)


def _said(found: Difference) -> str:
    """Its mean with all that goes with it; without an interval, the standard error."""
    text = _with_error(found.mean, found.error if math.isfinite(found.error) else None, "+")
    if math.isfinite(found.low):
        text = f"{found.mean:+.4g}, 95% [{found.low:+.3g}, {found.high:+.3g}]"
    return f"{text} (p = {found.p:.2g}, n = {found.n})"


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    text = "null" if value is None else f"{value:{sign}.4g}"
    return text if error is None else f"{text} +- {error:.2g}"
