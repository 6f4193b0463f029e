"""The page that plot.py leaves: summary.md and report.html, of the same tables and figures.

Promises that the page needs nothing but itself, shows nothing as markup that came out of a run, and
is replaced as a whole.
"""

import base64
import html
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from lab.drawing import Figure, draw
from lab.frontier import at_middle, by_layer
from lab.runs import Arm, find
from lab.tables import Grey, Metrics, Table, comparison, level_tables, results
from lab.verdict import verdict_tables

TITLE = "Comparison of runs"
LEGEND = (
    "Values are means over seeds ± one standard error (sd with n − 1, over √n); without ± there is "
    "one seed, or the number compares seeds with each other.  A dash is a missing value, never a 0."
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px;
       margin: auto; padding: 1rem }
h2 { display: inline-block; margin: .5rem 0 } summary { cursor: pointer }
details { border-top: 1px solid #ccc } details details { border: 0 }
.figures { display: grid; gap: 2rem;
           grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)) }
figure { margin: 0 } figure img { width: 100% } figcaption { color: #555; font-size: .9rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .8rem .2rem 0; text-align: left;
         white-space: nowrap; font-variant-numeric: tabular-nums }
.grey { color: #999 }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem }
"""


class Section(NamedTuple):
    """One scale and layer, or one target of it."""

    key: str
    figures: list[Figure]
    tables: list[Table]
    decided: Sequence[Table] = ()  # what stands before all sections, and the figure of it
    verdict: Sequence[Figure] = ()
    arms: Sequence[Arm] = ()  # whose configurations it shows


class Shown(NamedTuple):
    """What there is to show of each scale and layer."""

    verdict: tuple[Callable, ...]  # the figure of what was declared to decide
    over_targets: tuple[Callable, ...]  # figures of all targets, where there are several
    at_a_target: tuple[Callable, ...]  # figures of one
    groups: dict[str, Metrics]
    curves: tuple[str, ...]  # metrics that are read off at equal L0 and FVU
    control: str
    baseline: str


def sections_of(groups: dict[str, list[Arm]], shown: Shown) -> list[Section]:
    """Of the arms of each entry.  Where a layer has several targets: its curves, then its middle
    target in full, then what came out of the others; ten figures for each would hide them all."""
    layers, sections = by_layer(groups), []
    drawable = [key for key, arms in layers.items() if any(arm.records for arm in arms)]
    baseline_key = next((key for key, arms in groups.items() if find(arms, shown.baseline)), None)
    metrics = {name: about for group in shown.groups.values() for name, about in group.items()}
    names = shown.control, shown.baseline
    for layer, arms in layers.items():
        suffix = "_" + re.sub(r"[^\w.-]+", "_", layer) if len(drawable) > 1 else ""
        decided, note = verdict_tables(layer, arms, metrics, *names), ""
        verdict = draw(shown.verdict, arms, suffix) if decided and layer in drawable else []
        middle = at_middle(arms, shown.control)
        entries = {arm.key: groups[arm.key] for arm in arms}
        if len(entries) > 1:
            figures = draw(shown.over_targets, arms, suffix) if layer in drawable else []
            tables = level_tables(arms, metrics, shown.curves, *names)
            sections.append(Section(layer, figures, tables, decided, verdict))
            decided, verdict, note = [], [], f"At the middle one of {len(entries)} target L0s."
        figures = draw(shown.at_a_target, middle, suffix, note) if layer in drawable else []
        tables = comparison(middle, shown.groups, *names, baseline_key)
        sections.append(Section(middle[0].key, figures, tables, decided, verdict, middle))
        del entries[middle[0].key]
        sections += [Section(key, [], results(of, shown.groups)) for key, of in entries.items()]
    return sections


def figures_of(sections: list[Section]) -> list[Figure]:
    return [figure for section in sections for figure in (*section.verdict, *section.figures)]


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


def features_html(sections: list[Section], folder: Path) -> str:
    """Links to the features.html of the runs in `folder`, where one lies there."""
    runs = dict.fromkeys(arm.name for section in sections for arm in section.arms)
    pages = {run: f"{run}/features.html" for run in runs}
    links = [
        tag("a", html.escape(run), f' href="{quote(path)}"')
        for run, path in pages.items()
        if (folder / path).is_file()
    ]
    return tag("p", f"What the latents of a run mean: {', '.join(links)}.") if links else ""


def page(sections: list[Section], definitions: Table, links: str = "") -> str:
    body = tag("h1", TITLE) + tag("p", LEGEND) + links
    for section in sections:
        figures = "".join(map(figure_html, section.verdict))
        body += tag("div", figures, ' class="figures"') if figures else ""
        body += "".join(map(as_html, section.decided))
    for key, figures, tables, *_, arms in sections:
        found = tag("div", "".join(map(figure_html, figures)), ' class="figures"')
        found += "".join([*map(as_html, tables), *map(configuration_html, arms)])
        body += tag("details", tag("summary", tag("h2", html.escape(key))) + found)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = tag("head", head + tag("title", TITLE) + tag("style", STYLE))
    body = tag("body", body + as_html(definitions))
    return "<!doctype html>\n" + tag("html", head + body, ' lang="en"') + "\n"


def summary(sections: list[Section], definitions: Table) -> str:
    parts = [f"# {TITLE}", LEGEND]
    parts += [as_markdown(table) for section in sections for table in section.decided]
    for key, _, tables, *_ in sections:
        parts += [f"## {key}", *map(as_markdown, tables)]
    return "\n\n".join([*parts, as_markdown(definitions)]) + "\n"


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the old file or the whole new one, whatever happens in between."""
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_bytes(content)
    partial_path.replace(path)


def write(folder: Path, sections: list[Section], definitions: Table) -> str:
    """Every figure, summary.md and report.html; returns the text of summary.md."""
    for figure in figures_of(sections):
        for suffix, content in figure.images.items():
            write_atomically(folder / f"{figure.name}.{suffix}", content)
    text = summary(sections, definitions)
    write_atomically(folder / "summary.md", text.encode())
    report = page(sections, definitions, features_html(sections, folder))
    write_atomically(folder / "report.html", report.encode())
    return text
