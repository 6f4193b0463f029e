"""Several target L0s in one run: the same SAEs as in runs of their own, named and kept apart."""

import json
from dataclasses import replace

import pytest
import torch
from made_up_runs import LAPTOP, draw, records, usual_entry, words, write_run
from test_ema_and_constraint import batch, trainer_of
from tiny import run_script, tiny_scale

import experiment
from lab.results import title
from lab.runs import arms_of, found_runs


def after(steps: int, run: str, *targets: float):
    trainer = trainer_of(experiment.RUNS[run], target_l0s=targets)
    found = [trainer.step(batch(seed)) for seed in range(steps)]
    return trainer, found


@pytest.mark.parametrize("run", ["run_1", "run_7", "run_8"])
def test_a_seed_is_trained_to_each_target_as_it_is_to_that_target_alone(run):
    both, logged = after(12, run, 4.0, 8.0)
    for i, target in enumerate((4.0, 8.0)):
        alone, records = after(12, run, target)
        rows = slice(2 * i, 2 * i + 2)
        for p, expected in zip(both.sae.parameters(), alone.sae.parameters(), strict=True):
            torch.testing.assert_close(p[rows], expected)
        for line, expected in zip(logged, records, strict=True):
            assert line["l0_target"][rows] == expected["l0_target"]
            torch.testing.assert_close(line["lambda"][rows], expected["lambda"])
    start = both.schedule_at(0)[1]
    assert start == [16.0] * 4
    assert both.schedule_at(both.scale.total_steps - 1)[1] == [4.0, 4.0, 8.0, 8.0]
    assert not torch.allclose(both.sae.b_enc[:2], both.sae.b_enc[2:]), "the targets part them"


def test_a_seed_reads_its_own_rows_whatever_its_target():
    own = torch.stack([batch(1), batch(2)])
    both, apart = trainer_of(experiment.RUNS["run_7"], target_l0s=(4.0, 8.0)), []
    logged = both.step(own)
    for rows in own:
        alone = trainer_of(experiment.RUNS["run_7"], target_l0s=(4.0, 8.0))
        apart.append(alone.step(rows))
    for seed, expected in enumerate(apart):
        for name in ("loss", "mse", "l0", "grad_norm"):
            torch.testing.assert_close(logged[name][seed::2], expected[name][seed::2])
    assert not torch.allclose(logged["mse"], apart[0]["mse"])


def test_the_same_seed_starts_alike_for_every_target():
    trainer, _ = after(0, "run_1", 4.0, 8.0)
    assert torch.equal(trainer.sae.W_dec[:2], trainer.sae.W_dec[2:])
    assert not torch.equal(trainer.sae.W_dec[0], trainer.sae.W_dec[1])


def test_a_run_of_two_targets_has_an_entry_and_saes_of_each(tiny_model, cache, tmp_path):
    scale = tiny_scale(tiny_model, tasks=("sentiment",), target_l0s=(6.0, 12.0))
    process = run_script("--out_dir=run_1", scale=scale, cache=cache, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "run_1/final_info.json").read_text("utf-8"))
    names = ["tiny layer 1, L0 12", "tiny layer 1, L0 6"]
    ends = ["", ", read out with alpha = 0", ", read out with alpha = 1"]
    assert sorted(results) == [name + end for name in names for end in ends]
    saved = sorted(path.name for path in (tmp_path / "run_1/sae").iterdir())
    assert saved == [f"layer_1_l0_{l0}_seed_{s}" for l0 in (12, 6) for s in (0, 1)]
    loose, tight = (results[name] for name in names)
    assert (loose["means"]["l0_target"], tight["means"]["l0_target"]) == (12.0, 6.0)
    log = (tmp_path / "run_1/training_log.jsonl").read_text("utf-8").splitlines()
    last = json.loads(log[-1])
    for entry, rows in ((tight, slice(0, 2)), (loose, slice(2, 4))):
        values = entry["final_info_dict"]
        assert all(len(v) == 2 for v in values.values())
        assert values["online_absorption_full"] == last["online_absorption_full"][rows]
        bench = [found["sae_lens_release_id"] for found in entry["sae_bench"]["sparse_probing"]]
        at = f"l0_{entry['means']['l0_target']:g}_seed_"
        assert [name.split(at)[1][0] for name in bench] == ["0", "1"]
    assert draw(tmp_path).returncode == 0
    assert "FVU ↓" in words(tmp_path / "frontier.svg")


def test_an_entry_is_named_after_its_target_only_where_there_are_several():
    alone = tiny_scale("nowhere")
    assert title(alone, 1, 8.0) == "tiny layer 1"
    assert title(replace(alone, target_l0s=(8.0, 12.5)), 3, 12.5) == "tiny layer 3, L0 12.5"


def test_the_curves_of_an_entry_are_those_of_the_seeds_trained_to_its_target(tmp_path):
    """Two targets, three seeds: the log's six values are split between the entries."""
    log = records(8, seeds=6)  # 0.5, 0.51, ... 0.55
    info = {f"{LAPTOP}, L0 {l0}": usual_entry() for l0 in (18, 36)}
    write_run(tmp_path, "run_1", info, log, target_l0s=[18.0, 36.0])
    runs = found_runs(tmp_path)
    found = arms_of(tmp_path, runs, {}, {"run_1": {}})
    assert list(found) == [f"{LAPTOP}, L0 18", f"{LAPTOP}, L0 36"]
    (low,), (high,) = found.values()
    assert low.series("loss")[1][0] == pytest.approx(0.51)
    assert high.series("loss")[1][0] == pytest.approx(0.54)
    assert low.records[0]["step"] == 0
