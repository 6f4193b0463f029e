"""Tables of what plot.py compares, and the page around them: summary.md and report.html.

Promises that values are shown with their error, that what is missing is a dash and named, and
that the page needs nothing but itself and shows nothing as markup that came out of a run.
"""

import base64
import html
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.comparison import Difference, Value, mean_and_error, sd, within_noise
from lab.drawing import Figure
from lab.runs import MADE_WITH, Arm, find, paired, task_differences, with_readouts

# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Tables                                                                                         │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘

Metrics = dict[str, tuple[str, str, str]]  # name -> title, arrow, definition
Row = tuple[str, Callable[[str], str]]  # its name, and what gives the cell of a metric
MISSING = "–"


class Grey(str):
    """A cell that says less than it seems to: grey on the page, in brackets in plain text."""


class Table(NamedTuple):
    heading: str
    note: str
    lines: list[list[str]]  # the first is the head; none at all: only the note


def shown(value: Value, sign: str = "") -> str:
    """Four decimals, or one from 10 upwards; a dash for what is missing."""
    mean, error = value
    if not math.isfinite(mean):
        return MISSING
    digits = 4 if abs(mean) < 10 else 1
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def cells(value: Callable[[str], Value], sign: str = "") -> Callable[[str], str]:
    return lambda metric: shown(value(metric), sign)


def difference(arm: Arm, control: Arm, metric: str) -> str:
    """`arm` less `control`: with interval (or error), p and n; grey within the control's noise."""
    found = paired(arm, control, metric)
    if not isinstance(found, Difference):  # of what compares seeds with each other
        return shown(found, "+")
    text = shown((found.mean, found.error), "+")
    if math.isfinite(found.low):
        mean, low, high = (shown((x, math.nan), "+") for x in (found.mean, found.low, found.high))
        text = f"{mean} [{low}, {high}]"
    if text != MISSING:
        text += f", p {found.p:.2g}, n {found.n}".replace("nan", MISSING)
    return Grey(text) if within_noise(found.mean, control.seeds(metric)) else text


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
    note = "Paired by seed, then the mean over seeds; mean and sd are over tasks."
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


def comparison(
    arms: list[Arm],
    groups: dict[str, Metrics],
    control_name: str,
    baseline_name: str,
    baseline_key: str | None,  # the scale and layer that the baseline is of
) -> list[Table]:
    """All tables of one scale and layer."""
    control, baseline = find(arms, control_name), find(arms, baseline_name)
    probing = {name: metrics for name, metrics in groups.items() if name == "probing"}
    the_rest = {name: metrics for name, metrics in groups.items() if name != "probing"}
    trained = [arm for arm in arms if arm is not baseline]
    others = [arm for arm in trained if arm is not control]

    def channels(metric: str) -> Value:
        name = metric.replace("probing_", "lm_").replace("latents", "channels")
        return arms[0].value(name)[0], math.nan  # the same for every seed

    def less_baseline(arm: Arm, metric: str) -> Value:
        mean, error = arm.value(metric)
        return mean - baseline.value(metric)[0], error

    values = [(arm.row, cells(arm.value)) for arm in arms]
    tables = [runs_table(arms)]
    tables += metric_tables("Results", "", values, the_rest)
    tables += metric_tables(
        "Results", "", [*values, ("model's channels", cells(channels))], probing
    )
    if not trained:
        return tables
    title = f"Differences to {control_name}"
    if control and others:
        note = PAIRED.format(control_name)
        pairs = [(arm.row, partial(difference, arm, control)) for arm in others]
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
        tables += metric_tables("Read-out check", note, swapped, probing)
    return [*tables, online_table(trained)]


def definitions(groups: dict[str, Metrics]) -> Table:
    lines = [["", "better", "what it is"]]
    for group, metrics in groups.items():
        lines += [[f"{group}: {t}", arrow or "–", what] for t, arrow, what in metrics.values()]
    note = "Roughness, spikes and grad CV: of the last 80% of steps.  Probing: mean over tasks."
    return Table("Metrics", note, lines)


def as_markdown(table: Table) -> str:
    """Columns are padded, so that it reads well as plain text too."""
    lines = [
        [f"({cell})" if isinstance(cell, Grey) else cell.replace("|", r"\|") for cell in line]
        for line in table.lines
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines[1:1] = [["-" * width for width in widths]] if lines else []
    padded = [" | ".join(map(str.ljust, line, widths)) for line in lines]
    body = "\n".join(f"| {line} |" for line in padded)
    return "\n\n".join(filter(None, [f"### {table.heading}", table.note, body]))


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ The page                                                                                       │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘

TITLE = "Comparison of runs"
LEGEND = (
    "Values are means over seeds ± one standard error (sd with n − 1, over √n); without ± there is "
    "one seed, or the number compares seeds with each other.  A dash is a missing value, never a 0."
)
PAIRED = (
    "Paired: seed s has the same start and the same batches in every run.  Mean over the n seeds "
    "that both have, its 95% BCa bootstrap interval (from six seeds on; ± is the standard error) "
    "and the two-sided p of an exact sign flip test.  Grey, or in brackets: less than the sd over "
    "{}'s own seeds."
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px;
       margin: auto; padding: 1rem }
h2 { border-top: 1px solid #ccc; margin-top: 3rem; padding-top: 1rem }
.figures { display: grid; gap: 2rem;
           grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)) }
figure { margin: 0 } figure img { width: 100% } figcaption { color: #555; font-size: .9rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .8rem .2rem 0; text-align: left;
         white-space: nowrap; font-variant-numeric: tabular-nums }
.grey { color: #999 }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem }
"""


class Section(NamedTuple):
    """One scale and layer."""

    key: str
    arms: list[Arm]
    figures: list[Figure]
    tables: list[Table]


def tag(name: str, content: str, attributes: str = "") -> str:
    return f"<{name}{attributes}>{content}</{name}>"


def as_html(table: Table) -> str:
    body = ""
    for i, line in enumerate(table.lines):
        grey = [' class="grey"' if isinstance(cell, Grey) else "" for cell in line]
        kind = "td" if i else "th"
        row = [tag(kind, html.escape(c), look) for c, look in zip(line, grey, strict=True)]
        body += tag("tr", "".join(row))
    parts = tag("h3", html.escape(table.heading)), tag("p", html.escape(table.note))
    return "".join(parts) + tag("div", tag("table", body), ' class="wide"')


def figure_html(figure: Figure) -> str:
    """An image: as inline SVG the element ids of one figure would clash with the next one's."""
    source = "data:image/svg+xml;base64," + base64.b64encode(figure.images["svg"]).decode()
    caption = html.escape(figure.caption)
    image = f'<img src="{source}" alt="{caption}">'
    return tag("figure", image + tag("figcaption", caption), f' id="{figure.name}"')


def configuration_html(arm: Arm) -> str:
    text = json.dumps(arm.config, indent=2, ensure_ascii=False, sort_keys=True)
    summary = tag("summary", f"Configuration of {html.escape(arm.row)}")
    return tag("details", summary + tag("pre", html.escape(text))) if arm.config else ""


def page(sections: list[Section], definitions: Table) -> str:
    body = tag("h1", TITLE) + tag("p", LEGEND)
    for key, arms, figures, tables in sections:
        body += tag("h2", html.escape(key))
        body += tag("div", "".join(map(figure_html, figures)), ' class="figures"')
        body += "".join([*map(as_html, tables), *map(configuration_html, arms)])
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = tag("head", head + tag("title", TITLE) + tag("style", STYLE))
    body = tag("body", body + as_html(definitions))
    return "<!doctype html>\n" + tag("html", head + body, ' lang="en"') + "\n"


def summary(sections: list[Section], definitions: Table) -> str:
    parts = [f"# {TITLE}", LEGEND]
    for key, *_, tables in sections:
        parts += [f"## {key}", *map(as_markdown, tables)]
    return "\n\n".join([*parts, as_markdown(definitions)]) + "\n"


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the old file or the whole new one, whatever happens in between."""
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_bytes(content)
    partial_path.replace(path)


def write(folder: Path, sections: list[Section], definitions: Table) -> str:
    """Every figure, summary.md and report.html; returns the text of summary.md."""
    for figure in (figure for section in sections for figure in section.figures):
        for suffix, content in figure.images.items():
            write_atomically(folder / f"{figure.name}.{suffix}", content)
    text = summary(sections, definitions)
    write_atomically(folder / "summary.md", text.encode())
    write_atomically(folder / "report.html", page(sections, definitions).encode())
    return text
