"""How figures look, and the pieces they are put together from; plot.py says what they show.

Promises that the same runs give the same files byte for byte, in print at 8 points, and that a
run has one look in all of them.
"""

import io
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # needs no screen; must stand before pyplot

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from lab.comparison import sd
from lab.frontier import EVERY_L0, Comparison, at_level, by_run, levels, of_seeds
from lab.runs import AT_L0, Arm, Value

# Okabe and Ito's colours, and four more that colour-blind readers can tell from them.
COLOURS = ("#999999", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLOURS += ("#882255", "#A79A00", "#332288", "#44AA99")
MARKERS = ("h", "o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "-", "-", "--", "-.", "--", "-.", "-", ":", "--", "-")

MEASURED_NOISE = "measure_noise.json"  # beside the runs: what scoring one SAE again and again gives
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
    keys, runs = {arm.key for arm in arms}, by_run(arms)
    heights = [*heights, *([0.1 + 0.155 * math.ceil(len(runs) / 2)] if legend else [])]
    figure = plt.figure(figsize=(WIDTH, sum(heights) + 0.35), layout="constrained")
    key = arms[0].key if len(keys) == 1 else arms[0].key.partition(AT_L0)[0] + EVERY_L0
    figure.suptitle(f"{title}: {short(key, 34)}")
    bands = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
    if legend:
        named = [next(iter(run.values())) for run in runs.values()]
        handles = [Line2D([], [], label=short(arm.label), **arm.look) for arm in named]
        bands[-1].legend(handles=handles, loc="center", ncols=2, labelspacing=0.25)
    return figure, bands


def in_twos(band, n: int, **axes) -> list:
    """So many axes of a band, two to a row."""
    found = [*band.subplots(math.ceil(n / 2), 2, squeeze=False, **axes).flat]
    for ax in found[n:]:
        ax.remove()
    return found[:n]


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
        logarithmic(ax, "y")
    ax.set(title=title, xlabel="training step")


def logarithmic(ax, side: str, wide: float = 10) -> None:
    """With plain numbers: a few to each power of ten from a range of `wide` on, else round ones."""
    ax.set(**{f"{side}scale": "log"})
    (low, high), axis = getattr(ax, f"get_{side}lim")(), getattr(ax, f"{side}axis")
    subs = (1, 2, 5) if high > 10 * low else (1, 2, 3, 5, 7)
    if side == "x" and high > 20 * low:
        subs = (1, 3)  # numbers stand side by side there
    axis.set_major_locator(LogLocator(subs=subs) if high > wide * low else MaxNLocator(5))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def rows(ax, arms: list[Arm], values: list[Value], title: str, ticks: int = 2) -> None:
    """A row per run, from the top: mean ± one standard error; a missing value leaves it empty."""
    for y, (arm, (mean, error)) in enumerate(zip(arms, values, strict=True)):
        ax.errorbar(mean, y, xerr=error, **arm.look)
    ax.set_yticks(range(len(arms)), [short(arm.label) for arm in arms])
    ax.set(title=title, ylim=(len(arms) - 0.5, -0.5))
    ax.xaxis.set_major_locator(MaxNLocator(ticks))
    if not np.isfinite([mean for mean, _ in values]).any():
        say(ax, "no value")


def differences(ax, arms: list[Arm], found: list[Comparison], sure: list[bool], title: str) -> None:
    """A row per run, from the top: its difference to the control with the 95% interval (of few
    seeds ± one standard error), open unless it is `sure`; grey, the sd over the control's seeds."""
    for y, (arm, (d, *_), filled) in enumerate(zip(arms, found, sure, strict=True)):
        face = {} if filled else {"markerfacecolor": "white"}
        ax.errorbar(d.mean, y, xerr=np.transpose([d.bar]), **arm.look | face)
    noise = sd(next((comparison.control for comparison in found if len(comparison.control)), ()))
    if math.isfinite(noise):
        ax.axvspan(-noise, noise, color="0.9", lw=0, zorder=0)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(range(len(arms)), [short(arm.label) for arm in arms])
    ax.set(title=title, ylim=(len(arms) - 0.5, -0.5))
    ax.xaxis.set_major_locator(MaxNLocator(2))
    ax.xaxis.set_major_formatter("{x:g}")
    if not any(math.isfinite(comparison.found.mean) for comparison in found):
        say(ax, "no value")


def over_targets(ax, arms: list[Arm], x: str, y: str) -> None:
    """A line per run from target to target through the means, and a small dot per seed; L0 and FVU
    on log axes, over which lines are read off."""
    for run in by_run(arms).values():
        at = list(run.values())
        means = [[arm.value(name)[0] for arm in at] for name in (x, y)]
        ax.plot(*means, **at[0].look | {"markersize": 3.5})
        for xs, ys in ([of_seeds(arm, name) for name in (x, y)] for arm in at):
            n = min(len(xs), len(ys))
            dot = {"color": at[0].look["color"], "markersize": 1.5, "rasterized": True}
            ax.plot(xs[:n], ys[:n], "o", markeredgewidth=0, alpha=0.5, zorder=1, **dot)
    logarithmic(ax, "x", wide=4)
    if y.startswith("fvu"):
        logarithmic(ax, "y", wide=4)


def less_control(ax, arms: list[Arm], control_name: str, x: str, y: str) -> None:
    """A line per run: its difference to the control where both have the same x, at the places that
    follow from the control, with the 95% interval (of few seeds ± one standard error)."""
    runs = by_run(arms)
    if (control := runs.pop(control_name, None)) is None or not runs:
        say(ax, f"no other run than {control_name}" if control else f"{control_name} is missing")
        return
    places = np.array([*levels(control, x).values()])
    for i, run in enumerate(runs.values()):
        found = [at_level(run, control, x, y, place).found for place in places]
        beside = places * 1.004 ** (i - (len(runs) - 1) / 2)  # bars must not hide each other
        look = next(iter(run.values())).look | {"markersize": 3.5}
        ax.errorbar(
            beside, [d.mean for d in found], yerr=np.transpose([d.bar for d in found]), **look
        )
    ax.axhline(0, color="black", lw=0.8)
    logarithmic(ax, "x", wide=4)


def shares(ax, arms: list[Arm], parts: dict[str, tuple[str, str]]) -> None:
    """A bar per run of parts that add to 1 ({metric: (title, colour)}), with the error of the
    first; a part's number stands in it where there is room."""
    ends = np.zeros(len(arms))
    for i, (metric, (title, colour)) in enumerate(parts.items()):
        values = [arm.value(metric) for arm in arms]
        widths, errors = np.array(values).T
        ax.barh(range(len(arms)), widths, 0.74, ends, color=colour, label=title)
        for y, width in enumerate(widths):
            if width > 0.08:
                at, side = (ends[y] + width - 0.01, "right") if i else (0.01, "left")
                look = {"fontsize": 7, "color": "black" if i else "white"}
                number = f"{width:.3f}".removeprefix("0")
                ax.text(at, y, number, ha=side, va="center_baseline", **look)
        if not i:
            bar = {
                "fmt": "none",
                "ecolor": "black",
                "elinewidth": 0.7,
                "capsize": 2.2,
                "capthick": 0.7,
            }
            below = np.arange(len(arms)) + 0.27  # the numbers
            ax.errorbar(widths, below, xerr=errors, **bar)
        ends = ends + widths
    for y in np.flatnonzero(~np.isfinite(ends)):
        ax.text(0.5, y, "no value", ha="center", va="center", color="0.4")
    ax.set_yticks(range(len(arms)), [short(arm.label) for arm in arms])
    ax.set(xlim=(0, 1), ylim=(len(arms) - 0.5, -0.5))
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(parts))


def grouped(ax, arms: list[Arm], names: list[str], value: Callable[[Arm, str], Value]) -> None:
    """A group of rows for each of `names`, from the top: in it a row per run, mean ± error."""
    for i, arm in enumerate(arms):
        offset = 0.76 * ((i + 0.5) / len(arms) - 0.5)
        for y, name in enumerate(names):
            mean, error = value(arm, name)
            ax.errorbar(mean, y + offset, xerr=error, **arm.look | {"markersize": 3.5})
    ax.set_yticks(range(len(names)), [short(name.rsplit("/", 1)[-1], 18) for name in names])
    ax.set_yticks(np.arange(1, len(names)) - 0.5, minor=True)
    ax.grid(False, axis="y", which="major")
    ax.grid(True, axis="y", which="minor", color="0.8")
    ax.tick_params(axis="y", which="both", length=0)
    ax.set_ylim(len(names) - 0.5, -0.5)


def named_points(ax, arms: list[Arm], x: str, y: str) -> None:
    """A point per run.  Names stand in the margin in the order of their points, each tied to its
    own: no overlap."""
    points = [(*arm.value(y), *arm.value(x), arm) for arm in arms]
    points = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[2])]
    for i, (up, d_up, along, d_along, arm) in enumerate(sorted(points, key=lambda p: p[0])):
        ax.errorbar(along, up, xerr=d_along, yerr=d_up, **arm.look)
        place = {"xytext": (1.04, (i + 0.5) / len(points)), "textcoords": "axes fraction"}
        tie = {"arrowstyle": "-", "lw": 0.5, "color": arm.look["color"]}
        tie |= {"relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
        ax.annotate(short(arm.label), (along, up), **place, va="center", arrowprops=tie)
    if not points:
        say(ax)
    ax.xaxis.set_major_locator(MaxNLocator(4))


def noise_bands(ax, control: Arm, metric: str) -> str:
    """Behind differences to the control: grey, the sd over its own seeds; hatched, how far the mean
    difference strays because the score itself is noisy, where that was measured: all seeds and both
    runs are scored on the same texts, so more seeds make it no smaller.  Returns what a caption
    must say of the latter."""
    noise = sd(control.seeds(metric))
    if math.isfinite(noise):
        ax.axvspan(-noise, noise, color="0.9", lw=0, zorder=0)
    try:
        half = 1.96 * float(control.entry[MEASURED_NOISE][metric]["sd_of_difference_of_means"])
    except (LookupError, TypeError, ValueError):
        return ""
    if not math.isfinite(half):
        return ""
    band = ax.axvspan(-half, half, fc="none", ec="0.7", hatch="////", lw=0, zorder=0.5)
    band.set_hatch_linewidth(0.4)
    return f"Hatched: ± {half:.2g}, 1.96 standard errors of the score itself ({MEASURED_NOISE})."


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


def draw(functions: Iterable[Callable], arms: list[Arm], suffix: str, note="") -> list[Figure]:
    """The figures of one scale and layer, as PNG and SVG.  A caption is the docstring, what the
    figure itself is labelled with, and `note`."""
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
            caption = "  ".join(filter(None, (function.__doc__, figure.get_label(), note)))
            drawn.append(Figure(function.__name__ + suffix, caption, images))
    return drawn
