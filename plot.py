# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["numpy==1.26.4", "scipy==1.17.1", "matplotlib==3.11.2"]
# ///
"""Compare runs: figures, tables and one self-contained report.

    python plot.py          # compares the folders run_* of the current folder
    python plot.py DIR      # those of DIR; what is written then goes there too

Plots the runs that `labels` names; where it names none of those found, all of them.
Writes each figure as PNG and SVG, summary.md (the tables, which are also printed) and report.html
(all of it in one file that fetches nothing).  Ten runs of 800 steps and three seeds: 6 seconds.
What was declared to decide stands first; all else is descriptive.  Runs with several target L0s
are compared as curves, at equal L0 and at equal FVU, and shown in full at the middle target.

A value is the mean over seeds ± one standard error, sd(ddof=1) / sqrt(n); a single seed has no
error bar.  A missing value is a gap or a dash, never a 0.  Scales and layers never share a figure
or a table.  Steadiness is judged on the raw loss: an averaged one is smooth by construction.
"""

import lab  # isort: skip: before any package, it says which Python and systems have them all

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator, NullLocator

from lab.comparison import mean_and_error
from lab.drawing import (
    MEASURED_NOISE,
    curves,
    grouped,
    in_twos,
    less_control,
    looks,
    named_points,
    noise_bands,
    over_targets,
    rows,
    say,
    shares,
    stack,
)
from lab.frontier import measured_as, target_of
from lab.report import Shown, figures_of, sections_of, write
from lab.runs import (
    Arm,
    arms_of,
    chosen,
    find,
    found_runs,
    read_optional,
    task_differences,
    with_readouts,
)
from lab.tables import definitions, titled
from lab.verdict import verdict_figure

# ┌────────────────────────────────────────────────────────────────────┐
# │ Labels                                                             │
# └────────────────────────────────────────────────────────────────────┘

# CREATE LEGEND -- ADD RUNS HERE THAT WILL BE PLOTTED
# "run_i": its label, or (its label, the title of the row of RUNS that the label was written for):
# where another row made the run, the table of runs says so.
labels = {
    "run_0": "given baseline (0 steps)",
    "run_1": ("blend 0.1→0.9 + EMA", "the method: alpha 0.1 -> 0.9 linearly, EMA on"),
    "run_2": ("adaptive tightening", "alpha and L0 target paced by measured absorption"),
    "run_3": ("α fixed at 0.5", "ablation: alpha fixed at 0.5"),
    "run_4": ("blend in half the time", "ablation: alpha 0.1 -> 0.9 in half the time, then held"),
    "run_5": ("cosine annealing", "ablation: cosine annealing of alpha, 0.1 -> 0.9"),
    "run_6": ("exponential approach", "ablation: exponential approach of alpha, 0.1 -> 0.9"),
    "run_7": ("control: vanilla ReLU", "control: the vanilla ReLU SAE (alpha = 1, no EMA)"),
    "run_8": ("cosine only", "predecessor: cosine only (alpha = 0, no EMA)"),
    "run_9": ("blend without EMA", "ablation: run_1 without the EMA"),
    "run_10": (
        "cosine, norm restored",
        "prior art, a variant: cosine decides what fires, its norm restored (arXiv 2606.15054)",
    ),
}
BASELINE, CONTROL = "run_0", "run_7"

# ┌────────────────────────────────────────────────────────────────────┐
# │ Metrics                                                            │
# └────────────────────────────────────────────────────────────────────┘

KS = (1, 2, 5, 10, 20, 50)
# Group -> name in final_info.json -> title, arrow (the better direction), definition.
GROUPS = {
    "stability": {
        "loss_roughness": ("roughness", "↓", "sd of log raw loss around its running median"),
        "mse_roughness": ("mse roughness", "↓", "sd of log raw mse around its running median"),
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
        "absorption_main_fires": ("main fires", "↑", "share of words whose letter's latent fires"),
        "absorption_absorbed": ("absorbed", "↓", "full absorption: it is silent, one carries it"),
        "absorption_absorbed_by_its_letter": (
            "by its letter",
            "",
            "of these, by a latent of the letter itself: the sparse probe chose another",
        ),
        "absorption_lost": ("lost", "↓", "share: it is silent, and no latent carries it"),
        "absorption_gap": ("gap", "↓", "of a parent's latent, known world: alone less with child"),
        "parent_fires_alone": ("fires alone", "↑", "known world: it fires, its child being off"),
        "parent_cosine": ("parent's cosine", "↑", "known world: of that latent and its feature"),
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
        "l0_on_words": ("L0 on words", "", "the words that absorption is scored on"),
        "fvu_on_words": ("FVU on words", "↓", "on those words"),
        "l0_on_texts": ("L0 on texts", "", "the texts that are probed"),
        "fvu_on_texts": ("FVU on texts", "↓", "on those texts"),
        "mcc": ("MCC", "↑", "known world: mean |cosine| of matched latents and features"),
        "f1": ("F1", "↑", "known world: of latents as detectors of their features"),
        "dead": ("dead", "↓", "share of latents that never fire on held-out text"),
        "ce_recovered": ("CE recovered", "↑", "cross-entropy, 1: as the original, 0: as zeros"),
    },
}
METRICS = {name: about for metrics in GROUPS.values() for name, about in metrics.items()}


def heading(metric: str) -> str:
    return titled(METRICS[metric])


WORLDS = ("absorption_gap",)  # a world's features are known, and it has no words and no texts


def known(arms: list[Arm], metrics: Iterable[str]) -> list[str]:
    """Those that any run has."""
    return [m for m in metrics if any(math.isfinite(arm.value(m)[0]) for arm in arms)]


# ┌────────────────────────────────────────────────────────────────────┐
# │ Figures: the name of each is its file's, the docstring its caption │
# └────────────────────────────────────────────────────────────────────┘

# Score -> what it is drawn against, over all target L0s; each is read off at equal L0 and FVU.
CURVES = {
    "absorption_absorbed": ("l0", "fvu"),
    "absorption_gap": ("l0", "fvu"),
    "absorption_lost": ("l0",),
    "absorption_fraction": ("l0",),
    "fvu": ("l0",),
    "parent_cosine": ("l0",),
    "mcc": ("l0",),
    "f1": ("l0",),
    "probing_top_1": ("l0",),
    "probing_top_1_sd_over_tasks": ("l0",),
}


def verdict(arms: list[Arm]):
    """What was declared to decide: each run less the control, paired by seed, with the 95% interval
    (± one standard error below six seeds).  Filled: Holm p below .05.  Grey: the sd over the
    control's own seeds."""
    return verdict_figure(arms, METRICS, CONTROL, BASELINE)


def frontier(arms: list[Arm]):
    """Every run over its target L0s: a line through the means, a dot a seed; last, FVU less the
    control's at equal L0.  L0 and FVU: on what is scored, if measured."""
    panels = [(measured_as(arms, x, y), y) for y in known(arms, CURVES) for x in CURVES[y]]
    if not panels:
        return None
    figure, (band, _) = stack("Frontier", arms, [1.55 * (len(panels) // 2 + 1)])
    *axes, last = in_twos(band, len(panels) + 1)
    for ax, (x, y) in zip(axes, panels, strict=True):
        over_targets(ax, arms, x, y)
        ax.set(title=heading(y), xlabel=METRICS[x][0])
    less_control(last, arms, CONTROL, "l0", "fvu")
    last.set(title=f"FVU less {CONTROL}'s", xlabel="L0")
    return figure


def training_curves(arms: list[Arm]):
    """Raw loss around its running median over 51 steps, and how steady its last 80% were."""
    figure, (top, bottom) = stack("Training", arms, [2.4, 0.55 + 0.16 * len(arms)], legend=False)
    ax = top.subplots()
    raw = {"linewidth": 0.4, "linestyle": "-", "alpha": 0.4, "marker": ""}
    curves(ax, arms, "loss", "raw loss, bold: its running median (log scale)", log=True, **raw)
    for i, arm in enumerate(arms):
        steps, loss, _ = arm.series("loss")
        median = [np.median(loss[abs(steps - step) <= 25]) for step in steps]
        ax.plot(steps, median, **arm.look, markevery=(0.015 * i, 0.15))
    axes = bottom.subplots(1, 3, sharey=True)
    for ax, metric in zip(axes, ("mse_roughness", "loss_spikes", "grad_norm_cv"), strict=True):
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
    """Absorption of the live weights in training: on the words SAE-Bench trains its probe on, or of
    a known world on rows of its own."""
    of_words = "absorption fraction ↓", "full absorption ↓"
    titles = ("gap ↓", "parent's latent silent, child off ↓") if known(arms, WORLDS) else of_words
    figure, (upper, lower, _) = stack("Online absorption", arms, [1.9, 1.9])
    curves(upper.subplots(), arms, "online_absorption_fraction", titles[0])
    curves(lower.subplots(), arms, "online_absorption_full", titles[1])
    return figure


def absorption_letters(arms: list[Arm]):
    """Full absorption by first letter, mean over seeds.  Hatched: the letter was not scored."""
    rates = [arm.entry["per_letter"].get("absorption_full", {}) for arm in arms]
    letters = sorted({letter for rate in rates for letter in rate})
    if not letters:
        return None
    figure, (band,) = stack("Absorption", arms, [0.95 + 0.17 * len(arms)], legend=False)
    left, right = band.subplots(1, 2, sharey=True, width_ratios=(2.5, 1))
    rows(right, arms, [arm.value("absorption_full") for arm in arms], "mean ↓")
    left.set_title("full absorption by letter ↓")
    left.grid(False)
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


def words(arms: list[Arm]):
    """What became of the words that absorption is scored on: the letter's own latent fires, or is
    silent while one other carries the letter (absorbed, ± one standard error) or none (lost)."""
    colours = {"absorbed": "#D55E00", "lost": "#56B4E9", "main_fires": "0.87"}
    parts = {f"absorption_{n}": (n.replace("_", " "), c) for n, c in colours.items()}
    if not known(arms, parts):
        return None
    figure, (band,) = stack("Words", arms, [0.6 + 0.19 * len(arms)], legend=False)
    shares(band.subplots(), arms, parts)
    return figure


def probing(arms: list[Arm]):
    """Sparse probing.  Bottom: a tick is a task; the error of the tasks' mean is over seeds; grey
    is the sd of the mean over the control's own seeds."""
    control = find(arms, CONTROL)
    others = [arm for arm in arms if control and arm is not control]
    tasks = sorted({task for arm in arms for task in arm.tasks()})
    if not tasks:
        return None
    heights = [2.1, 0.5 + 0.42 * len(tasks), 0.55 + 0.16 * max(2, len(others))]
    figure, (upper, middle, lower, _) = stack("Sparse probing", arms, heights)
    accuracy_by_k(upper.subplots(), arms)
    ax = middle.subplots()
    grouped(ax, arms, tasks, lambda arm, task: mean_and_error(arm.tasks().get(task, [])))
    ax.set_title("top-1 accuracy ↑ by task")
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
    figure.set_label(noise_bands(ax, control, "probing_top_1"))
    ax.axvline(0, color="black", lw=0.8)
    return figure


def accuracy_by_k(ax, arms: list[Arm]) -> None:
    asked = [k for k in KS if known(arms, [f"probing_top_{k}"])]
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


def tradeoff(arms: list[Arm]):
    """A run that absorbs less because it reconstructs worse lies further to the right."""
    if target_of(arms[0]):
        return None  # one point of each line of `frontier`
    asked = ("absorption_gap", "absorption_full", "absorption_fraction", "probing_top_1")
    metrics = known(arms, asked) or asked[1:]
    heights = [0.5 + 0.15 * max(8, len(arms))] * len(metrics)
    figure, bands = stack("Trade-off", arms, heights, legend=False)
    for band, metric in zip(bands, metrics, strict=True):
        ax = band.subplots()
        named_points(ax, arms, "fvu", metric)
        ax.set(title=heading(metric), xlabel=heading("fvu"))
    return figure


def readout(arms: list[Arm]):
    """SAEs read with another alpha (open) than they were trained to (filled)."""
    if not (scored := with_readouts(arms)):
        return None
    of_texts = "probing_top_1", "probing_top_5"
    metrics = ("absorption_gap", "fvu") if known(scored, WORLDS) else of_texts
    figure, (band,) = stack("Read-out check", scored, [0.55 + 0.17 * len(scored)], legend=False)
    axes = band.subplots(1, 2, sharey=True)
    for ax, metric in zip(axes, metrics, strict=True):
        rows(ax, scored, [arm.value(metric) for arm in scored], heading(metric), 3)
    return figure


FIGURES = (training_curves, schedules, online_absorption, absorption_letters, words)
FIGURES += (probing, tradeoff, readout)


# ┌────────────────────────────────────────────────────────────────────┐
# │ main                                                               │
# └────────────────────────────────────────────────────────────────────┘


def load(folder: Path) -> dict[str, list[Arm]]:
    """The runs of each "<scale> layer <L>" and target; those with a training log come first."""
    runs = chosen(found_runs(folder), labels)
    groups = arms_of(folder, runs, labels, looks([*labels, *runs], CONTROL))
    noise = read_optional(folder / MEASURED_NOISE, {})  # of the scores themselves, where known
    for arm in (arm for arms in groups.values() for arm in arms):
        arm.entry[MEASURED_NOISE] = noise
    return groups


def compare(folder: Path) -> None:
    groups = load(folder)
    if not groups:
        first = "run `python experiment.py --out_dir=run_1` first"
        sys.exit(f"error: no finished run found in {folder.resolve()}: {first}")
    shown = Shown((verdict,), (frontier,), FIGURES, GROUPS, tuple(CURVES), CONTROL, BASELINE)
    sections = sections_of(groups, shown)
    print(write(folder, sections, definitions(GROUPS)))
    n = len(figures_of(sections))
    print(f"wrote {n} figures (PNG and SVG), summary.md and report.html in {folder.resolve()}")


def main() -> None:
    lab.speak_plainly()
    parser = argparse.ArgumentParser(description="Compare the runs in a folder.")
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
