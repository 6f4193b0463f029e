"""Which run is better at what, by how much and how sure: what was declared to decide, shown first.

Promises that a table and the figure beside it show the same comparisons, that "better" and "worse"
stand only where the declared test says so, and that all else is called descriptive.
"""

import math
from typing import NamedTuple

from lab.drawing import differences, in_twos, stack
from lab.frontier import ByTarget, Comparison, Endpoint, at_middle, by_run, endpoints, several
from lab.runs import Arm
from lab.tables import MISSING, Metrics, Table, difference, not_comparable, shown, titled

SURE = 0.05  # a question's Holm p below which a run is called better or worse
DECLARED = (
    "What was declared to decide: a run less {control}, paired by seed, with the 95% BCa bootstrap "
    "interval of the mean (from six seeds on; ± is the standard error), the two-sided p of an "
    "exact sign flip test and the number of seeds.  Holm p: that p among the {n} questions asked "
    "of a run (not among runs); one that is missing counts as 1.  {how}  Grey, or in brackets: "
    "less than the sd over {control}'s own seeds.  Everything else on this page is descriptive."
)
EQUAL_FIDELITY = (
    "Absorption is compared at equal L0 and at equal FVU, and the larger p of the two counts, or 1 "
    "where they differ in sign."
)
SAME_TARGET = "There is one target: runs are compared at the target, not at equal fidelity."


class Asked(NamedTuple):
    """Every run but the control and the baseline, and what was asked of it."""

    control: ByTarget
    arms: list[Arm]  # one of each run
    found: list[dict[str, Endpoint]]  # of each run, by question


def asked_of(arms: list[Arm], control_name: str, baseline_name: str) -> Asked | None:
    """None where there is no control, or no run to compare with it."""
    runs = by_run(arms)
    control = runs.pop(control_name, None)
    runs.pop(baseline_name, None)
    if not control or not runs:
        return None
    found = [endpoints(run, control) for run in runs.values()]
    return Asked(control, [next(iter(run.values())) for run in runs.values()], found)


def where(reading: Comparison, control: ByTarget, metrics: Metrics) -> str:
    """What the two runs have in common there."""
    if reading.x:
        return f"at {metrics[reading.x][0]} {shown((reading.level, math.nan))}"
    return "mean over targets" if several(control) else "at the target"


def in_words(endpoint: Endpoint, metrics: Metrics) -> str:
    """Better or worse than the control, where the question's Holm p says that there is one."""
    if math.isnan(endpoint.p):
        return MISSING
    better = -1 if metrics[endpoint.metric][1] == "↓" else 1
    word = "better" if better * endpoint.readings[0].found.mean > 0 else "worse"
    said = word if endpoint.holm < SURE else "cannot tell"
    return f"{said} (Holm p {endpoint.holm:.2g})"


def verdict_tables(
    layer: str, arms: list[Arm], metrics: Metrics, control_name: str, baseline_name: str
) -> list[Table]:
    """The verdicts, and a table for each question with the differences behind them; none without a
    control."""
    asked = asked_of(arms, control_name, baseline_name)
    if not asked:
        return []
    questions = asked.found[0]
    how = EQUAL_FIDELITY if several(asked.control) else SAME_TARGET
    notes = [DECLARED.format(control=control_name, n=len(questions), how=how)]
    notes += not_comparable(at_middle(arms, control_name))
    titles = {q: f"{q}: {titled(metrics[first.metric])}" for q, first in questions.items()}
    rows = list(zip(asked.arms, asked.found, strict=True))
    lines = [["", *titles.values()]]
    lines += [[arm.row, *(in_words(e, metrics) for e in found.values())] for arm, found in rows]
    tables = [Table(f"Which run is better at what: {layer}", "  ".join(notes), lines)]
    for question, first in questions.items():
        places = [where(reading, asked.control, metrics) for reading in first.readings]
        lines = [["", *places, "Holm p"]]
        for arm, found in rows:
            endpoint = found[question]
            cells = [difference(reading.found, reading.in_noise) for reading in endpoint.readings]
            p = MISSING if math.isnan(endpoint.p) else f"{endpoint.holm:.2g}"
            lines.append([arm.row, *cells, p])
        tables.append(Table(f"Primary endpoint of {titles[question]} ({layer})", "", lines))
    return tables


def verdict_figure(arms: list[Arm], metrics: Metrics, control_name: str, baseline_name: str):
    """The same differences as the tables: a panel for each reading of each question; None without a
    control."""
    asked = asked_of(arms, control_name, baseline_name)
    if not asked:
        return None
    panels = [
        (question, i, f"{titled(metrics[first.metric])}\n{where(reading, asked.control, metrics)}")
        for question, first in asked.found[0].items()
        for i, reading in enumerate(first.readings)
    ]
    heights = [(0.62 + 0.16 * len(asked.arms)) * math.ceil(len(panels) / 2)]
    figure, (band,) = stack("Verdict", arms, heights, legend=False)
    axes = in_twos(band, len(panels), sharey=True)
    for ax, (question, i, title) in zip(axes, panels, strict=True):
        found = [of_run[question] for of_run in asked.found]
        sure = [endpoint.holm < SURE for endpoint in found]
        differences(ax, asked.arms, [e.readings[i] for e in found], sure, title)
    return figure
