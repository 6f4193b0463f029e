"""lab/report.py: the numbers of the tables, what they say is missing, and the page."""

import html
import json
import re
import shutil
import subprocess

import pytest
from made_up_runs import (
    GEMMA,
    HOSTILE,
    LAPTOP,
    UNKNOWN,
    draw,
    entry,
    records,
    table,
    usual_entry,
    words,
    write_run,
)
from scipy.stats import spearmanr

import plot
from lab.runs import arms_of, found_runs
from lab.tables import comparison as tables_of
from lab.tables import rank_correlation, runs_table, task_table

# --------------------------------------------------------------------------------------- tables


def test_differences_to_the_control_are_paired_by_seed(summary):
    # Per seed 0.10, 0.15, 0.05: mean 0.10, sd 0.05; unpaired the error would be larger.
    rows = table(summary, "Differences to run_7: probing")
    assert rows["run_1 blend 0.1→0.9 + EMA"]["probing top-1 ↑"] == "+0.1000 ± 0.0289, p 0.25, n 3"
    # Seeds that all lie 0.02 higher differ by 0.02 exactly, however far they are apart.
    assert (
        rows["run_10 cosine, norm restored"]["probing top-2 ↑"] == "+0.0200 ± 0.0000, p 0.25, n 3"
    )
    assert not any(name.startswith("run_7") for name in rows)


def test_differences_within_the_controls_own_noise_are_grey_and_others_are_not(tmp_path):
    """The control's seeds are 0.01 apart, so their sd is 0.01."""
    for name, level in (("run_7", 0.0), ("run_1", 0.009), ("run_8", -0.011)):
        write_run(tmp_path, name, {LAPTOP: usual_entry(level)}, records(8))
    assert draw(tmp_path).returncode == 0
    rows = table((tmp_path / "summary.md").read_text("utf-8"), "Differences to run_7: fidelity")
    within, beyond = (
        rows[row]["FVU ↓"] for row in ("run_1 blend 0.1→0.9 + EMA", "run_8 cosine only")
    )
    assert within == "(+0.0090 ± 0.0000, p 0.25, n 3)"
    assert beyond == "-0.0110 ± 0.0000, p 0.25, n 3"
    page = (tmp_path / "report.html").read_text("utf-8")
    assert '<td class="grey">+0.0090 ± 0.0000, p 0.25, n 3</td>' in page
    assert "<td>-0.0110 ± 0.0000, p 0.25, n 3</td>" in page
    figure = plot.probing(plot.load(tmp_path)[LAPTOP])
    (band,) = figure.subfigs[2].axes[0].patches
    assert band.get_extents().transformed(figure.subfigs[2].axes[0].transData.inverted()).x1 == (
        pytest.approx(0.01)
    )


def test_differences_by_task_are_means_over_seeds_with_their_sd_over_tasks(tmp_path):
    control, run = usual_entry(), usual_entry()
    control["per_task"]["probing_top_1"] = {"a": [0.5, 0.5], "b": [0.6, 0.7], "other": [0.5, 0.5]}
    run["per_task"]["probing_top_1"] = {"a": [0.6, 0.8], "b": [0.6, 0.7]}
    write_run(tmp_path, "run_7", {LAPTOP: control})
    write_run(tmp_path, "run_8", {LAPTOP: run})
    reference, arm = plot.load(tmp_path)[LAPTOP]
    (line,) = task_table([arm], reference).lines[1:]
    # Task a: 0.1 and 0.3; task b: none; the third is not shared.  The sd of (0.2, 0) is 0.1414.
    assert line == ["run_8 cosine only", "+0.1000", "+0.1414", "+0.2000", "+0.0000"]


def test_rank_correlation_agrees_with_scipy_and_is_null_where_it_means_nothing():
    x, y = [1, 2, 2, 5, 4, 3], [2, 1, 3, 3, 5, 4]
    expected = spearmanr(x, y).statistic
    assert rank_correlation(list(zip(x, y, strict=True))) == pytest.approx(expected)
    assert rank_correlation([(1, 2), (2, 3)]) is None
    assert rank_correlation([(1, 2), (1, 3), (1, 4)]) is None
    assert rank_correlation([]) is None


def test_online_absorption_is_compared_with_the_final_score_over_the_runs_that_have_both(summary):
    row = table(summary, "Does online absorption foretell SAE-Bench's?")["full absorption"]
    assert row["runs"] == "5"  # six at this scale, of which one has no absorption
    assert row["Spearman rank correlation"] == "1.00"


def test_differences_to_a_baseline_of_the_same_scale_and_only_of_that(summary, tmp_path):
    assert f"None: run_0 is of another scale ({GEMMA})" in summary
    write_run(tmp_path, "run_0", {LAPTOP: entry(probing_top_1=[0.5])})
    write_run(tmp_path, "run_1", {LAPTOP: entry(probing_top_1=[0.7, 0.8])})
    groups = plot.load(tmp_path)
    tables = {
        t.heading: t for t in tables_of(groups[LAPTOP], plot.GROUPS, "run_7", "run_0", LAPTOP)
    }
    lines = tables["Differences to run_0: probing"].lines
    assert lines[1:] == [["run_1 blend 0.1→0.9 + EMA", "+0.2500 ± 0.0500"]]


def test_a_null_metric_is_a_dash_in_the_table_and_never_a_zero(summary):
    row = table(summary, "Results: absorption")["run_2 adaptive tightening"]
    assert row["full absorption ↓"] == row["absorption fraction ↓"] == "–"
    row = table(summary, "Differences to run_7: absorption")["run_2 adaptive tightening"]
    assert row["full absorption ↓"] == "–"
    assert "run_2, absorption: null: too few letters" in summary


def test_numbers_that_compare_seeds_carry_no_standard_error(summary):
    row = table(summary, "Results: stability")["run_7 control: vanilla ReLU"]
    assert row["PW-MCC ↑"] == "0.4000"
    assert "±" in row["roughness ↓"]


def test_a_single_seed_has_no_standard_error_anywhere(alone):
    summary = (alone / "summary.md").read_text(encoding="utf-8")
    assert "±" not in summary.split("## laptop")[1]


def test_read_outs_are_rows_of_their_own_and_never_runs(comparison, summary):
    rows = table(summary, "Read-out check: probing")
    assert list(rows) == ["run_1 blend 0.1→0.9 + EMA", "run_1 read as α = 0", "run_1 read as α = 1"]
    assert rows["run_1 read as α = 1"]["probing top-2 ↑"] == "0.6800 ± 0.0058"
    assert summary.count("read as α = 0") == 1
    assert "read as α = 0" in words(comparison / "readout_laptop_layer_8.svg")
    assert "read as α = 0" not in words(comparison / "probing_laptop_layer_8.svg")


def test_a_read_out_carries_few_latents_alone_and_the_rest_is_missing(summary, alone):
    row = table(summary, "Read-out check: probing")["run_1 read as α = 0"]
    assert row["sd over tasks ↓"] == "0.1100 ± 0.0058"
    assert row["all latents ↑"] == row["probing top-20 ↑"] == "–"
    before = table((alone / "summary.md").read_text(encoding="utf-8"), "Read-out check: probing")
    assert before["run_1 read as α = 0"]["all latents ↑"] == "0.8000", "a run made before has more"


def test_the_steadiness_of_the_mse_which_all_runs_have_in_common_is_a_column(summary):
    row = table(summary, "Results: stability")["run_7 control: vanilla ReLU"]
    assert row["mse roughness ↓"] == "0.2100 ± 0.0058"
    row = table(summary, "Differences to run_7: stability")["run_10 cosine, norm restored"]
    assert row["mse roughness ↓"] == "+0.0200 ± 0.0000, p 0.25, n 3"
    assert (
        "sd of log raw mse" in table(summary, "Metrics")["stability: mse roughness"]["what it is"]
    )


def test_runs_with_other_settings_are_called_not_comparable(summary):
    """Said of the runs, and before that of what they are decided by."""
    said = "NOT COMPARABLE: run_10 ran with another training_tokens than run_1."
    assert summary.count(said) == summary.count("NOT COMPARABLE") == 2
    assert said in summary.split("\n## ")[0]


def notes_of(folder, labels=plot.labels, **configs) -> str:
    """The note of the table of runs with these config.json; "scale" is theirs alone."""
    for name, config in configs.items():
        write_run(folder, name, {LAPTOP: usual_entry()}, config=config)
    runs = found_runs(folder)
    return runs_table(arms_of(folder, runs, labels, {name: {} for name in runs})[LAPTOP]).note


@pytest.mark.parametrize("place", ["laboratory", "processor", "device", "probing_texts"])
def test_runs_made_elsewhere_are_called_not_comparable(tmp_path, place):
    note = notes_of(tmp_path, run_1={place: "a"}, run_2={}, run_3={place: "b"}, run_4={place: "a"})
    assert note == f"NOT COMPARABLE: run_3 ran with another {place} than run_1."


def test_where_an_old_run_was_made_is_unknown_and_the_new_ones_are_compared_without_it(tmp_path):
    places = {"laboratory": "a", "processor": "amx_bf16", "device": "cpu"}
    other = {"laboratory": "b", "processor": "no_bf16", "device": "cpu"}
    note = notes_of(tmp_path, run_1={"device": "cpu"}, run_2=places, run_3=other)
    assert note == "NOT COMPARABLE: run_3 ran with another laboratory, processor than run_2."


def test_a_run_that_missed_its_target_l0_is_named(tmp_path):
    for name, l0 in (("run_1", 9.21), ("run_7", 8.4)):
        info = usual_entry()
        info["means"] |= {"l0": l0, "l0_target": 8.5}
        write_run(tmp_path, name, {LAPTOP: info})
    found = runs_table(plot.load(tmp_path)[LAPTOP]).note
    assert found == "L0 MISSED: 9.21 where 8.5 was asked (+8.4%) in run_1."


def test_an_edited_experiment_is_comparable(tmp_path):
    assert notes_of(tmp_path, run_1={"experiment": "a"}, run_2={"experiment": "b"}) == ""


def test_the_recipe_of_a_new_run_is_compared_with_the_scale_of_an_old_one(tmp_path):
    old = {"scale": {"d_sae": 64, "learning_rate": 0.1, "gate_init": 0.2}}
    new = {"scale": {"d_sae": 64}, "recipe": {"gate_init": 0.2, "learning_rate": 0.1}}
    tuned = {"scale": {"d_sae": 64}, "recipe": {"gate_init": 0.3, "learning_rate": 0.1}}
    note = notes_of(tmp_path, run_1=old, run_2=new, run_3=tuned)
    assert note == "NOT COMPARABLE: run_3 ran with another gate_init than run_1."


def test_the_one_target_of_an_old_run_is_compared_with_the_targets_of_a_new_one(tmp_path):
    configs = {"run_1": {"target_l0": 36.0}, "run_2": {"target_l0s": [36.0]}}
    configs["run_3"] = {"target_l0s": [18.0, 36.0]}
    note = notes_of(tmp_path, **{name: {"scale": scale} for name, scale in configs.items()})
    assert note == "NOT COMPARABLE: run_3 ran with another target_l0s than run_1."


def test_a_label_whose_run_another_row_made_is_said(summary, tmp_path):
    said = "run_7 is labelled 'control: vanilla ReLU', but was made by another row: 'the control'."
    assert said in summary
    assert summary.count("made by another row") == 2  # and run_1's
    labels = {"run_1": ("of a pair", "my title"), "run_2": "of an agent", "run_3": ("new", "other")}
    mine = {"run": {"title": "my title"}}
    note = notes_of(tmp_path, labels, run_1=mine, run_2=mine, run_3=mine)
    assert note == "run_3 is labelled 'new', but was made by another row: 'my title'."


def test_the_title_of_a_run_without_a_configuration_is_unknown_and_no_other(tmp_path):
    assert notes_of(tmp_path, {"run_1": ("label", "title")}, run_1={"run": {}}) == ""


def test_a_group_of_metrics_of_ones_own_is_a_table(tmp_path):
    groups = plot.GROUPS | {"mine": {"my_metric": ("my title", "↓", "what it is")}}
    write_run(tmp_path, "run_1", {LAPTOP: entry(my_metric=[0.5, 0.7])})
    tables = tables_of(plot.load(tmp_path)[LAPTOP], groups, "run_7", "run_0", None)
    (mine,) = [table for table in tables if table.heading == "Results: mine"]
    assert mine.lines == [["", "my title ↓"], ["run_1 blend 0.1→0.9 + EMA", "0.6000 ± 0.1000"]]


# ------------------------------------------------------------------------------------- the page


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
