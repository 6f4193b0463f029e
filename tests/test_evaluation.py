"""An evaluation that is stopped goes on after its finished parts; what is missing says why."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

import experiment
import lab.evaluation
from lab.fidelity import HeldOut
from lab.process import Clock, ExperimentError, Interrupted
from lab.scales import SCALES

# ── Stopped and gone on ─────────────────────────────────────────────────────────────────────────


class Stub:
    """Stands for a part of the evaluation: answers, or is stopped."""

    def __init__(self, answer):
        self.answer, self.calls, self.stopped = answer, 0, False

    def __call__(self, *arguments):
        self.calls += 1
        if self.stopped:
            raise Interrupted(15)
        return self.answer(*arguments)


@pytest.fixture
def parts(evaluated, monkeypatch) -> SimpleNamespace:
    """The two halves of SAE-Bench, with the answers that it gave."""
    probing, absorption = zip(*evaluated.scores, strict=True)
    found = SimpleNamespace(
        probing=Stub(
            lambda *a: (
                {(1, None): list(probing)}
                | {(1, x): [result["sae_bench"] for result in probing[::-1]] for x in a[-2]}
            )
        ),
        absorption=Stub(lambda *_: list(absorption)),
        fidelity=Stub(HeldOut),
    )
    monkeypatch.setattr(lab.evaluation, "evaluate_probing", found.probing)
    monkeypatch.setattr(lab.evaluation, "evaluate_absorption", found.absorption)
    monkeypatch.setattr(lab.evaluation, "HeldOut", found.fidelity)
    return found


def evaluate(
    trained, work: Path, saved: dict[str, Path] | None = None, alphas=(1.0,), **changes
) -> tuple[dict, Path]:
    return lab.evaluation.evaluate(
        replace(trained.scale, **changes), alphas, trained.lm, {1: trained.trainer.units},
        {1: saved or trained.saved}, trained.heldout, trained.records, work, Clock(),
    )  # fmt: skip


def calls(parts) -> list[int]:
    return [parts.fidelity.calls, parts.probing.calls, parts.absorption.calls]


def test_an_evaluation_that_is_stopped_goes_on_after_the_parts_that_are_finished(
    trained, parts, tmp_path
):
    whole, _ = evaluate(trained, tmp_path / "whole")
    assert list(whole) == ["tiny layer 1", "tiny layer 1, read out with alpha = 1"]
    assert calls(parts) == [1, 1, 1]
    for stopped in (parts.fidelity, parts.probing, parts.absorption):
        stopped.stopped = True
        with pytest.raises(Interrupted):
            evaluate(trained, tmp_path / "stopped")
        stopped.stopped = False
    assert calls(parts) == [3, 3, 2], "each that came to its end was done once more, and only once"
    assert evaluate(trained, tmp_path / "stopped")[0] == whole
    assert calls(parts) == [3, 3, 3]
    assert evaluate(trained, tmp_path / "stopped")[0] == whole
    assert calls(parts) == [3, 3, 3]
    values = whole["tiny layer 1"]["final_info_dict"]
    assert 0 < values["fvu"][0] < 2 and len(set(values["fvu"])) == 2


def test_finished_parts_of_other_weights_settings_or_code_are_not_taken_up(
    trained, parts, tmp_path, monkeypatch
):
    _, folder = evaluate(trained, tmp_path)
    folders, n = {folder}, 1
    other_weights = {name[:-1] + "x": path for name, path in trained.saved.items()}
    for change in (
        {"saved": other_weights},
        {"alphas": (0.0, 1.0)},
        {"k_values": (1,)},
        {"heldout_contexts": 32},
    ):
        folders.add(evaluate(trained, tmp_path, **change)[1])
        n += 1
        assert calls(parts) == [n, n, n], change
    monkeypatch.setattr(lab.evaluation, "code_behind", lambda module: "of other code")
    folders.add(evaluate(trained, tmp_path)[1])
    assert calls(parts) == [n + 1] * 3
    assert len(folders) == n + 1, "and SAE-Bench's files lie apart"


# ── Saved SAEs are what was trained ─────────────────────────────────────────────────────────────


def check(trained, saved: dict[str, Path] | None = None, **last) -> None:
    """check_all(), with other values in the last line of the log."""
    records = [*trained.records[:-1], trained.records[-1] | last]
    saes = {1: saved or trained.saved}
    lab.evaluation.check_all(
        trained.scale, trained.lm, [trained.trainer], saes, trained.heldout, records
    )


def test_saes_that_compute_what_was_trained_are_evaluated(trained, capsys):
    check(trained)
    assert "every saved SAE, loaded afresh, computes what was trained" in capsys.readouterr().out


def test_one_saved_sae_with_other_weights_stops_the_evaluation_and_is_named(trained, tmp_path):
    """Those of the moment, where the average was trained to be evaluated."""
    saved = {name: shutil.copytree(p, tmp_path / p.name) for name, p in trained.saved.items()}
    last = list(saved.values())[-1]
    shutil.copyfile(last / "raw.safetensors", last / "sae_weights.safetensors")
    with pytest.raises(ExperimentError, match=f"{last.name} .* what was trained"):
        check(trained, saved)


def test_saes_that_are_far_from_what_the_last_step_logged_stop_the_evaluation(trained):
    """They were trained on something else, or at another alpha, than they will be read with."""
    logged = trained.records[-1]
    with pytest.raises(ExperimentError, match="the last step trained with alpha"):
        check(trained, alpha=[0.5 * value for value in logged["alpha"]])
    for name in ("l0", "mse"):
        for factor in (0.1, 10):
            other = [logged[name][0], factor * logged[name][1]]
            with pytest.raises(ExperimentError, match=f"layer 1, SAE 1: .* logged {name} "):
                check(trained, **{name: other})


def test_the_language_model_reads_each_prompt_and_text_once_for_all_layers(
    tiny_model, tmp_path, monkeypatch
):
    """Before training; and each task's texts are put together once."""
    import lab.bench
    from lab.language_model import LanguageModel, load_language_model

    scale = tiny.tiny_scale(tiny_model, layers=(1, 3), tasks=("sentiment", "news"))
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path / "cache"))
    read, tasks = [], []
    residuals, task_of_pairs = LanguageModel.residuals, lab.bench.task_of_pairs

    def counted(self, tokens):
        read.extend(map(tuple, tokens.tolist()))
        return residuals(self, tokens)

    def put_together(task, *args):
        tasks.append(task)
        return task_of_pairs(task, *args)

    monkeypatch.setattr(LanguageModel, "residuals", counted)
    monkeypatch.setattr(lab.bench, "task_of_pairs", put_together)
    lab.evaluation.prepare(scale, load_language_model(scale))
    assert tasks == list(scale.tasks)
    words = len(lab.bench.first_letter_words(scale, load_language_model(scale)))
    texts = (2 + 4) * (scale.probe_train_set_size + scale.probe_test_set_size) // 2
    assert words + texts - 5 <= len(read) <= words + texts


# ── Before training ─────────────────────────────────────────────────────────────────────────────

NO_TEXT = """
real = lab.packaged_text.probing_task
def with_a_text_of_nothing(*args):
    train, test = real(*args)
    test["Sport"][3] = "</s>"
    return train, test
lab.packaged_text.probing_task = with_a_text_of_nothing
"""


@pytest.mark.parametrize(
    ("changes", "patch", "sentence"),
    [
        ({"absorption_words": 60}, "", "absorption_words=60 gives 60 words of tiny-llama's"),
        ({"tasks": ("news",)}, NO_TEXT, "a probing text of class 'Sport' has no ordinary token"),
        ({"tasks": ("news", "nwes")}, "", "the task 'nwes' is not one of occupation, news,"),
        ({"k_values": (1, 80)}, "", "k_values=(1, 80) asks for probes on more channels than"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_it_costs_a_training(
    tiny_model, tmp_path, changes, patch, sentence
):
    scale = tiny.tiny_scale(tiny_model, **changes)
    process = tiny.run_script(
        "--out_dir=run_7", scale=scale, cache=tmp_path / "cache", cwd=tmp_path, patch=patch
    )
    assert process.returncode == 1
    assert sentence in process.stderr and "Traceback" not in process.stderr
    assert not list((tmp_path / "cache").glob("training/*/*"))


# ── Whole runs ──────────────────────────────────────────────────────────────────────────────────


def test_a_model_that_knows_too_few_letters_gives_null_with_a_reason_and_the_run_finishes(
    tmp_path, monkeypatch, capfd
):
    folder = tiny.make_model(tmp_path / "model", knows_letters=False)
    scale = tiny.tiny_scale(folder, tasks=("sentiment",))
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EXPERIMENT_SCALE", "tiny")
    monkeypatch.setitem(SCALES, "tiny", scale)
    monkeypatch.setitem(experiment.RECIPES, "tiny", tiny.RECIPE)
    with tiny.signals():
        status = experiment.main([f"--out_dir={tmp_path / 'run_7'}"])
    out, err = capfd.readouterr()
    assert (status, err) == (0, "")
    results = json.loads((tmp_path / "run_7" / "final_info.json").read_text())
    entry = results["tiny layer 1"]
    missing = {name for name, value in entry["means"].items() if value is None}
    assert missing >= {"absorption_full", "absorption_fraction", "absorption_letters"}
    assert not missing & {"probing_top_1", "fvu", "l0", "ce_recovered", "decoder_pw_mcc"}
    assert entry["final_info_dict"]["absorption_full"] == [None, None]
    assert re.match(
        r"null: .* 20 letters .* of \d{3,} words as layer 1 of model has them, \d letters do: ",
        entry["notes"]["absorption"],
    )
    assert "absorption_full: null\n" in out
