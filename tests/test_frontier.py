"""lab/frontier.py and what plot.py shows of it: curves over target L0s, and declared endpoints."""

import itertools
import json
import math
import re
from copy import deepcopy

import numpy as np
import pytest
from made_up_runs import (
    LAPTOP,
    draw,
    entry,
    records,
    table,
    target_entry,
    usual_entry,
    words,
    world_entry,
    write_run,
    write_study,
)
from test_comparison import plain_bca

import plot
from lab import drawing, frontier
from lab.frontier import at_middle, by_layer, by_run, endpoints, levels
from lab.metrics import WORDS
from lab.report import as_markdown
from lab.tables import level_tables
from lab.verdict import verdict_tables

LAYER = f"{LAPTOP}, every L0"
RUN_1, SEEDS = "run_1 blend 0.1→0.9 + EMA", 6
NAMES = "run_7", "run_0"
TARGETS = (4, 16, 64)


def at(l0: float, fvu: float, absorbed: list, rough: list, apart: float = 0.2) -> dict:
    """An entry whose seeds agree in L0 and FVU, and whose two tasks lie `apart`."""
    n = len(absorbed)
    found = usual_entry(seeds=n)
    values = found["final_info_dict"] | {
        **dict.fromkeys(("l0_on_words", "l0_on_texts", "l0"), [l0] * n),
        **dict.fromkeys(("fvu_on_words", "fvu_on_texts", "fvu"), [fvu] * n),
        "absorption_absorbed": absorbed,
        "mse_roughness": rough,
    }
    tasks = {"a": [0.6] * n, "b": [0.6 + apart] * n}
    return found | entry(**values) | {"per_task": {"probing_top_1": tasks}}


def control_info(n: int = SEEDS) -> dict:
    """L0 4, 16, 64 at FVU .64, .16, .04: absorbed .5, .3, .1 and roughness .02, for every seed."""
    points = zip(TARGETS, (0.64, 0.16, 0.04), (0.5, 0.3, 0.1), strict=True)
    return {f"{LAPTOP}, L0 {t}": at(t, fvu, [y] * n, [0.02] * n) for t, fvu, y in points}


def run_info(n: int = SEEDS) -> dict:
    """L0 8, 32, 128 at FVU .32, .08, .02.  Seed s: absorbed .4, .2 + .02 (s + 1), 0, so half way
    from 8 to 32, at L0 16, .3 + .01 (s + 1); its roughness is that of the control and, of the first
    target alone, .0015 (s + 1) more, of the first seed less."""
    more = [0.0015 * (s + 1) * (-1 if s == 0 else 1) for s in range(n)]
    middle = [0.2 + 0.02 * (s + 1) for s in range(n)]
    return {
        f"{LAPTOP}, L0 4": at(8, 0.32, [0.4] * n, [0.02 + x for x in more], 0.3),
        f"{LAPTOP}, L0 16": at(32, 0.08, middle, [0.02] * n, 0.3),
        f"{LAPTOP}, L0 64": at(128, 0.02, [0.0] * n, [0.02] * n, 0.3),
    }


def write(folder, **runs) -> None:
    for name, info in runs.items():
        log = records(8, seeds=3 * SEEDS)
        write_run(folder, name, info, log, n_seeds=SEEDS, target_l0s=list(TARGETS))


def layer(folder) -> list:
    return by_layer(plot.load(folder))[LAYER]


def tables_of(folder) -> str:
    """What is decided and read off, as summary.md has it."""
    arms = layer(folder)
    tables = verdict_tables(LAYER, arms, plot.METRICS, *NAMES)
    tables += level_tables(arms, plot.METRICS, tuple(plot.CURVES), *NAMES)
    return "\n\n".join(map(as_markdown, tables)) + "\n"


def decided(text: str, question: str, name: str = RUN_1, of: str = LAYER) -> dict:
    return table(text, f"Primary endpoint of {question} ({of})")[name]


def compared(folder) -> dict:
    runs = by_run(layer(folder))
    return endpoints(runs["run_1"], runs["run_7"])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two runs worked out by hand, drawn by the real script."""
    folder = tmp_path_factory.mktemp("study")
    write(folder, run_7=control_info(), run_1=run_info())
    found = draw(folder)
    assert (found.returncode, found.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def text(study) -> str:
    return (study / "summary.md").read_text("utf-8")


# ------------------------------------------------------------------------------------ by hand


def test_the_endpoints_are_those_worked_out_by_hand(text):
    """Absorbed at L0 16: half of .4 and .2 + .02 (s + 1), less .3: .01, .02, ... .06.  The mean is
    .035; two of 64 flips are as far from 0.  FVU falls fourfold where L0 grows fourfold, so at FVU
    .16 it is the same."""
    row = decided(text, "absorption: absorbed ↓")
    mean, rest = row["at L0 on words 16.0"].split(" [")
    interval, rest = rest.split("], ")
    assert (mean, rest) == ("+0.0350", "p 0.031, n 6")
    expected = plain_bca([0.01 * (s + 1) for s in range(SEEDS)])
    assert [float(x) for x in interval.split(", ")] == pytest.approx(expected, abs=6e-4)
    assert row["at FVU on words 0.1600"] == row["at L0 on words 16.0"]
    # Roughness: a third of .0015 times -1, 2, 3, 4, 5, 6, so .0015833; of the sums of its flips
    # four are as far from 0 (none, or only the smallest, and their opposites).
    stability = decided(text, "stability: mse roughness ↓")
    assert stability["mean over targets"].startswith("+0.00158 [")
    assert stability["mean over targets"].endswith("p 0.062, n 6")
    # Tasks .3 apart have an sd of .3 / sqrt 2, at every L0; the control's .2 / sqrt 2.
    probing = decided(text, "probing: sd over tasks ↓")
    assert probing["at L0 on texts 16.0"] == "+0.0707 [+0.0707, +0.0707], p 0.031, n 6"
    # Holm of 4/64, 2/64, 2/64: a smallest three times, the next no less, nor the last.
    assert [found["Holm p"] for found in (stability, row, probing)] == ["0.094"] * 3


def test_curves_are_read_off_by_hand_at_the_places_that_the_control_gives(text):
    """Its range, 4 to 64, is four doublings: a quarter of the way is 8, three quarters are 32.
    There the run has points of its own, and the control's are half way."""
    rows = table(text, "absorbed ↓, read off")
    row, own = rows[RUN_1], rows["run_7's own"]
    quarter, middle, last = (
        f"L0 on words {x} ({name})"
        for x, name in zip(("8.0000", "16.0", "32.0"), frontier.LEVELS, strict=True)
    )
    assert list(row)[1:4] == [quarter, middle, last]
    assert [own[x] for x in (quarter, middle, last)] == [
        "0.4000 ± 0.0000",
        "0.3000 ± 0.0000",
        "0.2000 ± 0.0000",
    ]
    assert row[quarter].strip("()") == "+0.0000 [+0.0000, +0.0000], p 1, n 6"
    assert row[middle].startswith("+0.0350 [")
    assert row[last].startswith("+0.0700 [")  # .02, .04, ... .12
    fvu = [name for name in row if name.startswith("FVU on words")]
    assert [name.split(" ")[3] for name in fvu] == ["0.0800", "0.1600", "0.3200"]
    assert not any(name.startswith("FVU") for name in table(text, "FVU ↓, read off")[RUN_1])


def test_the_endpoints_stand_first_and_all_else_is_called_descriptive(text):
    first, *rest = text.split("\n## ")
    assert f"### Which run is better at what: {LAYER}\n" in first
    assert "### Primary endpoint of stability" in first
    assert "descriptive" in first
    assert not any("Primary endpoint" in part for part in rest)
    for part in text.split("\n### ")[1:]:
        if (
            part.startswith(("Differences to run_7: ", "Read off against"))
            and "by task" not in part
        ):
            assert "\n\nDescriptive" in part, part[:60]


def test_a_run_is_called_better_or_worse_only_where_the_declared_test_says_so(text, tmp_path):
    """Six seeds reach a Holm p of .094.  Eight reach 3 x 2 / 256 = .023 where all have one sign:
    the control absorbs less, and its tasks lie closer; of its roughness one seed is the other way
    round, and of 256 flips four are as far from 0 (p .016, which counts no less than the first)."""
    row = table(text, f"Which run is better at what: {LAYER}")[RUN_1]
    assert set(list(row.values())[1:]) == {"cannot tell (Holm p 0.094)"}
    for word, ours, theirs in (
        ("worse", run_info, control_info),
        ("better", control_info, run_info),
    ):
        folder = tmp_path / word
        write(folder, run_7=theirs(8), run_1=ours(8))
        row = table(tables_of(folder), f"Which run is better at what: {LAYER}")[RUN_1]
        assert set(list(row.values())[1:]) == {f"{word} (Holm p 0.023)"}


def test_the_figure_of_the_verdict_shows_what_the_tables_say(tmp_path):
    write(tmp_path, run_7=control_info(8), run_1=run_info(8))
    figure = plot.verdict(layer(tmp_path))
    axes = figure.subfigs[0].axes
    assert [ax.get_title().split("\n")[1] for ax in axes] == [
        "mean over targets",
        "at L0 on words 16.0",
        "at FVU on words 0.1600",
        "at L0 on texts 16.0",
    ]
    (bar,) = axes[1].containers
    assert bar.lines[0].get_xydata().tolist() == [[pytest.approx(0.045), 0]]
    assert bar.lines[0].get_markerfacecolor() != "white", "sure"
    low, high = bar.lines[2][0].get_segments()[0][:, 0]
    expected = plain_bca([0.01 * (s + 1) for s in range(8)])
    assert [low, high] == pytest.approx(expected, abs=2e-3)
    write(tmp_path / "few", run_7=control_info(), run_1=run_info())
    for ax in plot.verdict(layer(tmp_path / "few")).subfigs[0].axes:
        assert ax.containers[0].lines[0].get_markerfacecolor() == "white", "six seeds are not sure"


def test_runs_with_fewer_seeds_are_paired_by_those_that_both_have_and_comparable(tmp_path):
    write(tmp_path, run_7=control_info())
    write_run(tmp_path, "run_1", run_info(3), n_seeds=3, target_l0s=list(TARGETS))
    text = tables_of(tmp_path)
    assert "NOT COMPARABLE" not in text
    assert decided(text, "absorption: absorbed ↓")["at L0 on words 16.0"].endswith("n 3")


def test_a_layer_has_its_curves_then_its_middle_target_in_full_then_what_came_out_of_the_others(
    study, text
):
    headings = [part.split("\n")[0] for part in text.split("\n## ")[1:]]
    assert headings == [LAYER, *(f"{LAPTOP}, L0 {t}" for t in (16, 4, 64))]
    sections = dict(zip(headings, text.split("\n## ")[1:], strict=True))
    assert "Differences to run_7: fidelity" in sections[f"{LAPTOP}, L0 16"]
    for t in (4, 64):
        assert "### Results: fidelity" in sections[f"{LAPTOP}, L0 {t}"]
        assert "Differences" not in sections[f"{LAPTOP}, L0 {t}"]
    drawn = {path.stem for path in study.glob("*.svg")}
    assert drawn == {"frontier", "training_curves", "schedules", "online_absorption"} | {
        "absorption_letters",
        "words",
        "probing",
        "verdict",
    }
    page = (study / "report.html").read_text("utf-8")
    assert page.index('id="verdict"') < page.index("Primary endpoint") < page.index("<h2>")
    assert page.index("<details>") < page.index("<h2>"), "details fold"
    captions = {
        part.split('"')[0]: part.split("<figcaption>")[1].split("<")[0]
        for part in page.split('<figure id="')[1:]
    }
    said = "At the middle one of 3 target L0s."
    assert {name for name, caption in captions.items() if said in caption} == drawn - {
        "frontier",
        "verdict",
    }
    assert f"{LAPTOP}, L0 16" in words(study / "probing.svg")
    assert page.count("Configuration of run_1") == 1


# ------------------------------------------------------------------------- what cannot be compared


def test_nothing_is_read_off_where_a_curve_does_not_reach(tmp_path):
    far = run_info()
    for i, of in enumerate(far.values()):
        of["final_info_dict"]["fvu_on_words"] = [0.9 + 0.01 * i] * SEEDS
    write(tmp_path, run_7=control_info(), run_1=far)
    said = tables_of(tmp_path)
    row = decided(said, "absorption: absorbed ↓")
    assert row["at L0 on words 16.0"].startswith("+0.0350")
    assert row["at FVU on words 0.1600"] == row["Holm p"] == "–"
    # What is missing counts as p = 1: the other two are still two of three.
    assert decided(said, "probing: sd over tasks ↓")["Holm p"] == "0.094"
    assert decided(said, "stability: mse roughness ↓")["Holm p"] == "0.12"
    cells = table(said, "absorbed ↓, read off")[RUN_1]
    assert all(cell == "–" for name, cell in cells.items() if name.startswith("FVU"))


def test_one_seed_that_does_not_reach_is_enough_for_a_dash(tmp_path):
    run = run_info()
    for of in run.values():  # its L0: 20, 80, 320 in the place of 8, 32, 128
        of["final_info_dict"]["l0_on_words"][2] *= 2.5
    write(tmp_path, run_7=control_info(), run_1=run)
    assert math.isnan(compared(tmp_path)["absorption"].readings[0].found.mean)
    assert compared(tmp_path)["probing"].p == pytest.approx(2 / 64)


def test_two_readings_of_absorption_that_differ_in_sign_hold_nothing(tmp_path):
    """At equal L0 above the control, at equal FVU below it, both with p = 2/64."""
    run = run_info()
    for of, fvu in zip(run.values(), (1.28, 0.32, 0.08), strict=True):
        of["final_info_dict"]["fvu_on_words"] = [fvu] * SEEDS
    write(tmp_path, run_7=control_info(), run_1=run)
    found = compared(tmp_path)["absorption"]
    l0, fvu = (reading.found for reading in found.readings)
    assert (l0.mean, l0.p) == (pytest.approx(0.035), 2 / 64)
    assert (fvu.mean < 0, fvu.p) == (True, 2 / 64)
    assert (found.p, found.holm) == (1.0, 1.0)


def test_of_two_readings_the_larger_p_counts(tmp_path):
    """The first seed reconstructs worse: at FVU .16 it is where its L0 is 32, at .22.  The seeds
    then differ by -.08, .02, .03, .04, .05, .06: .12 in all."""
    run = run_info()
    for of in run.values():
        of["final_info_dict"]["fvu_on_words"][0] *= 2
    write(tmp_path, run_7=control_info(), run_1=run)
    flips = itertools.product((-1, 1), repeat=SEEDS)
    sums = [sum(np.multiply(signs, (8, 2, 3, 4, 5, 6))) for signs in flips]
    larger = np.mean(np.abs(sums) >= 12)
    found = compared(tmp_path)["absorption"]
    assert [reading.found.p for reading in found.readings] == [2 / 64, larger]
    assert found.p == larger > 2 / 64


def test_seeds_that_only_one_run_has_are_left_out(tmp_path):
    write(tmp_path, run_7=control_info(), run_1=run_info(4))
    for endpoint in compared(tmp_path).values():
        assert [reading.found.n for reading in endpoint.readings] in ([4], [4, 4])
    reading = compared(tmp_path)["absorption"].readings[0].found
    assert (reading.mean, reading.p) == (pytest.approx(0.025), 2 / 16)


def test_curves_go_over_the_targets_that_both_runs_have_and_say_how_many(tmp_path):
    """Without its second target the run's line goes from 8 to 128, and so the control's from 4 to
    64: at 16 a quarter and a half of the way."""
    run = run_info()
    del run[f"{LAPTOP}, L0 16"]
    write(tmp_path, run_7=control_info(), run_1=run)
    reading = compared(tmp_path)["absorption"].readings[0].found
    assert reading.mean == pytest.approx((0.4 - 0.25 * 0.4) - (0.5 - 0.5 * 0.4))
    said = tables_of(tmp_path)
    assert "run_1: over 2 of 3 targets." in said
    assert draw(tmp_path).returncode == 0
    assert RUN_1 in table((tmp_path / "summary.md").read_text("utf-8"), "absorbed ↓, read off")
    assert "blend 0.1→0.9 + EMA" in words(tmp_path / "frontier.svg")
    assert "blend 0.1→0.9 + EMA" not in words(tmp_path / "words.svg")


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_target_with_a_missing_value_is_left_out_and_is_no_zero(tmp_path, missing):
    run, without = run_info(), run_info()
    run[f"{LAPTOP}, L0 16"]["final_info_dict"]["absorption_absorbed"][3] = missing
    del without[f"{LAPTOP}, L0 16"]
    write(tmp_path / "a", run_7=control_info(), run_1=run)
    write(tmp_path / "b", run_7=control_info(), run_1=without)
    found, expected = compared(tmp_path / "a"), compared(tmp_path / "b")
    assert found["absorption"].readings == expected["absorption"].readings
    assert found["probing"].p == pytest.approx(2 / 64)
    assert "run_1: over 2 of 3 targets." in tables_of(tmp_path / "a")
    (line, _) = [
        line for line in frontier_axes(tmp_path / "a")[0].lines if len(line.get_xdata()) == 3
    ]
    assert np.isnan(line.get_ydata()).tolist() == [False, True, False]


def test_a_metric_that_one_target_does_not_have_at_all_leaves_that_target_out(tmp_path):
    run, other = run_info(), control_info()
    del run[f"{LAPTOP}, L0 16"]["final_info_dict"]["mse_roughness"]
    del other[f"{LAPTOP}, L0 4"]["final_info_dict"]["l0"]
    write(tmp_path, run_7=control_info(), run_1=run, run_3=other)
    found = compared(tmp_path)["stability"].readings[0].found
    assert found.mean == pytest.approx(0.0015 * 19 / 6 / 2)  # of two targets, not of three
    assert "run_3: over 2 of 3 targets." in tables_of(tmp_path).split("### FVU ↓, read off")[1]


def test_scores_that_no_run_has_are_no_panel_and_no_figure(tmp_path):
    bare = {f"{LAPTOP}, L0 {t}": entry(grad_norm_cv=[0.2, 0.3]) for t in TARGETS}
    write(tmp_path, run_7=bare, run_1=bare)
    assert plot.frontier(layer(tmp_path)) is None
    found = draw(tmp_path)
    assert (found.returncode, found.stderr) == (0, "")


def test_with_one_target_runs_are_compared_there_and_it_says_so(tmp_path):
    for name, info in (("run_7", control_info()), ("run_1", run_info())):
        write_run(tmp_path, name, {LAPTOP: info[f"{LAPTOP}, L0 16"]}, records(8))
    assert draw(tmp_path).returncode == 0
    said = (tmp_path / "summary.md").read_text("utf-8")
    assert "at the target, not at equal fidelity" in said.split("\n## ")[0]
    row = decided(said, "absorption: absorbed ↓", of=LAPTOP)
    assert list(row) == ["", "at the target", "Holm p"]
    # .22, .24, ... .32 less .3: the mean is -.03.
    assert row["at the target"].startswith("-0.0300 [")
    assert "read off" not in said
    assert not (tmp_path / "frontier.svg").exists()
    assert {"words.svg", "tradeoff.svg"} <= {path.name for path in tmp_path.iterdir()}


def test_runs_with_one_target_and_with_several_share_nothing(tmp_path):
    write(tmp_path, run_7=control_info())
    write_run(tmp_path, "run_1", {LAPTOP: usual_entry()}, records(8))
    assert draw(tmp_path).returncode == 0
    layers = by_layer(plot.load(tmp_path))
    assert {key: {arm.name for arm in arms} for key, arms in layers.items()} == {
        LAPTOP: {"run_1"},
        LAYER: {"run_7"},
    }


def test_without_the_control_nothing_is_decided_and_it_says_so(tmp_path):
    write(tmp_path, run_1=run_info(), run_3=run_info())
    said = tables_of(tmp_path)
    assert "Primary" not in said
    assert "None: run_7 is missing." in said


def test_runs_that_are_older_than_the_endpoints_are_drawn_without_them(tmp_path):
    for name, level in (("run_7", 0.0), ("run_8", 0.02)):
        old = usual_entry(level)
        for metric in (*WORDS, "l0_on_texts", "fvu_on_texts"):
            for part in ("means", "stderrs", "final_info_dict"):
                old[part].pop(metric, None)
        write_run(tmp_path, name, {LAPTOP: old}, records(8))
    found = draw(tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    said = (tmp_path / "summary.md").read_text("utf-8")
    absorption, stability = (
        decided(said, question, "run_8 cosine only", LAPTOP)
        for question in ("absorption: absorbed ↓", "stability: mse roughness ↓")
    )
    assert absorption["at the target"] == absorption["Holm p"] == "–"
    assert stability["at the target"] == "+0.0200 ± 0.0000, p 0.25, n 3"
    assert not (tmp_path / "words.svg").exists()


# ------------------------------------------------------------------------------------- the rules


def test_where_curves_are_read_off_is_decided_by_the_controls_x_alone(tmp_path):
    changed = deepcopy(control_info())
    for of in changed.values():
        of["final_info_dict"]["absorption_absorbed"] = [0.9] * SEEDS
    write(tmp_path / "a", run_7=control_info(), run_1=run_info())
    write(tmp_path / "b", run_7=changed, run_1=control_info())
    a, b = (by_run(layer(tmp_path / name))["run_7"] for name in "ab")
    assert levels(a, "l0_on_words") == levels(b, "l0_on_words")
    assert levels(a, "l0_on_words") == pytest.approx(
        dict(zip(frontier.LEVELS, (8, 16, 32), strict=True))
    )


def test_of_an_even_number_of_targets_the_place_is_between_the_middle_two(tmp_path):
    info = control_info()
    del info[f"{LAPTOP}, L0 4"]
    write(tmp_path, run_7=info, run_1=run_info())
    control = by_run(layer(tmp_path))["run_7"]
    assert levels(control, "l0")["middle"] == pytest.approx(32)  # sqrt(16 * 64)
    assert {arm.key for arm in at_middle(layer(tmp_path), "run_7")} == {f"{LAPTOP}, L0 16"}


def test_the_quarters_are_of_what_every_seed_of_the_control_reaches(tmp_path):
    info = control_info()
    info[f"{LAPTOP}, L0 4"]["final_info_dict"]["l0_on_words"][0] = 8.0
    info[f"{LAPTOP}, L0 64"]["final_info_dict"]["l0_on_words"][1] = 32.0
    write(tmp_path, run_7=info, run_1=run_info())
    found = levels(by_run(layer(tmp_path))["run_7"], "l0_on_words")
    assert found["a quarter"] == pytest.approx(8 * 2**0.5)
    assert found["three quarters"] == pytest.approx(8 * 2**1.5)
    assert found["middle"] == pytest.approx(16)


def test_differences_read_off_are_grey_within_the_controls_own_noise_there(tmp_path):
    """Its seeds at L0 16 are .1 apart: an sd of .187 over six, far more than .035."""
    info = control_info()
    info[f"{LAPTOP}, L0 16"]["final_info_dict"]["absorption_absorbed"] = [
        0.3 + 0.1 * (s - 2.5) for s in range(SEEDS)
    ]
    write(tmp_path, run_7=info, run_1=run_info())
    rows = table(tables_of(tmp_path), "absorbed ↓, read off")
    assert rows[RUN_1]["L0 on words 16.0 (middle)"].startswith("(+0.0350 [")
    assert rows["run_7's own"]["L0 on words 16.0 (middle)"] == "0.3000 ± 0.0764"


def test_absorption_and_probing_are_read_off_at_the_l0_of_what_they_are_scored_on(tmp_path):
    info = {name: deepcopy(of) for name, of in control_info().items()}
    for of in info.values():
        of["final_info_dict"]["l0_on_texts"] = [3 * x for x in of["final_info_dict"]["l0"]]
        del of["final_info_dict"]["fvu_on_words"]  # of an older run
    write(tmp_path, run_7=info)
    arms = layer(tmp_path)
    for metric, quantity, name in (
        ("absorption_absorbed", "l0", "l0_on_words"),
        ("absorption_absorbed", "fvu", "fvu"),
        ("probing_top_1", "l0", "l0_on_texts"),
        ("mcc", "l0", "l0"),
    ):
        assert frontier.measured_as(arms, quantity, metric) == name
    assert frontier_axes(tmp_path)[0].get_xlabel() == "L0 on words"


def test_the_sd_over_tasks_comes_from_the_tasks_of_each_seed(tmp_path):
    info = control_info()
    first = info[f"{LAPTOP}, L0 4"]
    first["per_task"]["probing_top_1"] = {"a": [0.5, 0.6], "b": [0.7, 0.6], "c": [0.9, None]}
    write(tmp_path, run_7=info)
    found = frontier.of_seeds(layer(tmp_path)[0], "probing_top_1_sd_over_tasks")
    assert found[0] == pytest.approx(0.2)
    assert math.isnan(found[1])


def test_in_a_world_two_questions_are_asked_and_absorption_is_the_gap(tmp_path):
    targets = (5.95, 7.22, 8.5, 10.6, 12.75)
    write_study(tmp_path, ("run_7", "run_8"), targets, 10, (0, 1), make=world_entry)
    path = tmp_path / "run_7" / "final_info.json"
    info = json.loads(path.read_text("utf-8"))
    info |= {f"{key}, read out with alpha = 0": info[key] for key in list(info)}
    path.write_text(json.dumps(info), "utf-8")
    found = draw(tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    said = (tmp_path / "summary.md").read_text("utf-8")
    asked = re.findall(r"### Primary endpoint of (.*)", said)
    of = [f"(synthetic layer {i}, every L0)" for i in (0, 1)]
    assert asked == [
        f"{q} {i}" for i in of for q in ("stability: mse roughness ↓", "absorption: gap ↓")
    ]
    assert "among the 2 questions" in said
    row = decided(said, "absorption: gap ↓", "run_8 cosine only", "synthetic layer 1, every L0")
    l0s, fvus = (world_entry("run_7", 8.5)["final_info_dict"][name] for name in ("l0", "fvu"))
    assert list(row)[1:3] == [f"at L0 {np.mean(l0s):.4f}", f"at FVU {np.mean(fvus):.4f}"]
    for i in (0, 1):
        shown = words(tmp_path / f"frontier_synthetic_layer_{i}_every_L0.svg")
        assert all(title in shown for title in ("gap ↓", "FVU ↓", "MCC ↑", "F1 ↑"))
        online = words(tmp_path / f"online_absorption_synthetic_layer_{i}_every_L0.svg")
        assert "gap ↓" in online
        assert "absorption fraction" not in online
        read = words(tmp_path / f"readout_synthetic_layer_{i}_every_L0.svg")
        assert all(title in read for title in ("read as α = 0", "gap ↓", "FVU ↓"))
        assert "no value" not in read
        assert not (tmp_path / f"probing_synthetic_layer_{i}_every_L0.svg").exists()


# ------------------------------------------------------------------------------------ the figures


def frontier_axes(folder):
    return plot.frontier(layer(folder)).subfigs[0].axes


def test_the_last_panel_is_fvu_less_the_controls_at_equal_l0(tmp_path):
    """At L0 8, 16 and 32 the control has .4, .16 and .1, the run .32, .2 and .08."""
    write(tmp_path, run_7=control_info(), run_1=run_info())
    ax = frontier_axes(tmp_path)[-1]
    assert (ax.get_title(), ax.get_xlabel()) == ("FVU less run_7's", "L0")
    ((line, _, _),) = ax.containers
    assert line.get_xdata() == pytest.approx([8, 16, 32])
    assert line.get_ydata() == pytest.approx([-0.08, 0.04, -0.02])
    write(tmp_path / "alone", run_7=control_info())
    assert [t.get_text() for t in frontier_axes(tmp_path / "alone")[-1].texts] == [
        "no other run than run_7"
    ]
    write(tmp_path / "without", run_1=run_info())
    (text,) = frontier_axes(tmp_path / "without")[-1].texts
    assert text.get_text() == "run_7 is missing"


def test_a_line_goes_through_the_means_and_every_seed_is_a_dot(tmp_path):
    targets = (18, 36, 72)
    write_study(tmp_path, ("run_1", "run_7"), targets, seeds=4)
    ax = frontier_axes(tmp_path)[0]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_xscale()) == (
        "absorbed ↓",
        "L0 on words",
        "log",
    )
    lines = [
        line for line in ax.lines if line.get_linestyle() != "None" and len(line.get_xdata()) == 3
    ]
    made = [target_entry("run_1", t, 4)["final_info_dict"] for t in targets]
    names = "l0_on_words", "absorption_absorbed"
    expected = [[np.mean(of[name]) for name in names] for of in made]
    assert lines[0].get_xydata() == pytest.approx(np.array(expected))
    dots = [line for line in ax.lines if len(line.get_xdata()) == 4]
    assert len(dots) == 2 * len(targets)
    assert dots[0].get_xydata() == pytest.approx(np.array([made[0][name] for name in names]).T)


def test_the_words_of_a_run_are_a_bar_of_three_shares_and_the_first_has_its_error(tmp_path):
    for name, seeds in (("run_7", 4), ("run_1", 4)):
        write_run(tmp_path, name, {LAPTOP: target_entry(name, 36, seeds)}, records(8))
    write_run(tmp_path, "run_3", {LAPTOP: usual_entry()}, records(8))
    arms = plot.load(tmp_path)[LAPTOP]
    (ax,) = plot.words(arms).subfigs[0].axes
    bars = [bar for bar in ax.containers if hasattr(bar, "patches")]
    assert [bar.get_label() for bar in bars] == ["absorbed", "lost", "main fires"]
    i = [arm.name for arm in arms].index("run_7")
    widths = [bar.patches[i].get_width() for bar in bars]
    made = target_entry("run_7", 36, 4)["final_info_dict"]
    shares = [np.mean(made[f"absorption_{n}"]) for n in ("absorbed", "lost", "main_fires")]
    assert widths == pytest.approx(shares)
    assert sum(widths) == pytest.approx(1)
    assert [bar.patches[i].get_x() for bar in bars] == pytest.approx(
        [0, shares[0], sum(shares[:2])]
    )
    (error,) = [bar for bar in ax.containers if not hasattr(bar, "patches")]
    low, high = error.lines[2][0].get_segments()[i][:, 0]
    sd = np.std(made["absorption_absorbed"], ddof=1)
    assert (low, high) == pytest.approx((shares[0] - sd / 2, shares[0] + sd / 2))
    assert "no value" in {text.get_text() for text in ax.texts}


NOISE = {"sd_of_one_sae_one_task": 0.02, "sd_of_difference_of_means": 0.005}


def probing_captions(folder) -> list:
    found = drawing.draw((plot.probing,), plot.load(folder)[LAPTOP], "")
    return [figure.caption for figure in found]


def test_measured_noise_is_a_band_that_the_caption_names(tmp_path):
    for name in ("run_7", "run_1"):
        write_run(tmp_path, name, {LAPTOP: usual_entry(seeds=4)}, records(8))
    (before,) = probing_captions(tmp_path)
    assert "Hatched" not in before
    (tmp_path / "measure_noise.json").write_text(json.dumps({"probing_top_1": NOISE}))
    figure = plot.probing(plot.load(tmp_path)[LAPTOP])
    (ax,) = figure.subfigs[2].axes
    own, measured = (p.get_bbox() for p in ax.patches)
    assert (measured.x0, measured.x1) == pytest.approx((-0.0098, 0.0098))  # 1.96 * .005
    assert own.x1 == pytest.approx(np.std([0, 0.01, 0.02, 0.03], ddof=1))
    (after,) = probing_captions(tmp_path)
    named = "1.96 standard errors of the score itself (measure_noise.json)."
    assert after == f"{before}  Hatched: ± 0.0098, {named}"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"probing_top_1": 3}',
        '{"probing_top_1": {"sd_of_difference_of_means": null}}',
    ],
)
def test_what_is_no_measured_noise_changes_nothing(tmp_path, content):
    for name in ("run_7", "run_1"):
        write_run(tmp_path, name, {LAPTOP: usual_entry()}, records(8))
    before = probing_captions(tmp_path)
    (tmp_path / "measure_noise.json").write_text(content)
    assert probing_captions(tmp_path) == before
