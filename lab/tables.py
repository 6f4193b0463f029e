"""Tables of what plot.py compares: values, differences, and what must be known to read them.

Promises that values are shown with their error, that what is missing is a dash and named, and that
runs which are not comparable are called so.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from lab.comparison import Difference, Value, mean_and_error, missed_target, sd, within_noise
from lab.frontier import at_level, by_run, levels, measured_as, n_targets
from lab.runs import MADE_WITH, Arm, find, paired, task_differences, with_readouts

Metrics = dict[str, tuple[str, str, str]]  # name -> title, arrow, definition
Row = tuple[str, Callable[[str], str]]  # its name, and what gives the cell of a metric
MISSING = "–"
PAIRED = (
    "Descriptive.  Paired: seed s has the same start and the same batches in every run.  Mean over "
    "the n seeds that both have, its 95% BCa bootstrap interval (from six seeds on; ± is the "
    "standard error) and the two-sided p of an exact sign flip test.  Grey, or in brackets: less "
    "than the sd over {}'s own seeds."
)
READ_OFF = (
    "Descriptive; a run less {0} as above, where both have the same L0 or the same FVU.  Curves "
    "are straight from target to target over the log of either, and of the targets and seeds that "
    "both have; a dash is where the curve of a seed does not reach.  The places follow from {0}'s "
    "L0 and FVU alone.  Middle: its mean at its middle target (of an even number, the geometric "
    "mean of the middle two).  A quarter, three quarters: of the way, on a log scale, through what "
    "all its seeds reach."
)


class Grey(str):
    """A cell that says less than it seems to: grey on the page, in brackets in plain text."""


class Table(NamedTuple):
    heading: str
    note: str
    lines: list[list[str]]  # the first is the head; none at all: only the note


def shown(value: Value, sign: str = "", least: int = 4) -> str:
    """Four decimals (or `least`), one from 10 upwards; a dash for what is missing."""
    mean, error = value
    if not math.isfinite(mean):
        return MISSING
    digits = least if abs(mean) < 10 else 1
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def cells(value: Callable[[str], Value], sign: str = "") -> Callable[[str], str]:
    return lambda metric: shown(value(metric), sign)


def difference(found: Difference, in_noise: bool) -> str:
    """With interval (or error), p and n; grey within the control's noise.  Of a small difference
    more decimals, up to six, so that two of the error's digits are seen."""
    digits = 4
    if 1e-7 < found.error < 1e-3:
        digits = min(6, 1 - math.floor(math.log10(found.error)))
    text = shown((found.mean, found.error), "+", digits)
    if math.isfinite(found.low):
        parts = found.mean, found.low, found.high
        mean, low, high = (shown((x, math.nan), "+", digits) for x in parts)
        text = f"{mean} [{low}, {high}]"
    if text != MISSING:
        text += f", p {found.p:.2g}, n {found.n}".replace("nan", MISSING)
    return Grey(text) if in_noise else text


def less_control(arm: Arm, control: Arm, metric: str) -> str:
    """`arm` less `control`, at the same target."""
    found = paired(arm, control, metric)
    if not isinstance(found, Difference):  # of what compares seeds with each other
        return shown(found, "+")
    return difference(found, within_noise(found.mean, control.seeds(metric)))


def titled(about: tuple[str, str, str]) -> str:
    """A metric's title and arrow."""
    return " ".join(about[:2]).rstrip()


def metric_tables(title: str, note: str, rows: list[Row], groups: dict[str, Metrics]):
    """One table per group of metrics; a metric that no row has is no column, but is named."""
    tables = []
    for group, metrics in groups.items():
        found = {m: [cell(m) for _, cell in rows] for m in metrics}
        kept = [m for m in found if set(found[m]) != {MISSING}]
        absent = ", ".join(metrics[m][0] for m in found if m not in kept)
        lines = [["", *(titled(metrics[m]) for m in kept)]]
        lines += [[name, *(found[m][i] for m in kept)] for i, (name, _) in enumerate(rows)]
        text = f"{note}  No value in any row: {absent}." if absent else note
        tables.append(Table(f"{title}: {group}", text.strip(), lines if kept else []))
    return tables


def not_comparable(arms: list[Arm]) -> list[str]:
    """A sentence for each run that was made elsewhere, or otherwise, than the first that says so.

    Old runs do not say where they were made, and keep the recipe among the settings of the scale.
    Another experiment is no reason: that is what runs are for.
    """

    def settings(arm: Arm) -> dict:
        found = {**arm.config.get("scale", {}), **arm.config.get("recipe", {})}
        if "target_l0" in found:  # of an old run, which had one
            found["target_l0s"] = [found.pop("target_l0")]
        found.pop("n_seeds", None)  # runs are paired by the seeds that both have, and say how many
        return found

    notes = []
    for arm in arms:
        than = {}  # the first run that says so -> what differs
        for place in filter(arm.config.get, MADE_WITH):
            first = next(other for other in arms if other.config.get(place))
            if arm.config[place] != first.config[place]:
                than.setdefault(first.name, []).append(place)
        if mine := settings(arm):
            first = next(other for other in arms if settings(other))
            theirs = settings(first)
            names = sorted(n for n in {*mine, *theirs} if mine.get(n) != theirs.get(n))
            if names:
                than.setdefault(first.name, []).extend(names)
        for first_name, names in than.items():
            which = f"{', '.join(names)} than {first_name}"
            notes.append(f"NOT COMPARABLE: {arm.name} ran with another {which}.")
    return notes


def runs_table(arms: list[Arm]) -> Table:
    """What was run, where that is not what its label says or not comparable, and runs' notes."""
    lines, notes = [["", "what it tries", "seeds", "steps"]], not_comparable(arms)
    for arm in arms:
        seeds = max(map(len, arm.entry["final_info_dict"].values()), default="–")
        steps = arm.config.get("total_steps", arm.entry["means"].get("training_steps", "–"))
        title = arm.config.get("run", {}).get("title", "–")
        lines.append([arm.row, title, str(seeds), str(steps)])
        if arm.written_for and title not in ("–", arm.written_for):
            labelled = f"{arm.name} is labelled {arm.label!r}"
            notes.append(f"{labelled}, but was made by another row: {title!r}.")
        if said := missed_target(arm.entry["means"]):
            notes.append(f"{said} in {arm.name}.")
        for about, note in arm.entry["notes"].items():
            notes += [f"{arm.name}, {about}: {note}"] if isinstance(note, str) else []
    return Table("Runs", "  ".join(notes), lines)


def task_table(arms: list[Arm], control: Arm) -> Table:
    """Where a difference to the control comes from, task by task."""
    found = [{task: d.mean() for task, d in task_differences(arm, control).items()} for arm in arms]
    tasks = sorted({task for means in found for task in means})
    lines = [["", "mean", "sd over tasks", *tasks]]
    for arm, means in zip(arms, found, strict=True):
        known = [mean for mean in means.values() if math.isfinite(mean)]
        values = [
            mean_and_error(known)[0],
            sd(known),
            *(means.get(task, math.nan) for task in tasks),
        ]
        lines.append([arm.row, *(shown((value, math.nan), "+") for value in values)])
    note = "Descriptive.  Paired by seed, then the mean over seeds; mean and sd are over tasks."
    return Table(f"Differences to {control.name}: top-1 probing by task", note, lines)


def rank_correlation(pairs: list[Value]) -> float | None:
    """Spearman's, ties sharing their mean rank; None below three pairs or if a side is constant."""
    sides = np.array(pairs).reshape(-1, 2).T[:, :, None]
    ranks = np.sign(sides - sides.swapaxes(1, 2)).sum(-1)  # twice the rank, up to a constant
    return float(np.corrcoef(ranks)[0, 1]) if len(pairs) > 2 and ranks.any(1).all() else None


def online_table(arms: list[Arm]) -> Table:
    lines = [["", "runs", "Spearman rank correlation"]]
    for title, name in (
        ("full absorption", "absorption_full"),
        ("absorption fraction", "absorption_fraction"),
    ):
        pairs = [(arm.value(f"online_{name}")[0], arm.value(name)[0]) for arm in arms]
        pairs = [pair for pair in pairs if np.isfinite(pair).all()]
        found = rank_correlation(pairs)
        lines.append([title, str(len(pairs)), "null" if found is None else f"{found:.2f}"])
    note = "The last value of training against SAE-Bench's, over runs.  null: fewer than three."
    return Table("Does online absorption foretell SAE-Bench's?", note, lines)


def results(arms: list[Arm], groups: dict[str, Metrics]) -> list[Table]:
    """What came out of one scale, layer and target, compared with nothing."""

    def channels(metric: str) -> Value:
        name = metric.replace("probing_", "lm_").replace("latents", "channels")
        return arms[0].value(name)[0], math.nan  # the same for every seed

    values, tables = [(arm.row, cells(arm.value)) for arm in arms], []
    for group, metrics in groups.items():
        beside = [("model's channels", cells(channels))] if group == "probing" else []
        tables += metric_tables("Results", "", [*values, *beside], {group: metrics})
    return tables


def comparison(
    arms: list[Arm],
    groups: dict[str, Metrics],
    control_name: str,
    baseline_name: str,
    baseline_key: str | None,  # the scale and layer that the baseline is of
) -> list[Table]:
    """All tables of one scale, layer and target."""
    control, baseline = find(arms, control_name), find(arms, baseline_name)
    trained = [arm for arm in arms if arm is not baseline]
    others = [arm for arm in trained if arm is not control]

    def less_baseline(arm: Arm, metric: str) -> Value:
        mean, error = arm.value(metric)
        return mean - baseline.value(metric)[0], error

    tables = [runs_table(arms), *results(arms, groups)]
    if not trained:
        return tables
    title = f"Differences to {control_name}"
    if control and others:
        note = PAIRED.format(control_name)
        pairs = [(arm.row, partial(less_control, arm, control)) for arm in others]
        tables += metric_tables(title, note, pairs, groups)
        tables.append(task_table(others, control))
    elif others:
        tables.append(Table(title, f"None: {control_name} is missing.", []))
    title = f"Differences to {baseline_name}"
    if baseline:
        note = f"Not paired: {baseline_name} is a single SAE, and the error is that of the run."
        pairs = [(arm.row, cells(partial(less_baseline, arm), "+")) for arm in trained]
        tables += metric_tables(title, note, pairs, groups)
    elif baseline_key:
        note = f"None: {baseline_name} is of another scale ({baseline_key}) and cannot be compared."
        tables.append(Table(title, note, []))
    if swapped := [(arm.row, cells(arm.value)) for arm in with_readouts(arms)]:
        note = (
            "The same SAEs, probed with another alpha than they were trained to, on few latents "
            "alone: what has a dash was not asked."
        )
        tables += metric_tables("Read-out check", note, swapped, {"probing": groups["probing"]})
    return [*tables, online_table(trained)]


def level_tables(
    arms: list[Arm], metrics: Metrics, names: Sequence[str], control_name: str, baseline_name: str
) -> list[Table]:
    """Every run against the control at equal L0 and at equal FVU, a table for each of `names`."""
    runs, title = by_run(arms), f"Read off against {control_name}"
    control = runs.get(control_name)
    others = {n: run for n, run in runs.items() if n not in (control_name, baseline_name)}
    if not control or not others:
        missing = "there is no other run" if control else f"{control_name} is missing"
        return [Table(title, f"None: {missing}.", [])]
    tables = [Table(title, READ_OFF.format(control_name), [])]
    for metric in names:
        if not any(np.isfinite(arm.seeds(metric)).any() for arm in arms):
            continue
        xs = [measured_as([*control.values()], quantity, metric) for quantity in ("l0", "fvu")]
        places = [
            (x, level, f"{metrics[x][0]} {shown((level, math.nan))} ({name})")
            for x in xs
            if x != metric
            for name, level in levels(control, x).items()
        ]
        lines = [["", *(text for *_, text in places)]]
        own = [at_level(control, control, x, metric, level).control for x, level, _ in places]
        lines.append([f"{control_name}'s own", *(shown(mean_and_error(seeds)) for seeds in own)])
        notes = []
        for name, run in others.items():
            found = [at_level(run, control, x, metric, level) for x, level, _ in places]
            cells = [difference(reading.found, reading.in_noise) for reading in found]
            lines.append([next(iter(run.values())).row, *cells])
            least = min(n_targets(run, control, x, metric) for x, *_ in places)
            if least < len(control):
                notes.append(f"{name}: over {least} of {len(control)} targets.")
        tables.append(Table(f"{titled(metrics[metric])}, read off", "  ".join(notes), lines))
    return tables


def definitions(groups: dict[str, Metrics]) -> Table:
    lines = [["", "better", "what it is"]]
    for group, metrics in groups.items():
        lines += [[f"{group}: {t}", arrow or "–", what] for t, arrow, what in metrics.values()]
    note = "Roughness, spikes and grad CV: of the last 80% of steps.  Probing: mean over tasks."
    return Table("Metrics", note, lines)
