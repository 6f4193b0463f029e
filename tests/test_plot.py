"""plot.py on made-up runs with known numbers: differences, gaps, scales kept apart, the report."""

import html
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "plot.py"
LAPTOP, PYTHIA, GEMMA = "laptop layer 8", "pythia-70m layer 3", "gemma-2-2b layer 5"
FIGURES = (
    "training_curves",
    "schedules",
    "online_absorption",
    "absorption_letters",
    "probing",
    "tradeoff",
    "readout",
)
KS = (1, 2, 5, 10, 20, 50)


@pytest.fixture(scope="module")
def plot():
    spec = importlib.util.spec_from_file_location("plot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["plot"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------- made-up runs


def entry(**per_seed) -> dict:
    """An entry of final_info.json from one value per seed of each metric."""
    values = {name: list(seeds) for name, seeds in per_seed.items()}
    n = {name: len(seeds) for name, seeds in values.items()}
    missing = {name: None in seeds for name, seeds in values.items()}
    return {
        "means": {m: None if missing[m] else float(np.mean(v)) for m, v in values.items()},
        "stderrs": {
            m: None if missing[m] or n[m] < 2 else float(np.std(v, ddof=1) / math.sqrt(n[m]))
            for m, v in values.items()
        },
        "final_info_dict": values,
    }


def usual_entry(level: float = 0.0, seeds: int = 3, tasks=("code", "news")) -> dict:
    """Everything experiment.py writes, shifted by `level`; seed s lies 0.01 s higher."""

    def around(centre: float) -> list[float]:
        return [centre + level + 0.01 * s for s in range(seeds)]

    metrics = {f"probing_top_{k}": around(0.6 + 0.02 * i) for i, k in enumerate(KS)}
    metrics |= {f"lm_top_{k}": [0.55 + 0.04 * i] * seeds for i, k in enumerate(KS)}
    names = "absorption_full absorption_fraction fvu dead ce_recovered loss_roughness grad_norm_cv"
    metrics |= {name: around(0.2) for name in names.split()}
    metrics |= {"l0": around(36), "loss_spikes": [0.0] * seeds, "decoder_pw_mcc": [0.4] * seeds}
    metrics |= {"online_absorption": around(0.1), "online_full_absorption": around(0.1)}
    letters = {letter: around(0.1) for letter in "abc"}
    return entry(**metrics) | {
        "per_letter": {"absorption_full": letters, "absorption_fraction": letters},
        "per_task": {
            "probing_top_1": {task: around(0.6 + 0.1 * i) for i, task in enumerate(tasks)}
        },
        "notes": {"outlier_norm": 100.0},
    }


def records(layer: int, steps: int = 40, seeds: int = 3) -> list[dict]:
    def line(step: int) -> dict:
        measured = step % 10 == 0
        several = {"alpha": 0.5, "l0_target": 36.0, "lambda": 0.05, "l0": 40.0, "loss": 0.5}
        return {name: [v + 0.01 * s for s in range(seeds)] for name, v in several.items()} | {
            "layer": layer,
            "step": step,
            "ema_decay": None,
            "online_absorption": [0.1] * seeds if measured else None,
            "online_full_absorption": [0.1] * seeds if measured else None,
        }

    return [line(step) for step in range(steps)]


def write_run(folder: Path, name: str, info: dict, log=None, title="a run", **scale) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "final_info.json").write_text(json.dumps(info))
    config = {"run": {"title": title}, "scale": {"n_seeds": 3} | scale, "total_steps": 40}
    (run / "config.json").write_text(json.dumps(config))
    if log is not None:
        (run / "training_log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    return run


def draw(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def table(summary: str, heading: str) -> dict[str, dict[str, str]]:
    """A table of summary.md as {row: {column: cell}}."""
    section = summary.split(f"### {heading}\n")[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


def words(svg: Path) -> str:
    """The text of a figure: matplotlib leaves it in comments where it draws letters as outlines."""
    return html.unescape("\n".join(re.findall(r"<!-- (.*?) -->", svg.read_text(encoding="utf-8"))))


UNKNOWN = "run_my_$idea$"
HOSTILE = "<script>document.title='broken'</script> & co"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    """A folder with everything that can be met in one, drawn by the real script."""
    folder = tmp_path_factory.mktemp("runs")
    read_out = {f"{LAPTOP}, read out with alpha = {a}": usual_entry(0.05 * a) for a in (0, 1)}
    null = usual_entry()
    for name in [name for name in null["means"] if name.startswith("absorption")]:
        null["means"][name] = null["stderrs"][name] = None
        null["final_info_dict"][name] = [None] * 3
    null |= {"per_letter": {"absorption_full": {}, "absorption_fraction": {}}}
    null["notes"] |= {"absorption": "null: too few letters"}
    paired = usual_entry()
    paired["final_info_dict"]["probing_top_1"] = [0.70, 0.76, 0.67]  # control: 0.60, 0.61, 0.62
    write_run(folder, "run_1", {LAPTOP: paired, **read_out}, records(8), title=HOSTILE)
    write_run(folder, "run_2", {LAPTOP: null}, records(8))
    write_run(folder, "run_3", {PYTHIA: usual_entry()}, records(3))
    write_run(folder, "run_4", {LAPTOP: usual_entry()}, records(8))
    cut = folder / "run_4" / "final_info.json"
    cut.write_text(cut.read_text()[:-40])
    (folder / "run_5").mkdir()
    write_run(folder, "run_6", {LAPTOP: usual_entry(0.01)})
    write_run(folder, "run_7", {LAPTOP: usual_entry()}, records(8), title="the control")
    write_run(folder, "run_10", {LAPTOP: usual_entry(0.02)}, records(8), training_tokens=1)
    write_run(folder, UNKNOWN, {LAPTOP: usual_entry(0.03)}, records(8))
    single = entry(probing_top_1=[0.5], lm_top_1=[0.68])
    write_run(folder, "run_0", {GEMMA: single | {"notes": {"baseline": "as it was given"}}})
    found = draw(folder)
    assert found.returncode == 0, found.stderr
    (folder / "stdout").write_text(found.stdout)
    (folder / "stderr").write_text(found.stderr)
    return folder


@pytest.fixture(scope="module")
def summary(comparison) -> str:
    return (comparison / "summary.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A folder with one run of one seed, drawn by the real script."""
    folder = tmp_path_factory.mktemp("alone")
    info = {LAPTOP: usual_entry(seeds=1)}
    info[f"{LAPTOP}, read out with alpha = 0"] = usual_entry(seeds=1)
    write_run(folder, "run_1", info, records(8, seeds=1))
    found = draw(folder)
    assert (found.returncode, found.stderr) == (0, "")
    return folder


# --------------------------------------------------------------------------------------- numbers


def test_standard_error_is_the_sample_sd_over_the_root_of_n(plot):
    mean, error = plot.mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt((4 + 1 + 9) / 2) / math.sqrt(3))


def test_a_single_seed_has_no_error_and_a_missing_seed_makes_the_mean_missing(plot):
    assert plot.mean_and_error([5.0])[0] == 5.0
    assert math.isnan(plot.mean_and_error([5.0])[1])
    assert np.isnan(plot.mean_and_error([0.1, None, 0.3])).all()
    assert np.isnan(plot.mean_and_error([])).all()


def test_differences_to_the_control_are_paired_by_seed(summary):
    # Per seed 0.10, 0.15, 0.05: mean 0.10, sd 0.05; unpaired the error would be larger.
    rows = table(summary, "Differences to run_7: probing")
    assert rows["run_1 blend 0.1→0.9 + EMA"]["probing top-1 ↑"] == "+0.1000 ± 0.0289"
    # Seeds that all lie 0.02 higher differ by 0.02 exactly, however far they are apart.
    assert rows["run_10 learned blend"]["probing top-2 ↑"] == "+0.0200 ± 0.0000"
    assert not any(name.startswith("run_7") for name in rows)


def test_differences_by_task_are_means_over_seeds_with_their_sd_over_tasks(plot, tmp_path):
    control, run = usual_entry(), usual_entry()
    control["per_task"]["probing_top_1"] = {"a": [0.5, 0.5], "b": [0.6, 0.7], "other": [0.5, 0.5]}
    run["per_task"]["probing_top_1"] = {"a": [0.6, 0.8], "b": [0.6, 0.7]}
    write_run(tmp_path, "run_7", {LAPTOP: control})
    write_run(tmp_path, "run_8", {LAPTOP: run})
    reference, arm = plot.load(tmp_path)[LAPTOP]
    (line,) = plot.task_table([arm], reference).lines[1:]
    # Task a: 0.1 and 0.3; task b: none; the third is not shared.  The sd of (0.2, 0) is 0.1414.
    assert line == ["run_8 cosine only", "+0.1000", "+0.1414", "+0.2000", "+0.0000"]


def test_rank_correlation_agrees_with_scipy_and_is_null_where_it_means_nothing(plot):
    x, y = [1, 2, 2, 5, 4, 3], [2, 1, 3, 3, 5, 4]
    expected = spearmanr(x, y).statistic
    assert plot.rank_correlation(list(zip(x, y, strict=True))) == pytest.approx(expected)
    assert plot.rank_correlation([(1, 2), (2, 3)]) is None
    assert plot.rank_correlation([(1, 2), (1, 3), (1, 4)]) is None
    assert plot.rank_correlation([]) is None


def test_online_absorption_is_compared_with_the_final_score_over_the_runs_that_have_both(summary):
    row = table(summary, "Does online absorption foretell SAE-Bench's?")["full absorption"]
    assert row["runs"] == "5"  # six at this scale, of which one has no absorption
    assert row["Spearman rank correlation"] == "1.00"


def test_differences_to_a_baseline_of_the_same_scale_and_only_of_that(plot, summary, tmp_path):
    assert f"None: run_0 is of another scale ({GEMMA})" in summary
    write_run(tmp_path, "run_0", {LAPTOP: entry(probing_top_1=[0.5])})
    write_run(tmp_path, "run_1", {LAPTOP: entry(probing_top_1=[0.7, 0.8])})
    groups = plot.load(tmp_path)
    tables = {t.heading: t for t in plot.comparison(groups[LAPTOP], LAPTOP)}
    lines = tables["Differences to run_0: probing"].lines
    assert lines[1:] == [["run_1 blend 0.1→0.9 + EMA", "+0.2500 ± 0.0500"]]


# --------------------------------------------------------------------------------- missing values


def test_a_null_metric_is_a_dash_in_the_table_and_never_a_zero(summary):
    row = table(summary, "Results: absorption")["run_2 adaptive tightening"]
    assert row["full absorption ↓"] == row["absorption fraction ↓"] == "–"
    row = table(summary, "Differences to run_7: absorption")["run_2 adaptive tightening"]
    assert row["full absorption ↓"] == "–"
    assert "run_2, absorption: null: too few letters" in summary


def test_a_null_metric_is_a_gap_in_the_figures(plot, comparison):
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


def test_a_letter_scored_in_one_run_only_is_a_gap_in_the_others(plot, tmp_path):
    run = usual_entry()
    run["per_letter"]["absorption_full"]["z"] = [0.0, 0.0, 0.0]
    write_run(tmp_path, "run_1", {LAPTOP: run})
    write_run(tmp_path, "run_7", {LAPTOP: usual_entry()})
    figure = plot.absorption_letters(plot.load(tmp_path)[LAPTOP])
    cells = figure.subfigs[0].axes[0].collections[0].get_array()
    assert cells.mask.tolist() == [[False] * 4, [False, False, False, True]]
    assert cells[0, 3] == 0.0  # a real zero stays a zero


def test_a_seed_without_a_value_interrupts_its_curve(plot, tmp_path):
    log = records(8)
    log[10]["loss"][1] = None
    write_run(tmp_path, "run_1", {LAPTOP: usual_entry()}, log)
    steps, mean, _ = plot.load(tmp_path)[LAPTOP][0].series("loss")
    assert np.flatnonzero(np.isnan(mean)).tolist() == [10]
    assert len(steps) == 40


def test_what_is_measured_now_and_then_is_drawn_at_the_steps_it_was_measured(plot, tmp_path):
    write_run(tmp_path, "run_1", {LAPTOP: usual_entry()}, records(8))
    steps, mean, _ = plot.load(tmp_path)[LAPTOP][0].series("online_absorption")
    assert steps.tolist() == [0, 10, 20, 30]
    assert np.isfinite(mean).all()


def test_numbers_that_compare_seeds_carry_no_standard_error(summary):
    row = table(summary, "Results: stability")["run_7 control: vanilla ReLU"]
    assert row["PW-MCC ↑"] == "0.4000"
    assert "±" in row["roughness ↓"]


# --------------------------------------------------------------------------- which runs and files


def test_runs_are_in_natural_order_and_unknown_names_are_shown(summary):
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


def test_every_run_has_its_own_look_and_the_control_is_black(plot):
    names = [f"run_{i}" for i in range(20)] + ["run_x"]
    found = plot.looks(names)
    assert len({tuple(look.items()) for look in found.values()}) == len(names)
    assert found["run_7"]["color"] == "black"
    assert sum(look["color"] == "black" for look in found.values()) == 1
    assert plot.looks(["run_7", "run_9"])["run_9"] == found["run_9"]  # whoever else is there


def test_unfinished_and_half_written_runs_are_named_and_passed_over(comparison, summary):
    stdout = (comparison / "stdout").read_text()
    assert "run_4: skipped" in stdout
    assert "run_5: skipped, not finished" in stdout
    assert "run_4" not in summary
    assert "run_5" not in summary
    assert (comparison / "stderr").read_text() == ""


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"means": {"b": "c"}}}'])
def test_what_is_no_result_is_passed_over(plot, tmp_path, capsys, content):
    (tmp_path / "run_1").mkdir()
    (tmp_path / "run_1" / "final_info.json").write_text(content)
    assert plot.load(tmp_path) == {}
    assert "run_1: skipped" in capsys.readouterr().out


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
    expected = {f"{name}_laptop_layer_8" for name in FIGURES}
    expected |= {f"{name}_pythia-70m_layer_3" for name in FIGURES if name != "readout"}
    assert {path.stem for path in comparison.glob("*.svg")} == expected
    assert {path.stem for path in comparison.glob("*.png")} == expected
    assert not list(comparison.glob(".*"))


def test_a_run_without_a_log_is_in_every_figure_but_the_curves(comparison):
    for name in ("absorption_letters", "tradeoff", "probing"):
        assert "exponential approach" in words(comparison / f"{name}_laptop_layer_8.svg")


def test_read_outs_are_rows_of_their_own_and_never_runs(comparison, summary):
    rows = table(summary, "Read-out check: probing")
    assert list(rows) == ["run_1 blend 0.1→0.9 + EMA", "run_1 read as α = 0", "run_1 read as α = 1"]
    assert rows["run_1 read as α = 1"]["probing top-2 ↑"] == "0.6800 ± 0.0058"
    assert summary.count("read as α = 0") == 1
    assert "read as α = 0" in words(comparison / "readout_laptop_layer_8.svg")
    assert "read as α = 0" not in words(comparison / "probing_laptop_layer_8.svg")


def test_runs_with_other_settings_are_called_not_comparable(summary):
    assert "NOT COMPARABLE: run_10 ran with another training_tokens than run_1." in summary
    assert summary.count("NOT COMPARABLE") == 1


def test_one_run_alone_without_the_control_is_drawn_and_says_what_is_missing(alone):
    assert {path.stem for path in alone.glob("*.svg")} == set(FIGURES)
    assert "no differences: run_7 is missing" in words(alone / "probing.svg")
    summary = (alone / "summary.md").read_text(encoding="utf-8")
    assert "None: run_7 is missing." in summary
    row = table(summary, "Does online absorption foretell SAE-Bench's?")["full absorption"]
    assert row["Spearman rank correlation"] == "null"


def test_a_single_seed_has_no_standard_error_anywhere(alone):
    summary = (alone / "summary.md").read_text(encoding="utf-8")
    assert "±" not in summary.split("## laptop")[1]


def test_a_damaged_log_is_left_out_and_the_run_kept(plot, tmp_path, capsys):
    run = write_run(tmp_path, "run_1", {LAPTOP: usual_entry()}, records(8))
    log = run / "training_log.jsonl"
    log.write_text(log.read_text()[:-9])
    (arm,) = plot.load(tmp_path)[LAPTOP]
    assert arm.records == []
    assert "run_1: training_log.jsonl is left out" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{}", '{"step": 0}', "[0]", "0"])
def test_a_log_of_something_else_is_left_out_and_the_run_kept(plot, tmp_path, capsys, line):
    run = write_run(tmp_path, "run_1", {LAPTOP: usual_entry()}, records(8))
    (run / "training_log.jsonl").write_text(f"{line}\n")
    (run / "config.json").write_text("[]")
    (arm,) = plot.load(tmp_path)[LAPTOP]
    assert (arm.records, arm.config) == ([], {})
    said = capsys.readouterr().out
    assert "run_1: training_log.jsonl is left out" in said
    assert "run_1: config.json is left out" in said


def test_drawing_again_gives_the_same_files_byte_for_byte(alone):
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in alone.iterdir() if path.is_file()}

    before = content()
    assert draw(alone).returncode == 0
    after = content()
    assert [name for name in before if before[name] != after.get(name)] == []
    assert len(before) == len(after) == 2 * len(FIGURES) + 2


def test_positions_are_rounded_since_the_layout_varies_in_its_last_digits(
    plot, alone, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    monkeypatch.setattr(plot, "FIGURES", (plot.probing,))
    plot.draw(plot.load(alone)[LAPTOP], tmp_path, "")
    (figure,) = drawn
    positions = [ax.get_position().bounds for ax in figure.axes]
    positions += [band.bbox_relative.bounds for band in figure.subfigs]
    assert np.allclose(positions, np.round(positions, 5), rtol=0, atol=1e-12)


def test_neither_torch_nor_the_network_is_needed():
    blocked = "import sys; sys.modules.update(torch=None, requests=None, urllib3=None); import plot"
    subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, check=True, timeout=600)


# --------------------------------------------------------------------------------------- report


def test_the_report_escapes_what_it_did_not_write_itself(comparison):
    text = (comparison / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count(html.escape(HOSTILE)) >= 2  # in the table of runs and in the configuration


def test_the_report_fetches_nothing(comparison):
    text = (comparison / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*', text) == []
    assert "url(" not in text
    assert "@import" not in text


CHECKS = """<script>
document.currentScript.remove();
const narrow = document.createElement("iframe");
narrow.style.width = "390px";
narrow.srcdoc = document.documentElement.outerHTML;
document.body.append(narrow);
addEventListener("load", () => {
  const images = [...document.images], page = narrow.contentDocument.documentElement;
  const result = {
    drawn: images.filter(image => image.complete && image.naturalWidth > 200).length,
    images: images.length,
    title: document.title,
    overflow: page.scrollWidth - page.clientWidth,
  };
  document.body.insertAdjacentHTML("beforeend", `<output>${JSON.stringify(result)}</output>`);
});
</script>"""


def test_the_report_opens_in_a_browser_with_every_run_and_figure(comparison, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    report = (comparison / "report.html").read_text(encoding="utf-8")
    page = tmp_path / "report.html"
    page.write_text(report.replace("</body>", CHECKS + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--no-first-run", "--disable-gpu"]
    options += ["--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000"]
    found = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr
    assert "CONSOLE" not in found.stderr
    result = json.loads(re.search(r"<output>(.*?)</output>", found.stdout)[1])
    n = len(list(comparison.glob("*.svg")))
    assert result == {"drawn": n, "images": n, "title": "Comparison of runs", "overflow": 0}
    dom = html.unescape(found.stdout)
    for label in ("blend 0.1→0.9 + EMA", "control: vanilla ReLU", "given baseline", UNKNOWN):
        assert label in dom
    for svg in comparison.glob("*.svg"):
        assert f'<figure id="{svg.stem}">' in dom


# --------------------------------------------------------------------------------- real results


def test_every_result_in_the_repository_keeps_the_orchestrator_contract():
    paths = [ROOT / "run_0" / "final_info.json"]
    paths += sorted(ROOT.glob("results/**/run_*/final_info.json"))
    for path in paths:
        results = json.loads(path.read_text(encoding="utf-8"))
        means = {k: v["means"] for k, v in results.items()}
        assert means, path
        for entry_means in means.values():
            assert all(v is None or isinstance(v, int | float) for v in entry_means.values()), path
