"""The results of a layer: one value per seed of everything, and what they are summed up to."""

import json
import math

import pytest
import torch
from test_metrics import absorption, probing

from lab.fidelity import Fidelity
from lab.results import layer_results, readout_results
from lab.scales import Scale
from lab.storage import json_text


def scale(n_seeds: int) -> Scale:
    return Scale(
        "tiny",
        "none",
        "sae-probes",
        (0,),
        2048,
        n_seeds=n_seeds,
        k_values=(1, 2),
        tasks=("code", "news"),
    )


TIMES = {"eval_id": "x", "datetime_epoch_millis": 7, "sae_bench_commit_hash": "y"}


def made_up(n_seeds: int = 3) -> dict:
    """Arguments of layer_results(): 100 smooth steps, three seeds that differ where it matters."""
    seeds = range(n_seeds)
    records = [
        {
            "loss": [2.0 + s for s in seeds],
            "mse": [1.0 + s for s in seeds],
            "grad_norm": [1.0 + step % 2 for _ in seeds],
            "online_absorption_fraction": [0.1 * (s + 1) for s in seeds] if step == 99 else None,
            "online_absorption_full": [0.0 for _ in seeds] if step == 99 else None,
        }
        for step in range(100)
    ]
    records[50]["loss"][-1] *= 2
    records[50]["mse"][0] *= math.e
    up = dict(zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True))
    down = dict(zip("abcd", (0.4, 0.3, 0.2, 0.1), strict=True))
    eye = torch.eye(6)
    return {
        "scale": scale(n_seeds),
        "target_l0": 36.0,
        "records": records,
        "fidelities": [Fidelity(0.2 + 0.1 * s, 36.0, 0.0, 0.9) for s in seeds],
        "probing": [probing((0.6 + 0.1 * s, 0.8), (0.7, 0.9), **TIMES, kept=s) for s in seeds],
        "absorption": [absorption((up, up, down)[s], up, **TIMES) for s in seeds],
        "decoders": [(eye, -eye.flip(0), eye.roll(2, 0))[s] for s in seeds],
    }


def test_the_results_of_a_layer_hold_one_value_per_seed_of_everything():
    found = layer_results(**made_up())
    values = found["final_info_dict"]
    assert all(len(v) == 3 for v in values.values())
    assert values["fvu"] == pytest.approx([0.2, 0.3, 0.4])
    assert values["probing_top_1"] == pytest.approx([0.7, 0.75, 0.8])
    assert values["loss_spikes"] == [0.0, 0.0, 1.0]
    assert values["loss_roughness"][0] == pytest.approx(0.0, abs=1e-12)
    # 79 zeros and a one: variance (1 - 1 / 80) / 79
    assert values["mse_roughness"] == pytest.approx([1 / math.sqrt(80), 0.0, 0.0], abs=1e-12)
    assert values["grad_norm_cv"][0] == pytest.approx(math.sqrt(80 / 79) * 0.5 / 1.5)
    assert values["online_absorption_fraction"] == pytest.approx([0.1, 0.2, 0.3])
    assert values["online_absorption_full"] == [0.0, 0.0, 0.0]
    # Seeds 0 and 1 rank the letters alike, seed 2 the other way round.
    assert values["absorption_full_rank_correlation"] == pytest.approx([0.0, 0.0, -1.0])
    assert values["absorption_fraction_rank_correlation"] == pytest.approx([1.0, 1.0, 1.0])
    assert values["decoder_pw_mcc"] == pytest.approx([1.0, 1.0, 1.0])
    assert all(0.2 < null < 0.95 for null in values["decoder_pw_mcc_null"])


def test_means_and_errors_of_a_layer_come_from_its_values_per_seed():
    found = layer_results(**made_up())
    means, stderrs = found["means"], found["stderrs"]
    assert set(means) == set(stderrs)
    assert means["fvu"] == pytest.approx(0.3)
    assert stderrs["fvu"] == pytest.approx(0.1 / math.sqrt(3), rel=5e-4)
    assert means["loss_spikes"] == pytest.approx(1 / 3, rel=5e-4)
    assert (means["l0"], stderrs["l0"]) == (36.0, 0.0)
    assert means["probing_top_1_sd_over_seeds"] == pytest.approx(0.05)
    assert stderrs["probing_top_1_sd_over_seeds"] is None
    for name, values in found["final_info_dict"].items():
        assert means[name] == float(f"{sum(values) / 3:.4g}"), name


def test_what_a_loop_reads_is_short_and_every_digit_is_kept_beside_it():
    """Four significant digits of means and errors; final_info_dict is not rounded."""
    arguments = made_up()
    arguments["fidelities"][0] = Fidelity(0.123456789, 36.0, 0.0, 0.9)
    found = layer_results(**arguments)
    shown = [*found["means"].values(), *found["stderrs"].values()]
    assert all(value is None or value == float(f"{value:.4g}") for value in shown)
    assert found["means"]["fvu"] == 0.2745  # of 0.123456789, 0.3, 0.4
    assert found["stderrs"]["fvu"] == 0.08084  # 0.0808440
    assert found["final_info_dict"]["fvu"][0] == 0.123456789


def test_a_layers_results_say_what_it_was_trained_to():
    found = layer_results(**made_up())
    assert (found["means"]["l0_target"], found["means"]["training_steps"]) == (36.0, 100.0)
    assert (found["stderrs"]["l0_target"], found["stderrs"]["training_steps"]) == (None, None)
    other = made_up() | {"target_l0": 20.0}
    assert layer_results(**other)["means"]["l0_target"] == 20.0


def test_agreement_between_seeds_has_a_mean_and_no_standard_error():
    """Its values are of pairs, and two pairs share a seed."""
    found = layer_results(**made_up())
    without = {name for name, error in found["stderrs"].items() if error is None}
    assert without == {
        "decoder_pw_mcc",
        "decoder_pw_mcc_null",
        "absorption_full_rank_correlation",
        "absorption_fraction_rank_correlation",
        "absorption_full_sd_over_seeds",
        "absorption_fraction_sd_over_seeds",
        "probing_top_1_sd_over_seeds",
        "l0_target",
        "training_steps",
    }
    assert None not in [found["means"][name] for name in without]


def test_the_results_of_a_layer_keep_what_paired_comparisons_need():
    arguments = made_up()
    found = layer_results(**arguments)
    assert found["per_task"]["probing_top_1"] == {
        "code": pytest.approx([0.6, 0.7, 0.8]),
        "news": pytest.approx([0.8, 0.8, 0.8]),
    }
    assert set(found["per_task"]) == {"probing_top_1", "probing_top_2"}
    assert found["per_letter"]["absorption_full"]["a"] == [0.1, 0.1, 0.4]
    assert sorted(found["per_letter"]["absorption_fraction"]) == list("abcd")
    bench = found["sae_bench"]
    assert [p["kept"] for p in bench["sparse_probing"]] == [0, 1, 2]
    assert all(not TIMES.keys() & p.keys() for kind in bench.values() for p in kind)
    assert TIMES.keys() <= arguments["probing"][0]["sae_bench"].keys(), (
        "the argument is left as it was"
    )
    assert json.loads(json_text(found)) == found


def test_the_results_of_a_layer_are_the_same_every_time():
    before = json_text(layer_results(**made_up()))
    torch.manual_seed(3)
    assert json_text(layer_results(**made_up())) == before


def test_a_letter_that_one_seed_lacks_is_left_out_of_the_comparison_of_all():
    arguments = made_up()
    arguments["absorption"][2] = absorption(
        {"a": 0.3, "b": 0.2, "c": 0.1}, {"a": 0.1, "b": 0.2, "c": 0.3}
    )
    found = layer_results(**arguments)
    assert sorted(found["per_letter"]["absorption_full"]) == list("abc")
    correlation = found["final_info_dict"]["absorption_full_rank_correlation"]
    assert correlation == pytest.approx([0.0, 0.0, -1.0])


def test_absorption_that_could_not_be_measured_is_null_and_nothing_else_is():
    arguments = made_up()
    arguments["absorption"] = [{"sae_bench": None, "words": None}] * 3
    for record in arguments["records"]:
        record |= {"online_absorption_fraction": None, "online_absorption_full": None}
    found = layer_results(**arguments)
    missing = {name for name, mean in found["means"].items() if mean is None}
    assert missing == {n for n in found["means"] if "absorption" in n or n.endswith("_on_words")}
    assert all(found["final_info_dict"][n] == [None] * 3 for n in missing if "over_seeds" not in n)
    assert found["per_letter"] == {"absorption_full": {}, "absorption_fraction": {}}
    assert found["sae_bench"]["absorption"] == [None, None, None]


def test_a_single_seed_has_means_but_no_errors_and_no_agreement():
    found = layer_results(**made_up(1))
    assert set(found["stderrs"].values()) == {None}
    assert found["means"]["fvu"] == pytest.approx(0.2)
    missing = {name for name, mean in found["means"].items() if mean is None}
    assert missing == {
        "decoder_pw_mcc",
        "decoder_pw_mcc_null",
        "absorption_full_rank_correlation",
        "absorption_fraction_rank_correlation",
        "absorption_full_sd_over_seeds",
        "absorption_fraction_sd_over_seeds",
        "probing_top_1_sd_over_seeds",
    }


def test_a_read_out_check_has_the_probing_metrics_of_every_seed():
    found = readout_results(scale(3), [p["sae_bench"] for p in made_up()["probing"]])
    assert found["final_info_dict"]["probing_top_1"] == pytest.approx([0.7, 0.75, 0.8])
    assert found["means"]["probing_top_1"] == 0.75
    assert found["stderrs"]["probing_top_1"] == 0.02887  # 0.05 / sqrt(3)
    assert found["per_task"]["probing_top_1"]["code"] == pytest.approx([0.6, 0.7, 0.8])


def test_a_read_out_check_does_not_repeat_what_the_main_entry_says():
    """The language model's own scores do not depend on the SAE."""
    found = readout_results(scale(3), [p["sae_bench"] for p in made_up()["probing"]])
    main = layer_results(**made_up())
    for part in ("means", "stderrs", "final_info_dict"):
        assert {n for n in main[part] if n.startswith("lm_")} == {
            "lm_top_1", "lm_top_2", "lm_all_channels"
        }  # fmt: skip
        assert set(found[part]) == {
            "probing_top_1", "probing_top_2", "probing_top_1_sd_over_tasks"
        }  # fmt: skip
    assert "on 1, 2 latents" in found["notes"]["read_out"]
