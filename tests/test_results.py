"""What is computed from finished SAEs, and how files and cache entries survive interruptions."""

import json
import math
import os
import random
import signal
import statistics
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import lab.fidelity
import lab.folders
import lab.metrics
import lab.results
import lab.scales
import lab.storage

# ── Means and their errors ──────────────────────────────────────────────────────────────────────


def test_mean_sd_and_stderr_have_the_values_worked_out_by_hand():
    values = [1.0, 2.0, 3.0, 4.0]  # squared deviations 2.25 + 0.25 + 0.25 + 2.25
    assert lab.metrics.mean_or_none(values) == 2.5
    assert lab.metrics.sd_or_none(values) == pytest.approx(math.sqrt(5 / 3))
    assert lab.metrics.stderr_or_none(values) == pytest.approx(math.sqrt(5 / 3) / 2)


@pytest.mark.parametrize("name", ["mean_or_none", "sd_or_none", "stderr_or_none"])
@pytest.mark.parametrize("values", [[], [None], [0.1, None, 0.3], [None, None]])
def test_a_missing_value_makes_the_result_missing_and_never_0(name, values):
    assert getattr(lab.metrics, name)(values) is None


def test_one_value_has_a_mean_but_no_spread():
    assert lab.metrics.mean_or_none([0.3]) == 0.3
    assert lab.metrics.sd_or_none([0.3]) is None
    assert lab.metrics.stderr_or_none([0.3]) is None


def test_a_value_of_0_is_not_missing():
    assert lab.metrics.mean_or_none([0.0, 0.0]) == 0.0
    assert lab.metrics.sd_or_none([0.0, 0.0]) == 0.0
    assert lab.metrics.stderr_or_none([0.0, 0.0]) == 0.0


# ── Training-curve stability ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("n", "window"), [(1, 51), (7, 51), (60, 51), (200, 51), (40, 5), (9, 1)])
def test_the_running_median_is_centred_and_cut_at_the_ends(n, window):
    r = random.Random(n)
    values = [r.random() for _ in range(n)]
    slow = []
    for i in range(n):
        near = [values[j] for j in range(n) if abs(i - j) <= window // 2]
        slow.append(statistics.median(near))
    assert lab.metrics.running_median(np.array(values), window).tolist() == pytest.approx(slow)


STEPS = 1000


def smooth_loss() -> np.ndarray:
    return 0.2 + 0.8 * np.exp(-np.arange(STEPS) / 200)


def of_loss(loss) -> dict:
    return lab.metrics.stability(list(loss), [1.0] * len(loss))


def test_a_smooth_curve_has_almost_no_roughness_and_no_spikes():
    found = of_loss(smooth_loss())
    assert found["loss_roughness"] < 2e-3
    assert found["loss_spikes"] == 0
    noisy = of_loss(smooth_loss() * np.exp(0.05 * np.sin(np.arange(STEPS) * 2.0)))
    assert noisy["loss_roughness"] > 10 * found["loss_roughness"]


def test_roughness_is_the_sd_of_log_loss_around_its_running_median():
    loss = np.ones(STEPS)
    loss[600] = math.e  # 799 zeros and a one: variance (1 - 1 / 800) / 799
    assert of_loss(loss)["loss_roughness"] == pytest.approx(1 / math.sqrt(800))
    assert of_loss(7 * loss)["loss_roughness"] == pytest.approx(1 / math.sqrt(800)), "no unit"


def test_spikes_are_steps_over_one_and_a_half_times_the_median():
    loss = smooth_loss()
    loss[[300, 301, 700]] *= 1.6
    loss[[400, 500]] *= 1.4
    assert of_loss(loss)["loss_spikes"] == 3


def test_the_first_fifth_of_training_does_not_count():
    loss, wild = smooth_loss(), smooth_loss()
    # The median of step 200 looks back to step 175.
    wild[:175] *= np.where(np.arange(175) % 2, 1.0, 40.0)
    assert of_loss(wild) == of_loss(loss)
    wild[200] *= 2
    assert of_loss(wild)["loss_spikes"] == 1, "step 200 is the first that counts"


def test_the_variation_of_the_gradient_norm_is_sd_over_mean_of_the_last_four_fifths():
    grads = [1e6, 1e-6] * 100 + [1.0, 3.0] * 400
    found = lab.metrics.stability([1.0] * 1000, grads)["grad_norm_cv"]
    assert found == pytest.approx(math.sqrt(800 / 799) / 2)


def test_stability_of_a_single_step_is_missing_and_not_0():
    assert lab.metrics.stability([1.0], [1.0]) == {
        "loss_roughness": None,
        "loss_spikes": 0.0,
        "grad_norm_cv": None,
    }


# ── Agreement between seeds ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("a", "b", "rho"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 1000], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([1, 2, 3], [2, 3, 1], -0.5),  # 1 - 6 * 6 / (3 * 8)
    ],
)
def test_rank_correlation_is_spearmans(a, b, rho):
    assert lab.metrics.rank_correlation(a, b) == pytest.approx(rho)


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0, 0, 0])]
)
def test_a_rank_correlation_that_means_nothing_is_missing(a, b):
    assert lab.metrics.rank_correlation(a, b) is None


def dictionary(seed: int, n: int = 60, d: int = 12) -> torch.Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def test_a_permuted_and_sign_flipped_dictionary_is_the_same_one():
    W = dictionary(0)
    g = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (60, 1), generator=g) * 2.0 - 1
    turned = signs * W[torch.randperm(60, generator=g)]
    assert lab.metrics.pairwise_mcc(W, turned) == pytest.approx(1.0, abs=1e-5)
    assert lab.metrics.pairwise_mcc(W, dictionary(2)) < 0.9


def test_the_matching_is_one_to_one_and_the_best_one():
    # Greedy would match 0.9 and then 0.1; the best is 0.8 with 0.7.
    cos = torch.tensor([[0.9, 0.8], [-0.7, 0.1]])
    assert lab.metrics.pairwise_mcc(torch.eye(2), cos.T) == pytest.approx(0.75)
    # Every row of one side is nearest to the same row of the other.
    assert lab.metrics.pairwise_mcc(torch.eye(2), torch.tensor([[1.0, 0], [1, 0]])) == 0.5


def test_random_dictionaries_come_near_a_simulated_null():
    from scipy.optimize import linear_sum_assignment

    rng, null = np.random.default_rng(0), []
    for _ in range(10):
        a, b = rng.standard_normal((2, 60, 12))
        cos = abs(a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
        matching = zip(*linear_sum_assignment(-cos), strict=True)
        null.append(sum(cos[i, j] for i, j in matching) / 60)
    found = [lab.metrics.pairwise_mcc(dictionary(2 * i), dictionary(2 * i + 1)) for i in range(10)]
    assert np.mean(found) == pytest.approx(np.mean(null), abs=0.02)
    assert 0.4 < np.mean(null) < 0.7, "far from 0: without its null the number says little"


def test_each_seed_is_compared_with_every_other_one():
    distance = lab.metrics.between_seeds([1, 2, 4], lambda a, b: float(abs(a - b)))
    assert distance == [2.0, 1.5, 2.5]
    assert lab.metrics.between_seeds([1], lambda a, b: 0.0) == [None]
    assert lab.metrics.between_seeds([1, 1, 9], lambda a, b: None if 9 in (a, b) else 1.0) == [
        None,
        None,
        None,
    ]


# ── SAE-Bench's results ─────────────────────────────────────────────────────────────────────────


def probing(top_1: tuple[float, float], top_2: tuple[float, float], **more) -> dict:
    """SAE-Bench's sparse-probing result, as far as it is used, of tasks "code" and "news"."""
    details = [
        {
            "dataset_name": f"{task}_results",
            "sae_top_1_test_accuracy": one,
            "sae_top_2_test_accuracy": two,
        }
        for task, one, two in zip(("code", "news"), top_1, top_2, strict=True)
    ]
    sae = {
        "sae_test_accuracy": 0.95,
        "sae_top_1_test_accuracy": sum(top_1) / 2,
        "sae_top_2_test_accuracy": sum(top_2) / 2,
    }
    llm = {
        "llm_test_accuracy": 0.97,
        "llm_top_1_test_accuracy": 0.6,
        "llm_top_2_test_accuracy": 0.7,
    }
    metrics = {"sae": sae, "llm": llm}
    return {"eval_result_metrics": metrics, "eval_result_details": details, **more}


def absorption(full: dict[str, float], fraction: dict[str, float], **more) -> dict:
    """SAE-Bench's absorption result of some letters; its means are its own, not ours to remake."""
    mean = {
        "mean_full_absorption_score": 0.11,
        "mean_absorption_fraction_score": 0.22,
        "mean_num_split_features": 1.5,
    }
    details = [
        {
            "first_letter": letter,
            "full_absorption_rate": full[letter],
            "mean_absorption_fraction": fraction[letter],
        }
        for letter in full
    ]
    return {"eval_result_metrics": {"mean": mean}, "eval_result_details": details, **more}


def test_probing_metrics_are_sae_benchs_numbers_under_our_names():
    found = lab.metrics.probing_metrics(probing((0.6, 0.8), (0.7, 0.9)), (1, 2))
    assert found == {
        "probing_top_1": pytest.approx(0.7),
        "probing_top_2": pytest.approx(0.8),
        "lm_top_1": 0.6,
        "lm_top_2": 0.7,
        "probing_all_latents": 0.95,
        "lm_all_channels": 0.97,
        "probing_top_1_sd_over_tasks": pytest.approx(0.1 * math.sqrt(2)),
    }


def test_absorption_metrics_are_sae_benchs_means_and_our_sd_over_letters():
    found = lab.metrics.absorption_metrics(absorption({"a": 0.0, "b": 0.2}, {"a": 0.1, "b": 0.5}))
    assert found == {
        "absorption_full": 0.11,
        "absorption_full_sd_over_letters": pytest.approx(0.1 * math.sqrt(2)),
        "absorption_fraction": 0.22,
        "absorption_fraction_sd_over_letters": pytest.approx(0.2 * math.sqrt(2)),
        "absorption_letters": 2.0,
        "absorption_split_latents": 1.5,
    }


def test_missing_absorption_has_the_same_names_and_no_values():
    there = lab.metrics.absorption_metrics(absorption({"a": 0.0}, {"a": 0.1}))
    missing = lab.metrics.absorption_metrics(None)
    assert set(missing) == set(there)
    assert set(missing.values()) == {None}


# ── Results of a layer ──────────────────────────────────────────────────────────────────────────


def scale(n_seeds: int) -> lab.scales.Scale:
    return lab.scales.Scale(
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
            "grad_norm": [1.0 + step % 2 for _ in seeds],
            "online_absorption": [0.1 * (s + 1) for s in seeds] if step == 99 else None,
            "online_full_absorption": [0.0 for _ in seeds] if step == 99 else None,
        }
        for step in range(100)
    ]
    records[50]["loss"][-1] *= 2
    up = dict(zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True))
    down = dict(zip("abcd", (0.4, 0.3, 0.2, 0.1), strict=True))
    eye = torch.eye(6)
    return {
        "scale": scale(n_seeds),
        "records": records,
        "fidelities": [lab.fidelity.Fidelity(0.2 + 0.1 * s, 36.0, 0.0, 0.9) for s in seeds],
        "probing": [probing((0.6 + 0.1 * s, 0.8), (0.7, 0.9), **TIMES, kept=s) for s in seeds],
        "absorption": [absorption((up, up, down)[s], up, **TIMES) for s in seeds],
        "decoders": [(eye, -eye.flip(0), eye.roll(2, 0))[s] for s in seeds],
    }


def test_the_results_of_a_layer_hold_one_value_per_seed_of_everything():
    found = lab.results.layer_results(**made_up())
    values = found["final_info_dict"]
    assert all(len(v) == 3 for v in values.values())
    assert values["fvu"] == pytest.approx([0.2, 0.3, 0.4])
    assert values["probing_top_1"] == pytest.approx([0.7, 0.75, 0.8])
    assert values["loss_spikes"] == [0.0, 0.0, 1.0]
    assert values["loss_roughness"][0] == pytest.approx(0.0, abs=1e-12)
    assert values["grad_norm_cv"][0] == pytest.approx(math.sqrt(80 / 79) * 0.5 / 1.5)
    assert values["online_absorption"] == pytest.approx([0.1, 0.2, 0.3])
    assert values["online_full_absorption"] == [0.0, 0.0, 0.0]
    # Seeds 0 and 1 rank the letters alike, seed 2 the other way round.
    assert values["absorption_full_rank_correlation"] == pytest.approx([0.0, 0.0, -1.0])
    assert values["absorption_fraction_rank_correlation"] == pytest.approx([1.0, 1.0, 1.0])
    assert values["decoder_pw_mcc"] == pytest.approx([1.0, 1.0, 1.0])
    assert all(0.2 < null < 0.95 for null in values["decoder_pw_mcc_null"])


def test_means_and_errors_of_a_layer_come_from_its_values_per_seed():
    found = lab.results.layer_results(**made_up())
    means, stderrs = found["means"], found["stderrs"]
    assert set(means) == set(stderrs)
    assert means["fvu"] == pytest.approx(0.3)
    assert stderrs["fvu"] == pytest.approx(0.1 / math.sqrt(3))
    assert means["loss_spikes"] == pytest.approx(1 / 3)
    assert (means["l0"], stderrs["l0"]) == (36.0, 0.0)
    assert means["probing_top_1_sd_over_seeds"] == pytest.approx(0.05)
    assert stderrs["probing_top_1_sd_over_seeds"] is None
    for name, values in found["final_info_dict"].items():
        assert means[name] == pytest.approx(sum(values) / 3), name


def test_agreement_between_seeds_has_a_mean_and_no_standard_error():
    """Its values are of pairs, and two pairs share a seed."""
    found = lab.results.layer_results(**made_up())
    without = {name for name, error in found["stderrs"].items() if error is None}
    assert without == {
        "decoder_pw_mcc",
        "decoder_pw_mcc_null",
        "absorption_full_rank_correlation",
        "absorption_fraction_rank_correlation",
        "absorption_full_sd_over_seeds",
        "absorption_fraction_sd_over_seeds",
        "probing_top_1_sd_over_seeds",
    }
    assert None not in [found["means"][name] for name in without]


def test_the_results_of_a_layer_keep_what_paired_comparisons_need():
    arguments = made_up()
    found = lab.results.layer_results(**arguments)
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
    assert TIMES.keys() <= arguments["probing"][0].keys(), "the argument is left as it was"
    assert json.loads(lab.storage.json_text(found)) == found


def test_the_results_of_a_layer_are_the_same_every_time():
    before = lab.storage.json_text(lab.results.layer_results(**made_up()))
    torch.manual_seed(3)
    assert lab.storage.json_text(lab.results.layer_results(**made_up())) == before


def test_a_letter_that_one_seed_lacks_is_left_out_of_the_comparison_of_all():
    arguments = made_up()
    arguments["absorption"][2] = absorption(
        {"a": 0.3, "b": 0.2, "c": 0.1}, {"a": 0.1, "b": 0.2, "c": 0.3}
    )
    found = lab.results.layer_results(**arguments)
    assert sorted(found["per_letter"]["absorption_full"]) == list("abc")
    correlation = found["final_info_dict"]["absorption_full_rank_correlation"]
    assert correlation == pytest.approx([0.0, 0.0, -1.0])


def test_absorption_that_could_not_be_measured_is_null_and_nothing_else_is():
    arguments = made_up()
    arguments["absorption"] = [None, None, None]
    for record in arguments["records"]:
        record |= {"online_absorption": None, "online_full_absorption": None}
    found = lab.results.layer_results(**arguments)
    missing = {name for name, mean in found["means"].items() if mean is None}
    assert missing == {name for name in found["means"] if "absorption" in name}
    assert all(found["final_info_dict"][n] == [None] * 3 for n in missing if "over_seeds" not in n)
    assert found["per_letter"] == {"absorption_full": {}, "absorption_fraction": {}}
    assert found["sae_bench"]["absorption"] == [None, None, None]


def test_a_single_seed_has_means_but_no_errors_and_no_agreement():
    found = lab.results.layer_results(**made_up(1))
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
    found = lab.results.readout_results(scale(3), made_up()["probing"])
    assert found["final_info_dict"]["probing_top_1"] == pytest.approx([0.7, 0.75, 0.8])
    assert found["means"]["probing_top_1"] == pytest.approx(0.75)
    assert found["stderrs"]["probing_top_1"] == pytest.approx(0.05 / math.sqrt(3))
    assert found["per_task"]["probing_top_1"]["code"] == pytest.approx([0.6, 0.7, 0.8])


# ── Configurations compared ─────────────────────────────────────────────────────────────────────


def test_equal_configurations_do_not_differ():
    config = {"run": {"ema": True, "alphas": [0.0, 1.0]}, "name": "run_1"}
    assert lab.folders.differences(config, json.loads(json.dumps(config))) == []


def test_every_difference_is_named_with_both_values_and_where_it_stands():
    old = {"run": {"ema": True, "alpha": 0.1}, "name": "run_1", "layers": [3]}
    new = {"run": {"ema": False, "alpha": 0.1}, "name": "run_1", "layers": [3, 4], "more": 7}
    assert lab.folders.differences(old, new) == [
        "layers is [3] there and [3, 4] now",
        "more is 'absent' there and 7 now",
        "run.ema is True there and False now",
    ]
    assert lab.folders.differences({"run": None}, {"run": {"ema": True}}) == [
        "run is None there and {'ema': True} now"
    ]


# ── Files ───────────────────────────────────────────────────────────────────────────────────────


def test_a_number_that_is_not_finite_is_never_written():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            lab.storage.json_text({"loss": value})


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "final_info.json"
    lab.storage.write_atomically(path, "old")
    lab.storage.write_atomically(path, "nëw")
    assert path.read_text(encoding="utf-8") == "nëw"
    assert [p.name for p in tmp_path.iterdir()] == ["final_info.json"], "nothing is left beside it"


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "final_info.json"
    lab.storage.write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        lab.storage.write_atomically(path, "x" * 100_000 + "\ud800")
    assert path.read_text() == "old"

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        lab.storage.write_atomically(path, "new")
    assert path.read_text() == "old"


def in_a_child(action) -> int:
    """Do something in a forked process; returns how it ended: an exit status, or minus a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_me(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_write_that_is_killed_leaves_the_old_file_and_the_next_one_succeeds(tmp_path):
    path = tmp_path / "final_info.json"
    lab.storage.write_atomically(path, "old")

    def killed_while_writing():
        os.fsync = kill_me
        lab.storage.write_atomically(path, "new")

    assert in_a_child(killed_while_writing) == -signal.SIGKILL
    assert path.read_text() == "old"
    lab.storage.write_atomically(path, "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["final_info.json"]
    assert path.read_text() == "newer"


# ── Cache ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Build:
    """Writes two files and counts how often it was asked to."""

    def __init__(self, text: str = "content", fail: BaseException | None = None):
        self.text, self.fail, self.calls = text, fail, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "deep").mkdir()
        (folder / "a.txt").write_text(self.text)
        (folder / "deep" / "b.bin").write_bytes(bytes(range(256)))
        if self.fail:
            raise self.fail


def is_good(entry: Path) -> bool:
    return (entry / "a.txt").read_text() == "content" and (
        entry / "deep" / "b.bin"
    ).read_bytes() == bytes(range(256))


def kept_in(folder: Path) -> list[str]:
    """What stands in a folder of the cache, but for locks."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def test_an_entry_is_built_once_and_stands_where_the_environment_says(cache):
    build = Build()
    entry = lab.storage.cached("kind", {"a": 1, "b": [2]}, build)
    assert entry.parent == cache / "kind"
    assert is_good(entry)
    assert lab.storage.cached("kind", {"b": [2], "a": 1}, build) == entry
    assert build.calls == 1
    assert json.loads((entry / "manifest.json").read_text())["key"] == {"a": 1, "b": [2]}


def test_without_the_environment_the_cache_is_in_the_users_home(monkeypatch, tmp_path):
    monkeypatch.delenv("COSINE_SAE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lab.storage.cache_root() == tmp_path / ".cache" / "cosine-sae"


def test_every_key_and_kind_has_an_entry_of_its_own(cache):
    keys = [("kind", {"a": 1}), ("kind", {"a": 2}), ("kind", {"b": 1}), ("other", {"a": 1})]
    assert len({lab.storage.cached(kind, key, Build()) for kind, key in keys}) == 4


def flip_a_byte(entry: Path) -> None:
    data = bytearray((entry / "deep" / "b.bin").read_bytes())
    data[100] ^= 1
    (entry / "deep" / "b.bin").write_bytes(data)


DAMAGES = {
    "a byte flipped": flip_a_byte,
    "a file truncated": lambda entry: (entry / "a.txt").write_text("cont"),
    "a file emptied": lambda entry: (entry / "deep" / "b.bin").write_bytes(b""),
    "a file missing": lambda entry: (entry / "a.txt").unlink(),
    "a file is a folder": lambda entry: ((entry / "a.txt").unlink(), (entry / "a.txt").mkdir()),
    "manifest missing": lambda entry: (entry / "manifest.json").unlink(),
    "manifest truncated": lambda entry: (entry / "manifest.json").write_text('{"key": {"a'),
    "manifest empty": lambda entry: (entry / "manifest.json").write_bytes(b""),
    "manifest of zero bytes": lambda entry: (entry / "manifest.json").write_bytes(bytes(300)),
    "manifest not text": lambda entry: (entry / "manifest.json").write_bytes(b"\xff\xfe\x80"),
    "manifest of another program": lambda entry: (entry / "manifest.json").write_text('{"v": 1}'),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_entry_is_noticed_reported_and_made_again(cache, damage, capsys):
    build = Build()
    entry = lab.storage.cached("kind", {"a": 1}, build)
    DAMAGES[damage](entry)
    assert lab.storage.cached("kind", {"a": 1}, build) == entry
    assert build.calls == 2
    assert is_good(entry)
    assert f"kind/{entry.name} is damaged" in capsys.readouterr().out
    lab.storage.cached("kind", {"a": 1}, build)
    assert (build.calls, capsys.readouterr().out) == (2, ""), "and is whole again"


@pytest.mark.parametrize("error", [ValueError("half way"), KeyboardInterrupt()])
def test_a_build_that_raises_leaves_nothing_behind(cache, error):
    with pytest.raises(type(error)):
        lab.storage.cached("kind", {"a": 1}, Build(fail=error))
    assert kept_in(cache / "kind") == []
    assert is_good(lab.storage.cached("kind", {"a": 1}, Build())), "the lock was given back"


def test_a_killed_build_is_no_entry_and_what_it_left_is_removed(cache):
    def killed_while_building():
        lab.storage.cached("kind", {"a": 1}, lambda folder: (Build()(folder), kill_me()))

    assert in_a_child(killed_while_building) == -signal.SIGKILL
    (left,) = kept_in(cache / "kind")
    entry = lab.storage.cached("kind", {"a": 1}, Build())
    assert is_good(entry)
    assert left != entry.name, "an entry appears under its name only when it is whole"
    assert kept_in(cache / "kind") == [entry.name]


def test_leftovers_of_another_key_are_left_alone(cache):
    """Its process may still be at work: the lock that says so is the other key's."""
    other = cache / "kind" / "0123456789abcdef.partial-xyz"
    other.mkdir(parents=True)
    lab.storage.cached("kind", {"a": 1}, Build())
    assert other.exists()


def test_two_threads_build_an_entry_once(cache):
    calls, found, ready = [], [], threading.Barrier(2)

    def slow(folder: Path) -> None:
        calls.append(threading.get_ident())
        threading.Event().wait(0.1)
        Build()(folder)

    def ask() -> None:
        ready.wait()
        found.append(lab.storage.cached("kind", {"a": 1}, slow))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(calls) == 1
    assert len(found) == 2 and found[0] == found[1] and is_good(found[0])


def test_two_processes_build_an_entry_once(cache):
    reading, writing = os.pipe()
    mine = Build("of the second process")

    def slow(folder: Path) -> None:
        os.write(writing, b"!")  # it is building
        threading.Event().wait(0.2)
        Build()(folder)

    pid = os.fork()
    if pid == 0:
        try:
            lab.storage.cached("kind", {"a": 1}, slow)
        finally:
            os._exit(0)
    assert os.read(reading, 1) == b"!"
    entry = lab.storage.cached("kind", {"a": 1}, mine)
    os.waitpid(pid, 0)
    os.close(reading)
    os.close(writing)
    assert mine.calls == 0
    assert is_good(entry)
