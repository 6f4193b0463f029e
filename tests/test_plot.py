"""plot.py: which runs are plotted, under which names, and what every figure shows of them."""

import json
import math
import re
import subprocess
import sys

from made_up_runs import (
    GEMMA,
    LAPTOP,
    PYTHIA,
    ROOT,
    SCRIPT,
    UNKNOWN,
    draw,
    records,
    table,
    usual_entry,
    words,
    write_run,
)

import experiment
import plot
from lab import drawing
from lab.runs import find

FIGURES = (
    "training_curves",
    "schedules",
    "online_absorption",
    "absorption_letters",
    "probing",
    "tradeoff",
    "readout",
)
VERDICT = "verdict"  # where there is a control and another run


def test_the_script_stays_as_small_as_an_agent_can_carry_at_every_turn():
    text = SCRIPT.read_bytes()
    assert len(text.splitlines()) <= 450
    assert len(text) <= 20_000


def test_every_label_is_written_for_the_row_that_has_its_name():
    titles = {name: label[1] for name, label in plot.labels.items() if name != "run_0"}
    assert titles == {name: run.title for name, run in experiment.RUNS.items()}


def test_the_runs_that_labels_names_are_plotted_and_the_others_said_to_be_left_out(tmp_path):
    for name in ("run_1", "run_7", "run_mine", "run_2_old"):
        write_run(tmp_path, name, {LAPTOP: usual_entry()}, records(8))
    found = draw(tmp_path)
    said = found.stdout.splitlines()
    assert "left out, since labels does not name them: run_2_old, run_mine" in said
    rest = "\n".join(line for line in said if not line.startswith("left out"))
    seen = [rest, *map(words, tmp_path.glob("*.svg"))]
    seen += [path.read_text(encoding="utf-8") for path in tmp_path.glob("*.[mh]*")]
    assert len(seen) == 1 + (len(FIGURES) - 1 + 1) + 2  # no read-outs, a verdict
    assert not any(name in text for text in seen for name in ("run_mine", "run_2_old"))
    assert all("control: vanilla ReLU" in text for text in seen if "Verdict" not in text)


def test_where_labels_names_none_of_the_runs_all_are_plotted_and_it_says_so(tmp_path):
    for name in ("run_mine_10", "run_mine_2"):
        write_run(tmp_path, name, {LAPTOP: usual_entry()}, records(8))
    found = draw(tmp_path)
    all_of_them = "labels names none of the runs found, so all are plotted: run_mine_2, run_mine_10"
    assert all_of_them in found.stdout.splitlines()
    assert "left out" not in found.stdout
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert list(table(summary, "Runs")) == ["run_mine_2", "run_mine_10"]
    assert "run_mine_10" in words(tmp_path / "tradeoff.svg")


def test_a_figure_without_a_docstring_has_no_caption(alone):
    def mine(arms):
        return plot.probing(arms)

    (figure,) = drawing.draw((mine,), plot.load(alone)[LAPTOP], "")
    assert (figure.name, figure.caption) == ("mine", "")


def test_runs_are_in_natural_order_and_added_labels_are_shown(summary):
    names = list(table(summary, "Runs"))
    assert [name.split()[0] for name in names] == [
        "run_1",
        "run_2",
        "run_6",
        "run_7",
        "run_10",
        UNKNOWN,
    ]
    assert names[-1] == UNKNOWN
    assert UNKNOWN in table(summary, "Differences to run_7: fidelity")


def test_unfinished_and_half_written_runs_are_named_and_passed_over(comparison, summary):
    stdout = (comparison / "stdout").read_text()
    assert "run_4: skipped" in stdout
    assert "run_5: skipped, not finished" in stdout
    assert "run_4" not in summary
    assert "run_5" not in summary
    assert (comparison / "stderr").read_text() == ""


def test_no_runs_is_an_error_said_last(tmp_path):
    (tmp_path / "run_1").mkdir()
    found = draw(tmp_path)
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("error: no finished run found in")
    assert "python experiment.py --out_dir=run_1" in last
    assert [path.name for path in tmp_path.iterdir()] == ["run_1"]


def test_an_unknown_folder_is_an_error_said_last(tmp_path):
    found = draw(tmp_path / "nowhere")
    assert found.returncode == 1
    assert "nowhere is not a folder" in found.stderr.strip().splitlines()[-1]


def test_two_scales_never_share_a_figure_or_a_table(comparison, summary):
    laptop, pythia = (
        words(comparison / "probing_laptop_layer_8.svg"),
        words(comparison / "probing_pythia-70m_layer_3.svg"),
    )
    assert "cosine annealing" not in laptop + pythia
    assert "α fixed at 0.5" in pythia
    assert "α fixed at 0.5" not in laptop
    assert "control: vanilla ReLU" in laptop
    assert "control: vanilla ReLU" not in pythia
    for svg in comparison.glob("*.svg"):
        key = LAPTOP if "laptop" in svg.name else PYTHIA
        titles = [k for k in (LAPTOP, PYTHIA, GEMMA) if k in words(svg)]
        assert titles == [key], svg.name
    sections = dict(re.findall(r"\n## (.*?)\n(.*?)(?=\n## |\Z)", summary, re.S))
    assert "run_3" not in sections[LAPTOP]
    assert "run_1 " not in sections[PYTHIA]
    assert "as it was given" in sections[GEMMA]


def test_each_scale_with_a_log_has_every_figure_as_png_and_svg(comparison):
    expected = {f"{name}_laptop_layer_8" for name in (*FIGURES, VERDICT)}
    expected |= {f"{name}_pythia-70m_layer_3" for name in FIGURES if name != "readout"}
    assert {path.stem for path in comparison.glob("*.svg")} == expected
    assert {path.stem for path in comparison.glob("*.png")} == expected
    assert not list(comparison.glob(".*"))


def test_a_run_without_a_log_is_in_every_figure_but_the_curves(comparison):
    for name in ("absorption_letters", "tradeoff", "probing"):
        assert "exponential approach" in words(comparison / f"{name}_laptop_layer_8.svg")


def test_a_null_metric_is_a_gap_in_the_figures(comparison):
    arms = plot.load(comparison)[LAPTOP]
    missing = [arm.name for arm in arms].index("run_2")
    figure = plot.absorption_letters(arms)
    letters, means = figure.subfigs[0].axes[:2]
    cells = letters.collections[0].get_array()
    assert cells.mask[missing].all()
    assert cells.mask.sum() == cells.shape[1]  # and no other row is
    drawn = [bar.lines[0].get_xydata()[0] for bar in means.containers]
    heights = [y for x, y in drawn if math.isfinite(x)]
    assert missing not in heights
    assert len(heights) == len(arms) - 1


def test_a_letter_scored_in_one_run_only_is_a_gap_in_the_others(tmp_path):
    run = usual_entry()
    run["per_letter"]["absorption_full"]["z"] = [0.0, 0.0, 0.0]
    write_run(tmp_path, "run_1", {LAPTOP: run})
    write_run(tmp_path, "run_7", {LAPTOP: usual_entry()})
    figure = plot.absorption_letters(plot.load(tmp_path)[LAPTOP])
    cells = figure.subfigs[0].axes[0].collections[0].get_array()
    assert cells.mask.tolist() == [[False] * 4, [False, False, False, True]]
    assert cells[0, 3] == 0.0  # a real zero stays a zero


def test_one_run_alone_without_the_control_is_drawn_and_says_what_is_missing(alone):
    assert {path.stem for path in alone.glob("*.svg")} == set(FIGURES)
    assert "no differences: run_7 is missing" in words(alone / "probing.svg")
    summary = (alone / "summary.md").read_text(encoding="utf-8")
    assert summary.count("None: run_7 is missing.") == 1
    assert summary.count("Differences to run_7") == 1  # the heading of that sentence
    row = table(summary, "Does online absorption foretell SAE-Bench's?")["full absorption"]
    assert row["Spearman rank correlation"] == "null"


def test_drawing_again_gives_the_same_files_byte_for_byte(alone):
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in alone.iterdir() if path.is_file()}

    before = content()
    assert draw(alone).returncode == 0
    after = content()
    assert [name for name in before if before[name] != after.get(name)] == []
    assert len(before) == len(after) == 2 * len(FIGURES) + 2


def test_a_run_looks_the_same_whoever_else_is_there(comparison, tmp_path):
    write_run(tmp_path, "run_7", {LAPTOP: usual_entry()})
    write_run(tmp_path, "run_10", {LAPTOP: usual_entry()})
    for arm in plot.load(tmp_path)[LAPTOP]:
        assert arm.look == find(plot.load(comparison)[LAPTOP], arm.name).look


def test_neither_torch_nor_the_network_is_needed_nor_the_experiment():
    foreign = ["torch", "requests", "urllib3", "experiment"]
    for room, blocked in (
        ("plot", foreign),
        ("lab.report", [*foreign, "plot"]),
        ("lab.runs", [*foreign, "plot", "matplotlib"]),
        ("lab.frontier", [*foreign, "plot", "matplotlib"]),
    ):
        code = f"import sys; sys.modules |= dict.fromkeys({blocked}); import {room}"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


def test_every_result_in_the_repository_keeps_the_orchestrator_contract():
    paths = [ROOT / "run_0" / "final_info.json"]
    paths += sorted(ROOT.glob("results/**/run_*/final_info.json"))
    for path in paths:
        results = json.loads(path.read_text(encoding="utf-8"))
        means = {k: v["means"] for k, v in results.items()}
        assert means, path
        for entry_means in means.values():
            assert all(v is None or isinstance(v, int | float) for v in entry_means.values()), path
