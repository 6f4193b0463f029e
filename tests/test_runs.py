"""lab/runs.py: what is read of a run, what is passed over, and how two runs are compared."""

import math

import numpy as np
import pytest
from made_up_runs import LAPTOP, ROOT, entry, records, usual_entry, write_run

from lab.comparison import mean_and_error
from lab.runs import arms_of, found_runs

STUDY = ROOT / "results" / "laptop"


def load(folder) -> dict:
    runs = found_runs(folder)
    return arms_of(folder, runs, {}, {name: {} for name in runs})


def test_standard_error_is_the_sample_sd_over_the_root_of_n():
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt((4 + 1 + 9) / 2) / math.sqrt(3))


def test_a_single_seed_has_no_error_and_a_missing_seed_makes_the_mean_missing():
    assert mean_and_error([5.0])[0] == 5.0
    assert math.isnan(mean_and_error([5.0])[1])
    assert np.isnan(mean_and_error([0.1, None, 0.3])).all()
    assert np.isnan(mean_and_error([])).all()


def test_a_mean_comes_from_the_seeds_since_the_one_written_beside_them_is_rounded(tmp_path):
    written = entry(fvu=[0.2, 0.20001]) | {"stderrs": {"fvu": 5e-6}}
    written["means"]["mine"] = 0.5  # kept without its seeds
    write_run(tmp_path, "run_1", {LAPTOP: written})
    (arm,) = load(tmp_path)[LAPTOP]
    assert written["means"]["fvu"] == 0.2
    assert arm.value("fvu") == pytest.approx((0.200005, 5e-6), rel=1e-12)
    assert arm.value("mine")[0] == 0.5
    assert np.isnan(arm.value("unheard_of")).all()


def test_metrics_have_their_new_names_in_old_runs(tmp_path):
    old = {"online_absorption": [0.1, 0.3], "online_full_absorption": [0.5, 0.7]}
    line = {"layer": 8, "step": 0} | old
    write_run(tmp_path, "run_1", {LAPTOP: entry(**old)}, [line])
    (arm,) = load(tmp_path)[LAPTOP]
    for name, mean in (("online_absorption_fraction", 0.2), ("online_absorption_full", 0.6)):
        assert arm.value(name) == pytest.approx((mean, 0.1))
        assert arm.entry["means"][name] == pytest.approx(mean)
        assert arm.series(name)[1] == pytest.approx([mean])
    assert not old.keys() & {*arm.entry["means"], *arm.entry["stderrs"], *arm.records[0]}


def test_the_committed_study_has_its_online_absorption():
    arms = load(STUDY)["laptop layer 8"]
    assert arms
    for arm in arms:
        for name in ("online_absorption_fraction", "online_absorption_full"):
            assert np.isfinite(arm.value(name)).all()
            assert len(arm.series(name)[0]) > 1


def test_a_seed_without_a_value_interrupts_its_curve(tmp_path):
    log = records(8)
    log[10]["loss"][1] = None
    write_run(tmp_path, "run_1", {LAPTOP: usual_entry()}, log)
    steps, mean, _ = load(tmp_path)[LAPTOP][0].series("loss")
    assert np.flatnonzero(np.isnan(mean)).tolist() == [10]
    assert len(steps) == 40


def test_what_is_measured_now_and_then_is_drawn_at_the_steps_it_was_measured(tmp_path):
    write_run(tmp_path, "run_1", {LAPTOP: usual_entry()}, records(8))
    steps, mean, _ = load(tmp_path)[LAPTOP][0].series("online_absorption_fraction")
    assert steps.tolist() == [0, 10, 20, 30]
    assert np.isfinite(mean).all()


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"means": {"b": "c"}}}'])
def test_what_is_no_result_is_passed_over(tmp_path, capsys, content):
    (tmp_path / "run_1").mkdir()
    (tmp_path / "run_1" / "final_info.json").write_text(content)
    assert load(tmp_path) == {}
    assert "run_1: skipped" in capsys.readouterr().out


def test_a_damaged_log_is_left_out_and_the_run_kept(tmp_path, capsys):
    run = write_run(tmp_path, "run_1", {LAPTOP: usual_entry()}, records(8))
    log = run / "training_log.jsonl"
    log.write_text(log.read_text()[:-9])
    (arm,) = load(tmp_path)[LAPTOP]
    assert arm.records == []
    assert "run_1: training_log.jsonl is left out" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{}", '{"step": 0}', "[0]", "0"])
def test_a_log_of_something_else_is_left_out_and_the_run_kept(tmp_path, capsys, line):
    run = write_run(tmp_path, "run_1", {LAPTOP: usual_entry()}, records(8))
    (run / "training_log.jsonl").write_text(f"{line}\n")
    (run / "config.json").write_text("[]")
    (arm,) = load(tmp_path)[LAPTOP]
    assert (arm.records, arm.config) == ([], {})
    said = capsys.readouterr().out
    assert "run_1: training_log.jsonl is left out" in said
    assert "run_1: config.json is left out" in said
