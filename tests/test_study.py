"""The committed studies are the program's own: same configuration, complete, at equal sparsity."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import test_results

import experiment
from lab.folders import differences
from lab.results import layer_results, title
from lab.scales import SCALES
from lab.storage import json_text

RESULTS = Path(experiment.__file__).parent / "results"
# folder -> scale
STUDIES = {"laptop": "laptop", "laptop_long": "laptop-long", "synthetic": "synthetic"}
# Steps from one line of a committed log to the next.
KEPT = {"laptop_long": 10, "synthetic": 25}
RUNS = [(study, run) for study in STUDIES for run in experiment.RUNS]
MAIN_METRICS = ("mse_roughness", "loss_roughness", "grad_norm_cv", "fvu", "l0", "decoder_pw_mcc")
OF_A_MODEL = (
    "absorption_full",
    "absorption_fraction",
    "absorption_absorbed",
    "absorption_absorbed_by_its_letter",
    "absorption_lost",
    "fvu_on_words",
    "l0_on_words",
    "probing_top_1",
    "probing_top_5",
    "probing_top_1_sd_over_tasks",
    "l0_on_texts",
    "ce_recovered",
    "online_absorption_fraction",
    "online_absorption_full",
)
OF_A_WORLD = ("absorption_gap", "parent_fires_alone", "parent_cosine", "mcc", "f1")


def results_of(study: str, run: str) -> dict:
    return json.loads((RESULTS / study / run / "final_info.json").read_text(encoding="utf-8"))


def entries_of(study: str, run: str) -> list[tuple[float, dict]]:
    """(target L0, entry) of every layer and target."""
    scale, found = SCALES[STUDIES[study]], results_of(study, run)
    pairs = [(layer, target) for layer in scale.layers for target in scale.target_l0s]
    return [(target, found[title(scale, layer, target)]) for layer, target in pairs]


def test_the_metrics_of_the_laptops_study_are_those_that_runs_have_now():
    arguments = test_results.made_up()
    scale = replace(arguments["scale"], k_values=SCALES["laptop"].k_values)
    for found in arguments["probing"]:
        for name in ("sae", "llm"):
            scores = found["sae_bench"]["eval_result_metrics"][name]
            scores |= {f"{name}_top_{k}_test_accuracy": 0.5 for k in scale.k_values}
        for task in found["sae_bench"]["eval_result_details"]:
            task |= {f"sae_top_{k}_test_accuracy": 0.5 for k in scale.k_values}
    now = set(layer_results(**arguments | {"scale": scale})["means"])
    for run in experiment.RUNS:
        ((_, entry),) = entries_of("laptop", run)
        assert set(entry["means"]) == now, run


@pytest.mark.parametrize(("study", "run"), RUNS)
def test_the_committed_numbers_came_from_the_committed_configuration(study, run):
    config = json.loads((RESULTS / study / run / "config.json").read_text(encoding="utf-8"))
    scale = SCALES[STUDIES[study]]
    identity = {
        "run_name": run,
        "run": asdict(experiment.RUNS[run]),
        "recipe": asdict(experiment.RECIPES[scale.name]),
        "scale": asdict(scale),
    }
    now = json.loads(json_text(identity))
    assert list(differences({name: config[name] for name in now}, now)) == []


@pytest.mark.parametrize("study", STUDIES)
def test_all_runs_of_a_study_were_made_by_one_program_on_one_kind_of_machine(study):
    configs = [
        json.loads((RESULTS / study / run / "config.json").read_text(encoding="utf-8"))
        for made, run in RUNS
        if made == study
    ]
    for place in ("experiment", "laboratory", "processor", "device", "versions"):
        assert len({json.dumps(config.get(place)) for config in configs}) == 1, place


@pytest.mark.parametrize(("study", "run"), RUNS)
def test_no_main_metric_of_a_study_is_missing(study, run):
    scale = SCALES[STUDIES[study]]
    metrics = MAIN_METRICS + (OF_A_WORLD if scale.world else OF_A_MODEL)
    for _, entry in entries_of(study, run):
        for metric in metrics:
            assert entry["means"][metric] is not None, metric
            # PW-MCC compares pairs of seeds, which share them: their spread is no standard error.
            assert (entry["stderrs"][metric] is None) == (metric == "decoder_pw_mcc"), metric
            assert len(entry["final_info_dict"][metric]) == scale.n_seeds >= 3, metric


@pytest.mark.parametrize(("study", "run"), RUNS)
def test_every_run_ends_near_the_same_target_l0s(study, run):
    for target, entry in entries_of(study, run):
        assert entry["means"]["l0"] == pytest.approx(target, rel=0.035)  # of most within 0.02


def test_the_control_is_well_trained_and_beats_the_models_own_best_channel():
    ((_, entry),) = entries_of("laptop", "run_7")
    means = entry["means"]
    assert means["fvu"] <= 0.25
    assert means["probing_top_1"] > means["lm_top_1"]
    assert means["absorption_letters"] >= 20


@pytest.mark.parametrize("run", ("run_1", "run_7"))
def test_the_read_out_check_is_an_entry_of_its_own(run):
    scale = SCALES["laptop"]
    own = title(scale, 8, 36.0)
    assert set(results_of("laptop", run)) == {own} | {title(scale, 8, 36.0, a) for a in (0, 1)}


@pytest.mark.parametrize(("study", "run"), RUNS)
def test_the_training_log_holds_every_step_that_is_kept_once(study, run):
    scale = SCALES[STUDIES[study]]
    lines = (RESULTS / study / run / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for layer in scale.layers:
        steps = [record["step"] for record in records if record["layer"] == layer]
        last = scale.total_steps - 1
        assert steps == sorted({*range(0, scale.total_steps, KEPT.get(study, 1)), last})
