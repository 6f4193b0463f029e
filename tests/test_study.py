"""The committed study is the program's own: same configuration, complete, at matched sparsity.

It was made when the scale had one target L0 and so a number for it, where it is now a list of one,
and before a model could be compiled; with another constraint, another run_10, and fewer metrics
(EARLIER, SINCE: results/README.md says so).  Everything else must be what it is now.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import test_results

import experiment
from lab.folders import differences
from lab.metrics import WORDS
from lab.results import layer_results
from lab.scales import SCALES
from lab.storage import json_text

STUDY = Path(experiment.__file__).parent / "results" / "laptop"
SCALE, RECIPE = SCALES["laptop"], experiment.RECIPES["laptop"]
ENTRY = "laptop layer 8"
EARLIER = {  # what differences() says of a run of the study
    "recipe.tightening_fraction is 0.3 there and 0.5 now",
    "run.norm_restored is 'absent' there and False now",
}
SINCE = {*WORDS, "l0_on_texts", "fvu_on_texts"}  # metrics that the study has not
MAIN_METRICS = (
    "loss_roughness",
    "grad_norm_cv",
    "absorption_full",
    "absorption_fraction",
    "probing_top_1",
    "probing_top_5",
    "fvu",
    "l0",
    "ce_recovered",
    "online_absorption_fraction",
    "online_absorption_full",
    "decoder_pw_mcc",
    "mse_roughness",
)


def test_the_metrics_of_the_study_are_those_that_runs_have_now():
    for run in experiment.RUNS:
        assert set(results_of(run)[ENTRY]["means"]) == set(metrics_of_a_run()) - SINCE, run


def metrics_of_a_run() -> dict:
    arguments = test_results.made_up()
    scale = replace(arguments["scale"], k_values=SCALE.k_values)
    for found in arguments["probing"]:
        for name in ("sae", "llm"):
            scores = found["sae_bench"]["eval_result_metrics"][name]
            scores |= {f"{name}_top_{k}_test_accuracy": 0.5 for k in SCALE.k_values}
        for task in found["sae_bench"]["eval_result_details"]:
            task |= {f"sae_top_{k}_test_accuracy": 0.5 for k in SCALE.k_values}
    return layer_results(**arguments | {"scale": scale})["means"]


def results_of(run: str) -> dict:
    return json.loads((STUDY / run / "final_info.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("run", experiment.RUNS)
def test_the_committed_numbers_came_from_the_committed_configuration(run):
    config = json.loads((STUDY / run / "config.json").read_text(encoding="utf-8"))
    scale = asdict(SCALE)
    (scale["target_l0"],) = scale.pop("target_l0s")
    assert scale.pop("compiled") is False, "and nothing was"
    identity = {
        "run_name": run,
        "run": asdict(experiment.RUNS[run]),
        "recipe": asdict(RECIPE),
        "scale": scale,
    }
    now = json.loads(json_text(identity))
    found = set(differences({name: config[name] for name in now}, now))
    if run == "run_10":  # it was the learned blend of the same paper
        assert config["run"]["schedule"] == "learned"
        found = {what for what in found if not what.startswith("run.")} | {*EARLIER}
    assert found == EARLIER


@pytest.mark.parametrize("run", experiment.RUNS)
def test_no_main_metric_of_the_study_is_missing(run):
    entry = results_of(run)[ENTRY]
    for metric in MAIN_METRICS:
        assert entry["means"][metric] is not None, metric
        # PW-MCC compares pairs of seeds, which share them: their spread is no standard error.
        assert (entry["stderrs"][metric] is None) == (metric == "decoder_pw_mcc"), metric
        assert len(entry["final_info_dict"][metric]) == SCALE.n_seeds >= 3, metric


@pytest.mark.parametrize("run", experiment.RUNS)
def test_every_run_ends_within_a_tenth_of_the_same_target_l0(run):
    assert results_of(run)[ENTRY]["means"]["l0"] == pytest.approx(SCALE.target_l0s[0], rel=0.1)


def test_the_control_is_well_trained_and_beats_the_models_own_best_channel():
    means = results_of("run_7")[ENTRY]["means"]
    assert means["fvu"] <= 0.25
    assert means["probing_top_1"] > means["lm_top_1"]
    assert means["absorption_letters"] >= 20


@pytest.mark.parametrize("run", ("run_1", "run_7"))
def test_the_read_out_check_is_an_entry_of_its_own(run):
    names = set(results_of(run))
    assert names == {ENTRY} | {f"{ENTRY}, read out with alpha = {a}" for a in (0, 1)}


@pytest.mark.parametrize("run", experiment.RUNS)
def test_the_training_log_holds_every_step_once(run):
    lines = (STUDY / run / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(SCALE.total_steps))
