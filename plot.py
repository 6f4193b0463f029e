"""Compare all runs found: figures, tables and one self-contained report.

    python plot.py          # compares the folders run_* of the current folder
    python plot.py DIR      # those of DIR; what is written then goes there too

Writes each figure as PNG and SVG, summary.md (the tables, which are also printed) and report.html
(all of it in one file that fetches nothing).  Ten runs of 800 steps and three seeds: 6 seconds.

A value is the mean over seeds ± one standard error, sd(ddof=1) / sqrt(n); a single seed has no
error bar.  A missing value is a gap or a dash, never a 0.  Scales and layers never share a figure
or a table.  Steadiness is judged on the raw loss: an averaged one is smooth by construction.
"""

import argparse
import base64
import contextlib
import hashlib
import html
import io
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # needs no screen; must stand before pyplot

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Labels                                                                                         │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘

# CREATE LEGEND -- ADD RUNS HERE THAT WILL BE PLOTTED
# (A run that is not listed is shown too, under the name of its folder.)
labels = {
    "run_0": "given baseline (0 steps)",
    "run_1": "blend 0.1→0.9 + EMA",
    "run_2": "adaptive tightening",
    "run_3": "α fixed at 0.5",
    "run_4": "blend in half the time",
    "run_5": "cosine annealing",
    "run_6": "exponential approach",
    "run_7": "control: vanilla ReLU",
    "run_8": "cosine only",
    "run_9": "blend without EMA",
    "run_10": "learned blend",
}
BASELINE, CONTROL = "run_0", "run_7"

# Okabe and Ito's colours, and four more that colour-blind readers can tell from them.
COLOURS = ("#999999", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLOURS += ("#882255", "#A79A00", "#332288", "#44AA99")
MARKERS = ("h", "o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "-", "-", "--", "-.", "--", "-.", "-", ":", "--", "-")

# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Metrics                                                                                        │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘

KS = (1, 2, 5, 10, 20, 50)
# Group -> name in final_info.json -> title, arrow (the better direction), definition.
GROUPS = {
    "stability": {
        "loss_roughness": ("roughness", "↓", "sd of log raw loss around its running median"),
        "loss_spikes": ("spikes", "↓", "steps whose raw loss is over 1.5 running medians"),
        "grad_norm_cv": ("grad CV", "↓", "sd / mean of the gradient norm"),
        "decoder_pw_mcc": ("PW-MCC", "↑", "mean |cosine| of two seeds' matched decoder rows"),
        "decoder_pw_mcc_null": ("PW-MCC by chance", "", "the same of random dictionaries"),
    },
    "absorption": {
        "absorption_full": ("full absorption", "↓", "SAE-Bench's, mean over letters"),
        "absorption_fraction": ("absorption fraction", "↓", "SAE-Bench's, mean over letters"),
        "absorption_full_sd_over_letters": ("sd over letters", "↓", "of full absorption"),
        "absorption_full_sd_over_seeds": ("sd over seeds", "↓", "of full absorption"),
        "absorption_full_rank_correlation": ("agreement", "↑", "Spearman of two seeds' letters"),
        "absorption_letters": ("letters", "", "letters whose probe is good enough to count"),
    },
    "probing": {
        **{
            f"probing_top_{k}": (f"probing top-{k}", "↑", f"accuracy of probes on k = {k} latents")
            for k in KS
        },
        "probing_all_latents": ("all latents", "↑", "accuracy of probes on all latents"),
        "probing_top_1_sd_over_tasks": ("sd over tasks", "↓", "of top-1"),
        "probing_top_1_sd_over_seeds": ("sd over seeds", "↓", "of top-1"),
    },
    "fidelity": {
        "fvu": ("FVU", "↓", "fraction of variance unexplained, held-out text"),
        "l0": ("L0", "", "latents firing per token; every run aims at the same"),
        "dead": ("dead", "↓", "share of latents that never fire on held-out text"),
        "ce_recovered": ("CE recovered", "↑", "cross-entropy, 1: as the original, 0: as zeros"),
    },
}
METRICS = {name: about for metrics in GROUPS.values() for name, about in metrics.items()}
# These compare seeds with each other: they are one number, with no error over the seeds.
BETWEEN_SEEDS = ("_over_seeds", "_rank_correlation", "_pw_mcc", "_pw_mcc_null")

Value = tuple[float, float]  # mean and standard error, NaN where missing


def heading(metric: str) -> str:
    return " ".join(METRICS[metric][:2]).rstrip()


def mean_and_error(values) -> Value | tuple[np.ndarray, np.ndarray]:
    """Over the last axis, the seeds.  A None makes both NaN; a single seed has no error."""
    values = np.array(values, dtype=float)
    n = values.shape[-1]
    mean = values.mean(-1) if n else np.full(values.shape[:-1], math.nan)
    error = values.std(-1, ddof=1) / math.sqrt(n) if n > 1 else np.full_like(mean, math.nan)
    return mean, error


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Loading                                                                                        │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘

READ_OUT = ", read out with alpha = "


@dataclass
class Arm:
    """One run at one scale and layer, or its SAEs read out with another alpha."""

    name: str
    label: str
    key: str  # "<scale> layer <L>"
    entry: dict  # of final_info.json
    look: dict  # colour, marker and dash, the same in every figure
    records: list[dict] = field(default_factory=list)  # of training_log.jsonl, this layer's
    config: dict = field(default_factory=dict)
    readouts: list["Arm"] = field(default_factory=list)

    @property
    def row(self) -> str:
        return self.name if self.label == self.name else f"{self.name} {self.label}"

    def value(self, metric: str) -> Value:
        mean, error = self.entry["means"].get(metric), self.entry["stderrs"].get(metric)
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


def found_runs(folder: Path) -> dict[str, dict]:
    """final_info.json of every finished run, in natural order; others are named and passed over."""
    runs = {}
    for path in sorted(filter(Path.is_dir, folder.glob("run_*")), key=lambda p: natural(p.name)):
        try:
            info = json.loads(as_written(path / "final_info.json"))
            for entry in info.values():  # the contract: numbers or nulls under "means"
                np.array(list(entry["means"].values()), dtype=float)
            runs[path.name] = info
        except FileNotFoundError:
            print(f"{path.name}: skipped, not finished (it has no final_info.json)")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            print(f"{path.name}: skipped, its final_info.json is no result ({error!r})")
    return runs


def read_optional(path: Path, otherwise: list | dict) -> list | dict:
    """JSON, or its lines as a list; `otherwise` where the file is missing or, said so, damaged."""
    try:
        text = as_written(path)
        lines = path.suffix == ".jsonl"
        found = json.loads(f"[{','.join(text.splitlines())}]" if lines else text)
        if type(found) is not type(otherwise) or (lines and not all("layer" in r for r in found)):
            raise ValueError("it is not what a run writes")
        return found
    except FileNotFoundError:
        return otherwise
    except (OSError, ValueError, TypeError) as error:
        print(f"{path.parent.name}: {path.name} is left out ({error!r})")
        return otherwise


def looks(names: list[str]) -> dict[str, dict]:
    """Colour, marker and dash by the run's place in `labels`; black is the control's alone."""
    found = {CONTROL: {"color": "black", "marker": "d", "linestyle": "-"}}
    others, n = [m for m in dict.fromkeys([*labels, *names]) if m != CONTROL], len(COLOURS)
    for i, name in enumerate(others):
        marker = MARKERS[(i + i // n) % n]  # a colour that comes again has another marker
        found[name] = {"color": COLOURS[i % n], "marker": marker, "linestyle": DASHES[i % n]}
    return found


def load(folder: Path) -> dict[str, list[Arm]]:
    """The runs of each "<scale> layer <L>"; those with a training log, which get figures, first."""
    runs, groups = found_runs(folder), {}
    look_of = looks(list(runs))
    parts = ("stderrs", "final_info_dict", "per_letter", "per_task", "notes")
    for name, info in runs.items():
        records = read_optional(folder / name / "training_log.jsonl", [])
        config = read_optional(folder / name / "config.json", {})
        arms, look = {}, look_of[name]
        for title in sorted(info, key=natural):  # a read-out check stands behind its run
            key, _, alpha = title.partition(READ_OUT)
            entry = {part: {} for part in parts} | info[title]
            if not alpha:
                layer = [r for r in records if key.endswith(f" layer {r['layer']}")]
                arms[key] = Arm(name, labels.get(name, name), key, entry, look, layer, config)
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


def paired(arm: Arm, other: Arm, metric: str) -> Value:
    """Seed s of `arm` minus seed s of `other`, over the seeds both have.

    Seed s starts from the same weights and sees the same batches in every run, so what the seeds
    differ by drops out.
    """
    if metric.endswith(BETWEEN_SEEDS):
        return arm.value(metric)[0] - other.value(metric)[0], math.nan
    a, b = arm.seeds(metric), other.seeds(metric)
    n = min(len(a), len(b))
    return mean_and_error(a[:n] - b[:n])


def task_differences(arm: Arm, control: Arm) -> dict[str, np.ndarray]:
    """Top-1 probing accuracy by task that both have: seed s of `arm` minus seed s of `control`."""
    a, b = arm.tasks(), control.tasks()
    n = min((min(len(a[task]), len(b[task])) for task in a if task in b), default=0)
    return {t: np.array(a[t][:n], float) - np.array(b[t][:n], float) for t in a if t in b and n}


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Figures: the name of each is its file's, the docstring its caption                             │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘

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


def training_curves(arms: list[Arm]):
    """Raw loss around its running median over 51 steps, and how steady its last 80% were."""
    figure, (top, bottom) = stack("Training", arms, [2.4, 0.55 + 0.16 * len(arms)], legend=False)
    ax = top.subplots()
    raw = {"linewidth": 0.4, "linestyle": "-", "alpha": 0.4, "marker": ""}
    curves(ax, arms, "loss", "raw loss, bold: its running median (log scale)", log=True, **raw)
    for i, arm in enumerate(arms):
        steps, loss, _ = arm.series("loss")
        median = [np.median(loss[max(0, j - 25) : j + 26]) for j in range(len(steps))]
        ax.plot(steps, median, **arm.look, markevery=(0.015 * i, 0.15))
    axes = bottom.subplots(1, 3, sharey=True)
    for ax, metric in zip(axes, ("loss_roughness", "loss_spikes", "grad_norm_cv"), strict=True):
        rows(ax, arms, [arm.value(metric) for arm in arms], heading(metric))
    axes[1].xaxis.set_major_locator(MaxNLocator(2, integer=True, min_n_ticks=1))
    return figure


def schedules(arms: list[Arm]):
    """What drives training.  A run without a weight average has no line under EMA decay."""
    figure, (top, _) = stack("Schedules", arms, [3.6])
    axes = top.subplots(2, 2, sharex=True)
    curves(axes[0, 0], arms, "alpha", "alpha")
    curves(axes[0, 1], arms, "ema_decay", "EMA decay")
    curves(axes[1, 0], arms, "lambda", "lambda (log scale)", log=True)
    curves(axes[1, 1], arms, "l0", "L0, target dotted (log)", log=True)
    for arm in arms:
        steps, target, _ = arm.series("l0_target")
        axes[1, 1].plot(steps, target[: len(steps)], ":", color=arm.look["color"], lw=0.7)
    for ax in axes[0]:
        ax.set_xlabel("")
    return figure


def online_absorption(arms: list[Arm]):
    """Absorption of the live weights in training, on the words SAE-Bench trains its probe on."""
    figure, (upper, lower, _) = stack("Online absorption", arms, [1.9, 1.9])
    curves(upper.subplots(), arms, "online_absorption", "absorption fraction ↓")
    curves(lower.subplots(), arms, "online_full_absorption", "full absorption ↓")
    return figure


def absorption_letters(arms: list[Arm]):
    """Full absorption by first letter, mean over seeds.  Hatched: the letter was not scored."""
    figure, (band,) = stack("Absorption", arms, [0.95 + 0.17 * len(arms)], legend=False)
    left, right = band.subplots(1, 2, sharey=True, width_ratios=(2.5, 1))
    rows(right, arms, [arm.value("absorption_full") for arm in arms], "mean ↓")
    left.set_title("full absorption by letter ↓")
    left.grid(False)
    rates = [arm.entry["per_letter"].get("absorption_full", {}) for arm in arms]
    letters = sorted({letter for rate in rates for letter in rate})
    if not letters:
        say(left)
        return figure
    table = [[mean_and_error(rate.get(letter, []))[0] for letter in letters] for rate in rates]
    left.patch.set(hatch="//////", edgecolor="0.75", lw=0)  # shows where there is no cell
    at = np.arange(len(letters)), np.arange(len(arms))
    mesh = left.pcolormesh(*at, np.ma.masked_invalid(table), cmap="YlGnBu", vmin=0)
    left.set_xticks(at[0], letters)
    left.tick_params(length=0)
    for i, tick in enumerate(left.xaxis.get_major_ticks()):
        tick.set_pad(1 + 8 * (i % 2))  # at two heights: 26 letters are wider than the map
    band.colorbar(mesh, ax=left, location="bottom", aspect=30, pad=0.02)
    return figure


def probing(arms: list[Arm]):
    """Sparse probing.  Bottom: a tick is a task; the error of the tasks' mean is over seeds."""
    control = find(arms, CONTROL)
    others = [arm for arm in arms if control and arm is not control]
    tasks = sorted({task for arm in arms for task in arm.tasks()})
    heights = [2.1, 0.5 + 0.42 * max(1, len(tasks)), 0.55 + 0.16 * max(2, len(others))]
    figure, (upper, middle, lower, _) = stack("Sparse probing", arms, heights)
    accuracy_by_k(upper.subplots(), arms)
    accuracy_by_task(middle.subplots(), arms, tasks)
    ax, title = lower.subplots(), f"top-1 less {CONTROL}'s, by task and mean"
    if not others:
        say(ax, f"no differences: {'no other run' if control else CONTROL + ' is missing'}")
        ax.set(title=title, xticks=[], yticks=[])
        return figure
    found = [list(task_differences(arm, control).values()) for arm in others]
    rows(ax, others, [mean_and_error(np.mean(d, 0) if d else []) for d in found], title, 5)
    for y, (arm, difference) in enumerate(zip(others, found, strict=True)):
        ticks = np.mean(difference, 1) if difference else []
        ax.plot(ticks, [y] * len(ticks), "|", color=arm.look["color"], markersize=7, alpha=0.6)
    ax.axvline(0, color="black", lw=0.8)
    return figure


def accuracy_by_k(ax, arms: list[Arm]) -> None:
    asked = [k for k in KS if any(math.isfinite(a.value(f"probing_top_{k}")[0]) for a in arms)]
    channels = [arms[0].value(f"lm_top_{k}")[0] for k in asked]
    ax.plot(asked, channels, color="0.75", lw=3, zorder=1, label="the model's own channels")
    for arm in arms:
        means, errors = zip(*(arm.value(f"probing_top_{k}") for k in asked or KS), strict=True)
        ax.errorbar(asked or KS, means, yerr=errors, **arm.look)
    ax.set_xscale("log")
    ax.set_xticks(asked, map(str, asked))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(title="accuracy ↑ by number of latents k", xlabel="k")
    ax.legend(loc="lower right")


def accuracy_by_task(ax, arms: list[Arm], tasks: list[str]) -> None:
    for i, arm in enumerate(arms):
        offset = 0.76 * ((i + 0.5) / len(arms) - 0.5)
        for y, task in enumerate(tasks):
            mean, error = mean_and_error(arm.tasks().get(task, []))
            ax.errorbar(mean, y + offset, xerr=error, **arm.look | {"markersize": 3.5})
    ax.set_yticks(range(len(tasks)), [short(task.rsplit("/", 1)[-1], 18) for task in tasks])
    ax.set_yticks(np.arange(1, len(tasks)) - 0.5, minor=True)
    ax.grid(False, axis="y", which="major")
    ax.grid(True, axis="y", which="minor", color="0.8")
    ax.tick_params(axis="y", which="both", length=0)
    ax.set(title="top-1 accuracy ↑ by task", ylim=(len(tasks) - 0.5, -0.5))


def tradeoff(arms: list[Arm]):
    """A run that absorbs less because it reconstructs worse lies further to the right."""
    metrics = ("absorption_full", "absorption_fraction", "probing_top_1")
    heights = [0.5 + 0.15 * max(8, len(arms))] * len(metrics)
    figure, bands = stack("Trade-off", arms, heights, legend=False)
    for band, metric in zip(bands, metrics, strict=True):
        ax = band.subplots()
        points = [(*arm.value(metric), *arm.value("fvu"), arm) for arm in arms]
        points = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[2])]
        # Names stand in the margin in the order of their points, each tied to its own: no overlap.
        for i, (y, dy, x, dx, arm) in enumerate(sorted(points, key=lambda p: p[0])):
            ax.errorbar(x, y, xerr=dx, yerr=dy, **arm.look)
            place = {"xytext": (1.04, (i + 0.5) / len(points)), "textcoords": "axes fraction"}
            tie = {"arrowstyle": "-", "lw": 0.5, "color": arm.look["color"]}
            tie |= {"relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
            ax.annotate(short(arm.label), (x, y), **place, va="center", arrowprops=tie)
        if not points:
            say(ax)
        ax.set(title=heading(metric), xlabel=heading("fvu"))
        ax.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def readout(arms: list[Arm]):
    """The same SAEs probed with another alpha (open) than the one they were trained to (filled)."""
    if not (scored := with_readouts(arms)):
        return None
    figure, (band,) = stack("Read-out check", scored, [0.55 + 0.17 * len(scored)], legend=False)
    axes = band.subplots(1, 2, sharey=True)
    for ax, metric in zip(axes, ("probing_top_1", "probing_top_5"), strict=True):
        rows(ax, scored, [arm.value(metric) for arm in scored], heading(metric), 3)
    return figure


FIGURES = (training_curves, schedules, online_absorption, absorption_letters)
FIGURES += (probing, tradeoff, readout)
Figure = tuple[str, str, bytes]  # name, caption and SVG


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the old file or the whole new one, whatever happens in between."""
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_bytes(content)
    partial_path.replace(path)


def lay_out(figure) -> None:
    """Lay out once and round: the layout's last digits change from one drawing to the next."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for band in figure.subfigs:
        band.bbox_relative.set_points(band.bbox_relative.get_points().round(5))
    for ax in figure.axes:
        ax.set_position(np.round(ax.get_position().bounds, 5))


def draw(arms: list[Arm], folder: Path, suffix: str) -> list[Figure]:
    """Write every figure of one scale and layer, as PNG and SVG."""
    drawn = []
    for function in FIGURES:
        if figure := function(arms):
            lay_out(figure)
            name, images = function.__name__ + suffix, {}
            for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, dpi=220, metadata=metadata)
                images[kind] = buffer.getvalue()
                write_atomically(folder / f"{name}.{kind}", images[kind])
            plt.close(figure)
            drawn.append((name, function.__doc__, images["svg"]))
    return drawn


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Tables                                                                                         │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


class Table(NamedTuple):
    heading: str
    note: str
    lines: list[list[str]]  # the first is the head; none at all: only the note


Row = tuple[str, Callable[[str], Value]]  # its name, and what gives the value of a metric


def shown(value: Value, sign: str = "") -> str:
    """Four decimals, or one from 10 upwards; a dash for what is missing."""
    mean, error = value
    if not math.isfinite(mean):
        return "–"
    digits = 4 if abs(mean) < 10 else 1
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def metric_tables(title: str, note: str, rows: list[Row], groups=tuple(GROUPS), sign=""):
    """One table per group of metrics; a metric that no row has is no column, but is named."""
    tables = []
    for group in groups:
        found = {m: [value(m) for _, value in rows] for m in GROUPS[group]}
        kept = [m for m in found if np.isfinite([mean for mean, _ in found[m]]).any()]
        absent = ", ".join(METRICS[m][0] for m in found if m not in kept)
        lines = [["", *map(heading, kept)]]
        for i, (name, _) in enumerate(rows):
            lines.append([name, *(shown(found[m][i], sign) for m in kept)])
        text = f"{note}  No value in any row: {absent}." if absent else note
        tables.append(Table(f"{title}: {group}", text.strip(), lines if kept else []))
    return tables


def runs_table(arms: list[Arm]) -> Table:
    """What was run, the notes the runs left, and the settings in which they differ."""
    lines, notes = [["", "what it tries", "seeds", "steps"]], []
    first = next((arm for arm in arms if arm.config.get("scale")), None)
    for arm in arms:
        seeds = max(map(len, arm.entry["final_info_dict"].values()), default="–")
        steps = arm.config.get("total_steps", arm.entry["means"].get("training_steps", "–"))
        title = arm.config.get("run", {}).get("title", "–")
        lines.append([arm.row, title, str(seeds), str(steps)])
        if scale := arm.config.get("scale"):
            theirs = first.config["scale"]
            names = sorted(n for n in {*scale, *theirs} if scale.get(n) != theirs.get(n))
            if names:
                which = f"{', '.join(names)} than {first.name}"
                notes.append(f"NOT COMPARABLE: {arm.name} ran with another {which}.")
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
        sd = np.std(known, ddof=1) if len(known) > 1 else math.nan
        values = [mean_and_error(known)[0], sd, *(means.get(task, math.nan) for task in tasks)]
        lines.append([arm.row, *(shown((value, math.nan), "+") for value in values)])
    note = "Paired by seed, then the mean over seeds; mean and sd are over tasks."
    return Table(f"Differences to {CONTROL}: top-1 probing by task", note, lines)


def rank_correlation(pairs: list[Value]) -> float | None:
    """Spearman's, ties sharing their mean rank; None below three pairs or if a side is constant."""
    sides = np.array(pairs).reshape(-1, 2).T[:, :, None]
    ranks = np.sign(sides - sides.swapaxes(1, 2)).sum(-1)  # twice the rank, up to a constant
    return float(np.corrcoef(ranks)[0, 1]) if len(pairs) > 2 and ranks.any(1).all() else None


def online_table(arms: list[Arm]) -> Table:
    lines = [["", "runs", "Spearman rank correlation"]]
    for kind, online in (("full", "online_full_absorption"), ("fraction", "online_absorption")):
        pairs = [(arm.value(online)[0], arm.value(f"absorption_{kind}")[0]) for arm in arms]
        pairs = [pair for pair in pairs if np.isfinite(pair).all()]
        found = rank_correlation(pairs)
        title = METRICS[f"absorption_{kind}"][0]
        lines.append([title, str(len(pairs)), "null" if found is None else f"{found:.2f}"])
    note = "The last value of training against SAE-Bench's, over runs.  null: fewer than three."
    return Table("Does online absorption foretell SAE-Bench's?", note, lines)


def comparison(arms: list[Arm], baseline_key: str | None) -> list[Table]:
    """All tables of one scale and layer."""
    control, baseline = find(arms, CONTROL), find(arms, BASELINE)
    trained = [arm for arm in arms if arm is not baseline]
    others = [arm for arm in trained if arm is not control]

    def channels(metric: str) -> Value:
        name = metric.replace("probing_", "lm_").replace("latents", "channels")
        return arms[0].value(name)[0], math.nan  # the same for every seed

    def less_baseline(arm: Arm, metric: str) -> Value:
        mean, error = arm.value(metric)
        return mean - baseline.value(metric)[0], error

    values = [(arm.row, arm.value) for arm in arms]
    tables = [runs_table(arms)]
    tables += metric_tables("Results", "", values, ("stability", "absorption", "fidelity"))
    tables += metric_tables("Results", "", [*values, ("model's channels", channels)], ("probing",))
    if not trained:
        return tables
    title = f"Differences to {CONTROL}"
    if control and others:
        note = "Paired: seed s has the same start and the same batches in every run."
        pairs = [(arm.row, partial(paired, arm, control)) for arm in others]
        tables += metric_tables(title, note, pairs, sign="+")
        tables.append(task_table(others, control))
    elif others:
        tables.append(Table(title, f"None: {CONTROL} is missing.", []))
    title = f"Differences to {BASELINE}"
    if baseline:
        note = f"Not paired: {BASELINE} is a single SAE, and the error is that of the run."
        pairs = [(arm.row, partial(less_baseline, arm)) for arm in trained]
        tables += metric_tables(title, note, pairs, sign="+")
    elif baseline_key:
        note = f"None: {BASELINE} is of another scale ({baseline_key}) and cannot be compared."
        tables.append(Table(title, note, []))
    if swapped := [(arm.row, arm.value) for arm in with_readouts(arms)]:
        note = "The same SAEs, probed with another alpha than they were trained to."
        tables += metric_tables("Read-out check", note, swapped, ("probing",))
    return [*tables, online_table(trained)]


def definitions() -> Table:
    lines = [["", "better", "what it is"]]
    for group, metrics in GROUPS.items():
        lines += [[f"{group}: {t}", arrow or "–", what] for t, arrow, what in metrics.values()]
    note = "Roughness, spikes and grad CV: of the last 80% of steps.  Probing: mean over tasks."
    return Table("Metrics", note, lines)


def as_markdown(table: Table) -> str:
    """Columns are padded, so that it reads well as plain text too."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in table.lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines[1:1] = [["-" * width for width in widths]] if lines else []
    padded = [" | ".join(map(str.ljust, line, widths)) for line in lines]
    body = "\n".join(f"| {line} |" for line in padded)
    return "\n\n".join(filter(None, [f"### {table.heading}", table.note, body]))


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Report                                                                                         │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘

Section = tuple[str, list[Arm], list[Figure], list[Table]]
TITLE = "Comparison of runs"
LEGEND = (
    "Values are means over seeds ± one standard error (sd with n − 1, over √n); without ± there is "
    "one seed, or the number compares seeds with each other.  A dash is a missing value, never a 0."
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
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem }
"""


def tag(name: str, content: str, attributes: str = "") -> str:
    return f"<{name}{attributes}>{content}</{name}>"


def as_html(table: Table) -> str:
    body = ""
    for i, line in enumerate(table.lines):
        cells = [tag("td" if i else "th", html.escape(cell)) for cell in line]
        body += tag("tr", "".join(cells))
    parts = tag("h3", html.escape(table.heading)), tag("p", html.escape(table.note))
    return "".join(parts) + tag("div", tag("table", body), ' class="wide"')


def figure_html(figure: Figure) -> str:
    """An image: as inline SVG the element ids of one figure would clash with the next one's."""
    name, caption, svg = figure
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    image = f'<img src="{source}" alt="{html.escape(caption)}">'
    return tag("figure", image + tag("figcaption", html.escape(caption)), f' id="{name}"')


def configuration_html(arm: Arm) -> str:
    text = json.dumps(arm.config, indent=2, ensure_ascii=False, sort_keys=True)
    summary = tag("summary", f"Configuration of {html.escape(arm.row)}")
    return tag("details", summary + tag("pre", html.escape(text))) if arm.config else ""


def report(sections: list[Section]) -> str:
    body = tag("h1", TITLE) + tag("p", LEGEND)
    for key, arms, figures, tables in sections:
        body += tag("h2", html.escape(key))
        body += tag("div", "".join(map(figure_html, figures)), ' class="figures"')
        body += "".join([*map(as_html, tables), *map(configuration_html, arms)])
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = tag("head", head + tag("title", TITLE) + tag("style", STYLE))
    body = tag("body", body + as_html(definitions()))
    return "<!doctype html>\n" + tag("html", head + body, ' lang="en"') + "\n"


def summary(sections: list[Section]) -> str:
    parts = [f"# {TITLE}", LEGEND]
    for key, *_, tables in sections:
        parts += [f"## {key}", *map(as_markdown, tables)]
    return "\n\n".join([*parts, as_markdown(definitions())]) + "\n"


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ main                                                                                           │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def compare(folder: Path) -> None:
    groups = load(folder)
    if not groups:
        first = "run `python experiment.py --out_dir=run_1` first"
        sys.exit(f"error: no finished run found in {folder.resolve()}: {first}")
    drawable = [key for key, arms in groups.items() if any(arm.records for arm in arms)]
    baseline_key = next((key for key, arms in groups.items() if find(arms, BASELINE)), None)
    sections = []
    for key, arms in groups.items():
        suffix = "_" + re.sub(r"[^\w.-]+", "_", key) if len(drawable) > 1 else ""
        figures = draw(arms, folder, suffix) if key in drawable else []
        sections.append((key, arms, figures, comparison(arms, baseline_key)))
    text = summary(sections)
    write_atomically(folder / "summary.md", text.encode())
    write_atomically(folder / "report.html", report(sections).encode())
    print(text)
    n = sum(len(figures) for _, _, figures, _ in sections)
    print(f"wrote {n} figures (PNG and SVG), summary.md and report.html in {folder.resolve()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare all runs found in a folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="default: this one")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        sys.exit(f"error: {folder} is not a folder: name the one that holds the folders run_*")
    try:
        compare(folder)
    except OSError as error:
        sys.exit(f"error: {error.strerror or error}: {error.filename or folder}")


if __name__ == "__main__":
    main()
