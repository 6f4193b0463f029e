"""The printed summary: `key: value` lines, and differences to the control only where they mean
something."""

import csv
import hashlib
import json
from pathlib import Path

import pytest

from lab.process import Clock
from lab.summary import COMPARED, add_to_table, differences_to, print_summary

CONFIG = {
    "run_name": "run_1",
    "scale": {"name": "tiny", "layers": (1,)},
    "recipe": {"gate_init": 0.2},
    "laboratory": "ab",
    "processor": "amx_bf16",
    "device": "x86_64",
    "probing_texts": "0123",
}


def entry(fvu: list) -> dict:
    return {"means": {"fvu": 0.25}, "stderrs": {"fvu": None}, "final_info_dict": {"fvu": fvu}}


@pytest.fixture
def control(tmp_path) -> Path:
    """A finished run_7 whose three seeds have FVU .1, .2 and .3."""
    return made(tmp_path / "run_7", {"tiny layer 1": entry([0.1, 0.2, 0.3])}, CONFIG)


def made(folder: Path, results: dict, config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    text = json.dumps(results)
    sums = {"final_info.json": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "final_info.json").write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config | {"sha256": sums}), encoding="utf-8")
    return folder


def test_differences_are_paired_by_seed_with_their_standard_error_p_and_n(control):
    found = differences_to(control, {"tiny layer 1": entry([0.2, 0.3, 0.5])}, CONFIG)
    # .1, .1, .2: mean .13333, sd .057735, over sqrt 3 .033333; 2 of 8 flips are as far from 0.
    # The control's own seeds have an sd of .1.
    assert found == ["differences to run_7, paired by seed:",
                     "tiny layer 1, fvu: +0.1333 +- 0.033 (p = 0.25, n = 3)"]  # fmt: skip


def test_a_difference_below_the_controls_own_noise_says_so(control):
    (_, found) = differences_to(control, {"tiny layer 1": entry([0.15, 0.25, 0.4])}, CONFIG)
    assert found == (
        "tiny layer 1, fvu: +0.06667 +- 0.017 (p = 0.25, n = 3), "
        "less than the sd over the control's own seeds"
    )


def test_six_seeds_have_an_interval_in_the_place_of_the_error(tmp_path):
    theirs, ours = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    control = made(tmp_path / "run_7", {"tiny layer 1": entry(theirs)}, CONFIG)
    (_, found) = differences_to(control, {"tiny layer 1": entry(ours)}, CONFIG)
    assert found.startswith("tiny layer 1, fvu: +0.1, 95% [+0.1, +0.1] (p = 0.031, n = 6)")


def test_a_missing_value_has_no_difference(control):
    found = differences_to(control, {"tiny layer 1": entry([0.2, None, 0.5])}, CONFIG)
    assert found == ["differences to run_7, paired by seed:"]


@pytest.mark.parametrize(
    "what", ["scale", "recipe", "laboratory", "processor", "device", "probing_texts"]
)
def test_a_control_of_another_kind_is_not_compared_with(control, what):
    found = differences_to(control, {"tiny layer 1": entry([1, 1, 1])}, CONFIG | {what: "other"})
    assert found == [f"differences to run_7: none, NOT COMPARABLE (another {what})"]


def test_without_a_control_beside_it_the_differences_are_left_out_in_one_line(tmp_path):
    (line,) = differences_to(tmp_path / "run_7", {"tiny layer 1": entry([1])}, CONFIG)
    assert line == "differences to run_7: none, it has not been run beside this one"


def test_a_control_with_more_seeds_is_compared_by_those_that_both_have(tmp_path):
    many = CONFIG | {"scale": CONFIG["scale"] | {"n_seeds": 8}}
    few = CONFIG | {"scale": CONFIG["scale"] | {"n_seeds": 2}}
    control = made(tmp_path / "run_7", {"tiny layer 1": entry([0.1] * 8)}, many)
    (_, found) = differences_to(control, {"tiny layer 1": entry([0.2, 0.3])}, few)
    assert found == "tiny layer 1, fvu: +0.15 +- 0.05 (p = 0.5, n = 2)"


@pytest.mark.parametrize(("l0", "said"), [(36.6, False), (36.8, True), (35.2, True)])
def test_a_run_that_missed_its_target_l0_says_so(l0, said, control, capsys):
    results = {"tiny layer 1": entry([1, 2, 3])}
    results["tiny layer 1"]["means"] |= {"l0": l0, "l0_target": 36.0}
    results["tiny layer 1"]["stderrs"] |= {"l0": 0.1, "l0_target": None}
    print_summary("run_7, control", results, Clock(), CONFIG | {"run_name": "run_7"}, control)
    warning = f"tiny layer 1, L0 MISSED: {l0:g} where 36 was asked ({l0 / 36 - 1:+.1%})"
    assert (warning in capsys.readouterr().out) == said


@pytest.mark.parametrize("damage", ["changed", "no json", "no list"])
def test_a_damaged_control_is_said_and_harms_nothing(control, damage):
    text = {"changed": '{"tiny layer 1": {}}', "no json": "{", "no list": "[]"}[damage]
    (control / "final_info.json").write_text(text, encoding="utf-8")
    (line,) = differences_to(control, {"tiny layer 1": entry([1])}, CONFIG)
    assert line.startswith("differences to run_7: none, its files are not what a run of this")


def test_the_summary_names_the_run_and_its_values_and_the_control_has_no_difference_to_itself(
    control, capsys
):
    results = {"tiny layer 1": entry([1, 2, 3])}
    print_summary("run_1, an idea", results, Clock(), CONFIG, control)
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == ["---", "run: run_1, an idea", "entry: tiny layer 1", "fvu: 0.25"]
    assert any("paired by seed" in line for line in said)
    assert said[-1].startswith("seconds total: ")
    print_summary("run_7, control", results, Clock(), CONFIG | {"run_name": "run_7"}, control)
    assert "differences" not in capsys.readouterr().out


def test_every_entry_of_every_finished_run_is_a_line_of_the_table_beside_it(tmp_path):
    """A title may hold anything; what is missing is empty and not 0."""
    clock, config = Clock(), CONFIG | {"experiment": "abc"}
    results = {"tiny layer 1": entry([0.2]), "tiny layer 3": {"means": {"fvu": None, "l0": 35.96}}}
    add_to_table(tmp_path / "run_1", 'a\ttab, a "quote"\nand a line', results, config, clock)
    add_to_table(tmp_path / "run_2", "another", {"tiny layer 1": entry([0.3])}, config, clock)
    with (tmp_path / "results.tsv").open(encoding="utf-8", newline="") as file:
        head, first, second, third = csv.reader(file, delimiter="\t")
    assert head == ["run", "title", "entry", "experiment", "laboratory", *COMPARED, "seconds"]
    assert first[:5] == ["run_1", 'a\ttab, a "quote"\nand a line', "tiny layer 1", "abc", "ab"]
    assert third[:3] == ["run_2", "another", "tiny layer 1"]
    assert dict(zip(head, first, strict=True))["fvu"] == "0.25"
    assert dict(zip(head, second, strict=True))["fvu"] == ""
    assert dict(zip(head, second, strict=True))["l0"] == "35.96"
    assert first[-1] == "0"
