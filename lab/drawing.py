"""How figures look, and the pieces they are put together from; plot.py says what they show.

Promises that the same runs give the same files byte for byte, in print at 8 points, and that a
run has one look in all of them.
"""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # needs no screen; must stand before pyplot

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from lab.runs import Arm, Value

# Okabe and Ito's colours, and four more that colour-blind readers can tell from them.
COLOURS = ("#999999", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLOURS += ("#882255", "#A79A00", "#332288", "#44AA99")
MARKERS = ("h", "o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "-", "-", "--", "-.", "--", "-.", "-", ":", "--", "-")

WIDTH = 4.2  # inches: half a page, so that 8 points here are 8 points in print
plt.rcParams |= {
    "font.size": 8,
    **dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8),
    "axes.titlesize": 8.5,
    "figure.titlesize": 9.5,
    "figure.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "legend.frameon": False,
    "svg.hashsalt": "cosine-sae",  # the same runs give the same file, byte for byte
}


def looks(names: list[str], control: str) -> dict[str, dict]:
    """Colour, marker and dash by a run's place in `names`; black is the control's alone."""
    found = {control: {"color": "black", "marker": "d", "linestyle": "-"}}
    others, n = [m for m in dict.fromkeys(names) if m != control], len(COLOURS)
    for i, name in enumerate(others):
        marker = MARKERS[(i + i // n) % n]  # a colour that comes again has another marker
        found[name] = {"color": COLOURS[i % n], "marker": marker, "linestyle": DASHES[i % n]}
    return found


def short(text: str, width: int = 26) -> str:
    """A name that fits beside a plot, its ends kept; a dollar sign must not start a formula."""
    half = width // 2
    text = text if len(text) <= width else f"{text[: half - 1]}…{text[-half:]}"
    return text.replace("$", r"\$")


def stack(title: str, arms: list[Arm], heights: list[float], legend: bool = True):
    """A figure of bands of these heights in inches, one under the other, and the legend below."""
    heights = [*heights, *([0.1 + 0.155 * math.ceil(len(arms) / 2)] if legend else [])]
    figure = plt.figure(figsize=(WIDTH, sum(heights) + 0.35), layout="constrained")
    figure.suptitle(f"{title}: {short(arms[0].key)}")
    bands = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
    if legend:
        handles = [Line2D([], [], label=short(arm.label), **arm.look) for arm in arms]
        bands[-1].legend(handles=handles, loc="center", ncols=2, labelspacing=0.25)
    return figure, bands


def say(ax, text: str = "no value in any run") -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.4")


def curves(ax, arms: list[Arm], name: str, title: str, log: bool = False, **style) -> None:
    """Mean over seeds with a band of ± one standard error, against the training step."""
    for i, arm in enumerate(arms):
        steps, mean, error = arm.series(name)
        if len(steps):
            every = max(1, len(steps) // 6)
            marks = {"markevery": (i * every // len(arms), every), "markersize": 3.5}
            ax.plot(steps, mean, **arm.look | marks | style)
            # Bands as pixels: their thousands of corners would make up most of an SVG.
            band = {"color": arm.look["color"], "alpha": 0.2, "lw": 0, "rasterized": True}
            ax.fill_between(steps, mean - error, mean + error, **band)
    if not ax.lines:
        say(ax)
    elif log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        wide = high > 10 * low
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set(title=title, xlabel="training step")


def rows(ax, arms: list[Arm], values: list[Value], title: str, ticks: int = 2) -> None:
    """A row per run, from the top: mean ± one standard error; a missing value leaves it empty."""
    for y, (arm, (mean, error)) in enumerate(zip(arms, values, strict=True)):
        ax.errorbar(mean, y, xerr=error, **arm.look)
    ax.set_yticks(range(len(arms)), [short(arm.label) for arm in arms])
    ax.set(title=title, ylim=(len(arms) - 0.5, -0.5))
    ax.xaxis.set_major_locator(MaxNLocator(ticks))
    if not np.isfinite([mean for mean, _ in values]).any():
        say(ax, "no value")


class Figure(NamedTuple):
    name: str  # of its files
    caption: str
    images: dict[str, bytes]  # by the files' suffix


def lay_out(figure) -> None:
    """Lay out once and round: the layout's last digits change from one drawing to the next."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for band in figure.subfigs:
        band.bbox_relative.set_points(band.bbox_relative.get_points().round(5))
    for ax in figure.axes:
        ax.set_position(np.round(ax.get_position().bounds, 5))


def draw(functions: tuple[Callable, ...], arms: list[Arm], suffix: str) -> list[Figure]:
    """The figures of one scale and layer, as PNG and SVG."""
    drawn = []
    for function in functions:
        if figure := function(arms):
            lay_out(figure)
            images = {}
            for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, dpi=220, metadata=metadata)
                images[kind] = buffer.getvalue()
            plt.close(figure)
            drawn.append(Figure(function.__name__ + suffix, function.__doc__ or "", images))
    return drawn
