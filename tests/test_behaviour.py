"""The command line and the files of a run: the real script, each time in a process of its own."""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import RECIPE

import experiment
from lab.folders import chosen_run
from lab.identity import experiment_fingerprint, laboratory_fingerprint
from lab.process import ExperimentError, Interrupted
from lab.results import without_times
from lab.scales import SCALES
from lab.storage import file_sha256, remembered

ENTRY = "tiny layer 1"


@pytest.fixture
def run(scale, cache, tmp_path):
    """run_script() with this module's scale and cache, in an empty folder."""

    def start(*arguments: str, **changes) -> subprocess.CompletedProcess:
        return tiny.run_script(
            *arguments, **{"scale": scale, "cache": cache, "cwd": tmp_path} | changes
        )

    return start


@pytest.fixture(autouse=True)
def no_work_is_left(cache):
    """Unfinished work is taken up by whoever asks for the same training, in any folder."""
    yield
    shutil.rmtree(cache / "training", ignore_errors=True)


@pytest.fixture(scope="module")
def finished(scale, cache, tmp_path_factory) -> SimpleNamespace:
    """A finished run_1, and what the process printed."""
    folder = tmp_path_factory.mktemp("finished")
    process = tiny.run_script("--out_dir=run_1", scale=scale, cache=cache, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert not list((cache / "training").glob("*/")), "what was needed of its work was copied"
    results = json.loads((folder / "run_1" / "final_info.json").read_text())
    return SimpleNamespace(
        folder=folder / "run_1", process=process, results=results, files=tiny.tree(folder)
    )


def assert_refused(process: subprocess.CompletedProcess, *said: str) -> None:
    """Exit status not 0, and the error is all there is on the last line of stderr."""
    assert process.returncode not in (0, None)
    last = process.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ")
    for words in said:
        assert words in last
    assert "Traceback" not in process.stderr


# Choosing a run.


def test_run_0_is_refused_and_its_files_stay(run, tmp_path):
    (tmp_path / "run_0").mkdir()
    (tmp_path / "run_0" / "final_info.json").write_text("{}")
    before = tiny.tree(tmp_path)
    assert_refused(run(f"--out_dir={tmp_path}/x/../run_0/"), "run_0 holds the given baseline")
    assert tiny.tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "--out_dir is missing"), (["--out_dir=run_11"], "'run_11' is not a row of RUNS")],
)
def test_a_missing_or_unknown_run_lists_the_runs_and_creates_nothing(
    run, tmp_path, arguments, said
):
    process = run(*arguments)
    assert_refused(process, said)
    for name, row in experiment.RUNS.items():
        assert re.search(rf"^  {name} +{re.escape(row.title)}$", process.stderr, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out_dir", ["", ".", "..", "/", "run_1/sae", "run_01", "RUN_1", "run_1 "])
def test_only_the_last_part_of_out_dir_names_the_run(out_dir):
    titles = {name: run.title for name, run in experiment.RUNS.items()}
    for path in ("run_3", "./run_3/", "/tmp/a b/run_3//", "x/../run_3", "run_1/run_3"):
        assert chosen_run(titles, [f"--out_dir={path}"]) == (Path(path), "run_3")
    with pytest.raises(ExperimentError, match="the runs:"):
        chosen_run(titles, [f"--out_dir={out_dir}"])


def test_there_is_no_other_argument(run, tmp_path):
    process = run("--out_dir=run_1", "--seed=1")
    assert process.returncode != 0
    assert "unrecognized arguments: --seed=1" in process.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scale_is_an_error_naming_the_scales(run, tmp_path):
    process = run("--out_dir=run_1", EXPERIMENT_SCALE="huge")
    assert_refused(process, "EXPERIMENT_SCALE='huge' is not one of", *SCALES)
    assert list(tmp_path.iterdir()) == []


def test_an_out_dir_that_is_a_file_is_refused_and_stays(run, tmp_path):
    (tmp_path / "run_1").write_text("mine")
    assert_refused(run("--out_dir=run_1"), "run_1 is a file")
    assert (tmp_path / "run_1").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["run_1"]


def test_a_folder_that_cannot_be_made_is_one_clear_sentence(run, tmp_path):
    """Root may write anywhere, but not even root into a folder below a file."""
    (tmp_path / "file").write_text("mine")
    process = run("--out_dir=file/run_1")
    assert_refused(process, "file/run_1", "fix the folder, then run the same command again")
    assert len(process.stderr.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("bytes_allowed", "said", "written"),
    [
        (10_000, "File too large at run_7/experiment.py", {"config.json"}),
        (300_000, "/partial", {"config.json", "experiment.py"}),
    ],
    ids=["at the script", "at the weights"],
)
def test_a_full_disk_is_one_clear_sentence_wherever_it_fills_up(
    run, scale, finished, cache, tmp_path, bytes_allowed, said, written
):
    """No file of this process may grow beyond a limit: writing more fails as on a full disk.

    `finished` has filled the cache.
    """
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_allowed},) * 2)"
    wide = replace(scale, d_sae=1024)  # weights of 528 kB
    process = run("--out_dir=run_7", patch=limit, scale=wide)
    assert_refused(process, said, "free space", "run the same command again")
    assert len(process.stderr.splitlines()) == 1
    folder, logs = tmp_path / "run_7", list(cache.glob("training/*/training_log.jsonl"))
    assert not (folder / "final_info.json").exists()
    assert len(logs) == ("experiment.py" in written)
    for path in (*logs, *(folder / name for name in written)):
        assert 0 < path.stat().st_size <= bytes_allowed
    json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ExperimentError("mend this"), 1, "error: mend this"),
        (
            OSError(28, "No space left on device", "run_7/x"),
            1,
            "No space left on device at run_7/x",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            1,
            "error: a file could not be written: free space",
        ),
        (ConnectionError("no route"), 1, "error: no route: check the network"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "the GPU's memory is full"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            1,
            "error: memory is full: free some",
        ),
        (MemoryError(), 1, "error: memory is full: free some"),
        (Interrupted(signal.SIGTERM), 75, "error: stopped by SIGTERM: run the same"),
        (Interrupted(signal.SIGINT), 130, "error: stopped by SIGINT: run the same"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_ends_a_run_in_the_laboratory_is_one_line_on_stderr_and_a_status_of_its_own(
    error, status, said, tmp_path, monkeypatch, capfd
):
    """test_process.py has what the experiment's own code raises."""

    def fails() -> None:
        raise error

    monkeypatch.setattr(experiment, "execute", lambda *_: remembered(tmp_path / "part", fails))
    monkeypatch.setenv("EXPERIMENT_SCALE", "laptop")
    with tiny.signals():
        assert experiment.main([f"--out_dir={tmp_path / 'run_7'}"]) == status
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert said in err
    if status != 1 or not isinstance(error, ExperimentError):
        assert "run the same command again" in err


@pytest.mark.parametrize(
    "error", ["OSError(2, 'No such file or directory', 'x.pt')", "ConnectionError('no route')"]
)
def test_an_error_of_the_experimenters_own_keeps_its_traceback_and_gets_no_advice(
    run, finished, tmp_path, error
):
    edited = script_with(
        tmp_path, "experiment.py", "        self.optimizer.step\\(\\)\n",
        f"        raise {error}  # their own line\n",
    )  # fmt: skip
    process = run("--out_dir=run_7", script=edited.parent, quick=True)
    assert process.returncode == 1
    assert "Traceback" in process.stderr and "# their own line" in process.stderr
    assert process.stderr.splitlines()[-1].startswith(
        ("FileNotFoundError: [Errno 2]", "ConnectionError: no route")
    )
    for advice in ("free space", "network", "run the same command"):
        assert advice not in process.stderr


# A budget or a text that is too small.


def script_with(tmp_path: Path, file: str, old: str, new: str) -> Path:
    """A copy of the script and its laboratory with a value of one file edited, as a user would."""
    folder = tmp_path / "edited"
    shutil.copytree(tiny.ROOT / "lab", folder / "lab")
    script = Path(shutil.copy(experiment.__file__, folder))
    source = (folder / file).read_text()
    assert len(re.findall(old, source)) == 1
    (folder / file).write_text(re.sub(old, new, source))
    return script


def test_a_token_budget_below_one_batch_is_an_error_before_any_work(tmp_path):
    own = f"training_tokens={SCALES['laptop'].training_tokens:_},"
    script = script_with(tmp_path, "lab/scales.py", own, "training_tokens=2047,")
    process = subprocess.run(
        [sys.executable, str(script), "--out_dir=run_1"],
        cwd=tmp_path,
        env=os.environ
        | {"EXPERIMENT_SCALE": "laptop", "COSINE_SAE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode != 0
    last = process.stderr.splitlines()[-1]
    assert "training_tokens=2047 is below one batch of 2048" in last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edited"]


def test_a_text_that_ends_before_training_does_is_an_error_and_no_result(run, finished, tmp_path):
    # The first is held out, two are each lane's: not quite two blocks of 8 batches.
    few = "['The film was good and the news was not. ' * 60] * 9"
    # PROSE is in the key of the cached documents.
    patch = f"room.PROSE = (0,); room.training_documents = lambda scale: {few}"
    patch = f"import lab.packaged_text as room; {patch}"
    process = run("--out_dir=run_7", patch=patch)
    assert_refused(process, "the text of scale 'tiny'", "lower training_tokens or add text")
    assert re.search(r"ended after 1[45] of 20 steps", process.stderr)
    assert not (tmp_path / "run_7" / "final_info.json").exists()
    process = run("--out_dir=run_7", patch=patch.replace("* 9", "* 4").replace("(0,)", "(1,)"))
    assert_refused(process, "is shorter than one block of 64 contexts", "add text")


# The files of a run.


def test_a_run_writes_the_files_of_the_contract_and_no_others(finished, scale):
    written = {
        str(p.relative_to(finished.folder)) for p in finished.folder.rglob("*") if p.is_file()
    }
    written.discard(".lock")
    config = json.loads((finished.folder / "config.json").read_text())
    seeds = [f"layer_1_seed_{seed}" for seed in range(scale.n_seeds)]
    sums = {seed: config["sha256"][f"sae/{seed}/sae_weights.safetensors"] for seed in seeds}
    names = [f"run_1_{seed}_{digest[:12]}" for seed, digest in sums.items()]
    end = "_custom_sae_eval_results.json"
    expected = {"final_info.json", "config.json", "experiment.py", "training_log.jsonl"}
    expected |= {"features.jsonl", "features.html"}
    expected |= {
        f"sae/{seed}/{file}"
        for seed in seeds
        for file in ("sae_weights.safetensors", "raw.safetensors", "cfg.json")
    }
    expected |= {f"eval/absorption/{name}{end}" for name in names}
    expected |= {f"eval/sparse_probing/{name}{end}" for name in names}
    assert written == expected | {"eval/sae_bench.log"}
    beside = {p.name for p in finished.folder.parent.iterdir()} - {finished.folder.name}
    assert beside == {"results.tsv"}
    (line,) = (finished.folder.parent / "results.tsv").read_text().splitlines()[1:2]
    assert line.split("\t")[:3] == ["run_1", config["run"]["title"], "tiny layer 1"]


def test_the_snapshot_is_the_script_as_it_ran(finished):
    assert (finished.folder / "experiment.py").read_bytes() == Path(
        experiment.__file__
    ).read_bytes()


def test_the_config_records_every_value_that_ran(finished, scale):
    config = json.loads((finished.folder / "config.json").read_text())
    assert config["run_name"] == "run_1"
    assert config["run"] == json.loads(json.dumps(asdict(experiment.RUNS["run_1"])))
    assert config["recipe"] == asdict(RECIPE)
    assert config["scale"] == json.loads(json.dumps(asdict(scale)))
    assert config["experiment"] == experiment_fingerprint(finished.folder / "experiment.py")
    assert config["laboratory"] == laboratory_fingerprint()
    assert config["total_steps"] == scale.total_steps == 20
    assert config["ema_horizon_steps"] == experiment.ema_horizon(scale, RECIPE)
    assert config["processes"] == 1
    assert config["language_model"]["device"] in ("cuda", f"cpu {config['processor']}")
    assert config["versions"]["torch"] == torch.__version__
    assert None not in config["versions"].values()
    assert config["seconds"]["total"] > 0


def test_the_config_holds_the_sums_of_all_other_files(finished):
    files = {str(p.relative_to(finished.folder)) for p in finished.folder.rglob("*") if p.is_file()}
    sums = json.loads((finished.folder / "config.json").read_text())["sha256"]
    assert sums.keys() == files - {".lock", "config.json"}
    for name, digest in sums.items():
        assert file_sha256(finished.folder / name) == digest, name


def test_the_log_has_a_line_per_step_with_a_number_per_seed(finished, scale):
    lines = (finished.folder / "training_log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records] == list(range(scale.total_steps))
    per_seed = ("loss", "mse", "l1", "l0", "lambda", "alpha", "ema_decay", "grad_norm", "dead")
    per_seed += ("l0_target",)
    for r in records:
        assert r["layer"] == 1
        assert r["tokens_per_second"] > 0
        for key in per_seed:
            assert len(r[key]) == scale.n_seeds, key
            assert all(math.isfinite(v) for v in r[key]), key
        for s in range(scale.n_seeds):
            assert r["loss"][s] == pytest.approx(
                r["mse"][s] + r["lambda"][s] * r["l1"][s], rel=1e-5
            )
    for key, steps in (("l0_heldout", [0, 10, 19]), ("online_absorption_full", [0, 5, 10, 15, 19])):
        assert [r["step"] for r in records if r[key] is not None] == steps
    measured = [r["step"] for r in records if r["online_absorption_fraction"] is not None]
    assert measured == steps
    assert all(len(r["online_absorption_full"]) == 2 for r in records if r["step"] in measured)
    assert records[0]["alpha"] == pytest.approx([0.1] * 2)
    assert records[-1]["alpha"] == pytest.approx([0.9] * 2)
    assert records[0]["loss"][0] != records[0]["loss"][1]  # seeds are different SAEs


def test_the_raw_weights_beside_the_average_are_other_weights(finished):
    for seed in (0, 1):
        folder = finished.folder / "sae" / f"layer_1_seed_{seed}"
        average, raw = (load_file(folder / f"{n}.safetensors") for n in ("sae_weights", "raw"))
        own = experiment.BlendedSAE(experiment.RUNS["run_1"], RECIPE, 64, 96).state_dict()
        shapes = {f"trained.{name}": value.shape for name, value in own.items()}
        for weights in (average, raw):
            assert {name: value.shape for name, value in weights.items()} == shapes
        assert not average["trained.W_enc"].equal(raw["trained.W_enc"])


ASKED = ("l0_target", "training_steps")


def test_final_info_follows_the_ai_scientist_contract(finished):
    means = {k: v["means"] for k, v in finished.results.items()}
    assert list(means) == [
        ENTRY,
        f"{ENTRY}, read out with alpha = 0",
        f"{ENTRY}, read out with alpha = 1",
    ]
    for title, entry in finished.results.items():
        for metric, mean in means[title].items():
            assert mean is None or isinstance(mean, float), metric
            error = entry["stderrs"][metric]
            values = entry["final_info_dict"].get(metric)
            for shown in (mean, error):
                assert shown is None or float(f"{shown:.4g}") == shown, "short for who reads it"
            if values is None:  # spread over seeds, or what was asked for: one number for all
                assert metric.endswith("_sd_over_seeds") or metric in ASKED
                assert error is None
                continue
            assert len(values) == 2
            pairs = metric.startswith("decoder_pw_mcc") or metric.endswith("rank_correlation")
            if None in values:
                assert mean is error is None
                continue
            assert mean == pytest.approx(sum(values) / 2, rel=5e-4)
            if pairs:  # they share seeds: their spread says nothing
                assert error is None
            else:
                # sd(ddof=1) / sqrt(2) of two values is half their distance.
                half = abs(values[0] - values[1]) / 2
                assert error == pytest.approx(half, rel=5e-4, abs=1e-12)
    main, *read_outs = means.values()
    assert {name: main[name] for name in ASKED} == {"l0_target": 8, "training_steps": 20}
    for read_out in read_outs:
        assert set(read_out) == {"probing_top_1", "probing_top_2", "probing_top_1_sd_over_tasks"}


def test_a_run_has_every_metric_of_the_design(finished):
    means = finished.results[ENTRY]["means"]
    expected = "loss_roughness mse_roughness loss_spikes grad_norm_cv fvu l0 dead ce_recovered "
    expected += "absorption_full absorption_fraction absorption_letters decoder_pw_mcc "
    expected += "decoder_pw_mcc_null absorption_fraction_rank_correlation l0_target "
    expected += "online_absorption_fraction online_absorption_full training_steps "
    expected += "probing_top_1 probing_top_2 lm_top_1 lm_all_channels probing_top_1_sd_over_tasks "
    expected += "absorption_full_sd_over_letters absorption_full_sd_over_seeds"
    assert not set(expected.split()) - means.keys()
    assert all(means[name] is not None for name in expected.split())
    assert means["absorption_letters"] >= 20
    assert 0 < means["fvu"] < 1.5
    assert 0 < means["l0"] <= 96
    per_task = finished.results[ENTRY]["per_task"]["probing_top_1"]
    assert set(per_task) == {"sentiment", "news"}
    assert all(len(values) == 2 for values in per_task.values())


def test_final_info_carries_sae_benchs_results_as_its_files_hold_them(finished):
    held = finished.results[ENTRY]["sae_bench"]
    for kind in ("sparse_probing", "absorption"):
        files = sorted((finished.folder / "eval" / kind).glob("*[0-9a-f]_custom_sae*.json"))
        on_disk = [without_times(json.loads(f.read_text())) for f in files]
        assert [r["eval_result_metrics"] for r in on_disk] == [
            r["eval_result_metrics"] for r in held[kind]
        ]


def test_the_summary_stands_last_on_stdout_and_nothing_on_stderr(finished):
    assert finished.process.stderr == ""
    out = finished.process.stdout
    assert out.startswith("scale tiny: run_1, the method")
    summary = out.split("\n---\n")[1].splitlines()
    assert summary[0] == f"run: run_1, {experiment.RUNS['run_1'].title}"
    pairs = [line.split(": ", 1) for line in summary]
    assert [value for name, value in pairs if name == "entry"] == list(finished.results)
    for title, entry in finished.results.items():
        after = pairs[pairs.index(["entry", title]) + 1 :]
        shown = dict(after[: len(entry["means"])])
        assert shown.keys() == entry["means"].keys()
        for metric, mean in entry["means"].items():
            value = shown[metric].split(" +- ")[0]
            assert value == "null" if mean is None else float(value) == mean
    assert "differences to run_7: none, it has not been run beside this one" in summary
    assert summary[-1].startswith("seconds total: ")


# The same command again.


def test_a_finished_run_says_so_and_touches_nothing(run, finished):
    process = run("--out_dir=run_1", cwd=finished.folder.parent)
    assert (process.returncode, process.stderr) == (0, "")
    assert "run_1 is finished (final_info.json is there): nothing to do" in process.stdout
    assert tiny.tree(finished.folder.parent) == finished.files


def test_another_configuration_names_what_differs_and_touches_nothing(run, finished, scale):
    changes = {
        "scale": replace(scale, layers=(2,), k_values=(1, 2, 5)),
        "recipe": replace(RECIPE, learning_rate=0.007),
    }
    process = run("--out_dir=run_1", cwd=finished.folder.parent, **changes)
    assert_refused(
        process,
        "recipe.learning_rate is 0.003 there and 0.007 now",
        "scale.layers is [1] there and [2] now",
        "scale.k_values is [1, 2] there and [1, 2, 5] now",
    )
    assert tiny.tree(finished.folder.parent) == finished.files


def edited_laboratory(folder: Path, room: str = "", text: str = "", script: str = "") -> Path:
    """A folder with a copy of experiment.py and lab/, and something added at the end of a room, or
    of the script."""
    shutil.copytree(tiny.ROOT / "lab", folder / "lab", ignore=lambda *_: ["__pycache__"])
    shutil.copy(experiment.__file__, folder)
    for file, added in ((folder / "lab" / room, text), (folder / "experiment.py", script)):
        if added:
            with file.open("a") as opened:
                opened.write(added)
    return folder


@pytest.mark.parametrize(
    ("room", "text", "script", "changed"),
    [
        ("fidelity.py", "\nunused = 1\n", "", "lab/"),
        ("process.py", "\nunused = 1\n", "", "lab/"),
        ("new_room.py", "unused = 1\n", "", "lab/"),
        ("", "", "\nunused = 1\n", "experiment.py (it was run_1/experiment.py)"),
        (
            "seeds.py",
            "\nunused = 1\n",
            "\nunused = 1\n",
            "experiment.py (it was run_1/experiment.py) and lab/",
        ),
        ("fidelity.py", "\n# A comment.\n", "\n# Another.\n", None),
        ("report.py", "\nunused = 1\n", "", None),  # shows what runs wrote, and no run uses it
    ],
)
def test_a_finished_run_of_other_code_is_refused_and_says_which_changed(
    run, finished, tmp_path, room, text, script, changed
):
    edited = edited_laboratory(tmp_path, room, text, script)
    process = run("--out_dir=run_1", cwd=finished.folder.parent, script=edited)
    if changed:
        assert process.returncode == 1
        said = f"the code has changed since run_1 was begun: {changed}"
        assert_refused(process, said, "delete or rename the folder, or undo the change")
    else:
        assert (process.returncode, process.stderr) == (0, "")
        assert "run_1 is finished (final_info.json is there): nothing to do" in process.stdout
    assert tiny.tree(finished.folder.parent) == finished.files


def test_a_foreign_config_is_an_error_and_stays(run, tmp_path):
    (tmp_path / "run_1").mkdir()
    (tmp_path / "run_1" / "config.json").write_text('{"theirs": 1')
    assert_refused(run("--out_dir=run_1"), "config.json is not a configuration this program wrote")
    assert (tmp_path / "run_1" / "config.json").read_text() == '{"theirs": 1'


def test_results_of_another_program_are_refused_and_stay(run, tmp_path):
    """A folder this program wrote has a config.json from its first moment on."""
    for name in ("final_info.json", "sae/mine.txt", "eval/mine.txt"):
        (tmp_path / "run_1" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run_1" / name).write_text("theirs")
    before = tiny.tree(tmp_path)
    patch = "experiment.load_language_model = lambda scale: sys.exit('work has begun')"
    assert_refused(run("--out_dir=run_1", patch=patch), "run_1", "config.json")
    assert tiny.tree(tmp_path) == before


# Stopped, and the same command again.

SIGNAL_AT = """
import os, signal
real = {where}
def stopped(*arguments, **named):
    if {when}:
        os.kill(os.getpid(), signal.{name})
    return real(*arguments, **named)
{where} = stopped
"""
AGAIN = "run the same command again to go on from where it stood"


def assert_stopped(process: subprocess.CompletedProcess, status: int, name: str) -> None:
    assert process.stderr.splitlines() == [f"error: stopped by {name}: {AGAIN}"]
    assert process.returncode == status


def log_of(folder: Path) -> list[dict]:
    """The training log less its speeds, which no two executions share."""
    records = [json.loads(line) for line in (folder / "training_log.jsonl").open()]
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


@pytest.fixture(scope="module", params=["its folder kept", "its folder removed"])
def interrupted(request, scale, cache, finished, tmp_path_factory) -> SimpleNamespace:
    """run_1 by three executions: stopped in training, stopped (or killed) in its evaluation, and to
    its end; where its folder is removed, by a caller that deletes what did not finish.

    After each, `left` are the files of the run's folder, and `work` those of its work.
    """
    folder, removed = tmp_path_factory.mktemp("interrupted"), request.param == "its folder removed"
    in_step = SIGNAL_AT.format(
        where="experiment.Trainer.step", when="arguments[0].steps_done == 7", name="SIGTERM"
    )
    in_absorption = SIGNAL_AT.format(
        where="lab.evaluation.evaluate_absorption",
        when="True",
        name="SIGKILL" if removed else "SIGINT",
    )
    never_again = (
        "experiment.Trainer.step = lab.evaluation.HeldOut = lab.evaluation.evaluate_probing = "
        "lambda *_: sys.exit('it was finished')"
    )
    found = SimpleNamespace(
        folder=folder / "run_1", removed=removed, processes=[], left=[], work=[]
    )
    for patch in (in_step, in_absorption, never_again):
        how = {"scale": scale, "cache": cache, "cwd": folder, "patch": patch}
        found.processes.append(tiny.run_script("--out_dir=run_1", **how))
        found.left.append(set(tiny.tree(found.folder)))
        found.work.append({name.split("/", 1)[1] for name in tiny.tree(cache / "training")})
        if removed and patch != never_again:
            shutil.rmtree(found.folder)
    return found


def test_sigterm_stops_with_75_and_ctrl_c_with_130_and_one_line_that_says_how_to_go_on(interrupted):
    first, second, third = interrupted.processes
    assert_stopped(first, 75, "SIGTERM")
    if interrupted.removed:
        assert (second.returncode, second.stderr) == (-signal.SIGKILL, "")
    else:
        assert_stopped(second, 130, "SIGINT")
    assert (third.returncode, third.stderr) == (0, ""), "no step and no finished part once more"
    assert "going on from the checkpoint of step 8" in second.stdout
    assert "going on from the checkpoint of step 20" in third.stdout


def test_the_work_of_a_stopped_run_lies_in_the_cache_and_that_of_a_finished_one_nowhere(
    interrupted, finished
):
    begun = {"config.json", "experiment.py"}
    assert interrupted.left[:2] == [begun, begun]
    first, second, third = interrupted.work
    (checkpoint,) = first - {"identity.json", "training_log.jsonl"}
    assert checkpoint.startswith("step_00000008_")
    evaluated = {name.split("/", 1)[1] for name in second if name.startswith("evaluated_")}
    parts = {name for name in evaluated if not name.startswith("eval/")}
    assert parts == {"fidelity_layer_1.json", "sparse_probing.json"}
    results = {f"run_1/{name}" for name in evaluated - parts}
    assert results < set(finished.files), "SAE-Bench's files, as they will be copied"
    assert len([name for name in second if name.startswith("step_")]) == 2
    assert len([name for name in second if name.startswith("sae/")]) == 2 * 3
    assert third == set()


def test_a_run_that_was_stopped_twice_ends_with_the_bytes_of_one_that_never_was(
    interrupted, finished
):
    assert tiny.tree(interrupted.folder).keys() == {
        name.removeprefix("run_1/") for name in finished.files if name != "results.tsv"
    }
    for path in ("final_info.json", "experiment.py", "sae/layer_1_seed_1/sae_weights.safetensors"):
        assert (interrupted.folder / path).read_bytes() == (finished.folder / path).read_bytes()
    assert log_of(interrupted.folder) == log_of(finished.folder)


def test_a_signal_before_training_leaves_a_folder_that_the_same_command_accepts(run, tmp_path):
    """In the middle of loading, where there is nothing to keep."""
    early = SIGNAL_AT.format(where="experiment.load_language_model", when="True", name="SIGTERM")
    for _ in range(2):
        assert_stopped(run("--out_dir=run_7", patch=early), 75, "SIGTERM")
    left = {p.name for p in (tmp_path / "run_7").iterdir()}
    assert left == {".lock", "config.json", "experiment.py"}


@pytest.fixture
def stop(run, cache, tmp_path) -> Callable[[], SimpleNamespace]:
    """Stops run_7 in its training; returns what that left."""

    def stopped() -> SimpleNamespace:
        in_step = SIGNAL_AT.format(
            where="experiment.Trainer.step", when="arguments[0].steps_done == 2", name="SIGTERM"
        )
        assert_stopped(run("--out_dir=run_7", patch=in_step), 75, "SIGTERM")
        (work,) = (cache / "training").glob("*/")
        return SimpleNamespace(
            folder=tmp_path / "run_7", files=tiny.tree(tmp_path), work=work, held=tiny.tree(work)
        )

    return stopped


@pytest.fixture
def stopped(stop) -> SimpleNamespace:
    return stop()


def test_another_configuration_or_code_does_not_take_up_what_the_first_left(
    run, stopped, cache, tmp_path
):
    """It is refused; where the folder is gone it begins anew, beside what the first left."""
    changed = {"recipe": replace(RECIPE, gate_init=0.3)}
    process = run("--out_dir=run_7", **changed)
    assert_refused(process, "recipe.gate_init is 0.2 there and 0.3 now")
    for room, script in (("language_model.py", ""), ("", "\nunused = 1\n")):
        name = "lab/" if room else "experiment.py (it was run_7/experiment.py)"
        where = tmp_path / ("edited lab" if room else "edited experiment")
        edited = edited_laboratory(where, room, "\nunused = 1\n" * bool(room), script)
        process = run("--out_dir=run_7", script=edited)
        assert process.returncode == 1
        assert_refused(process, f"the code has changed since run_7 was begun: {name}.")
    kept = {n: f for n, f in tiny.tree(tmp_path).items() if not n.startswith("edited")}
    assert (kept, tiny.tree(stopped.work)) == (stopped.files, stopped.held)

    shutil.rmtree(stopped.folder)
    for i, how in enumerate((changed, {"script": tmp_path / "edited experiment"}), 1):
        process = run(f"--out_dir={i}/run_7", **how, quick=True)
        assert (process.returncode, process.stderr) == (0, "")
        assert "going on from" not in process.stdout
    assert [*(cache / "training").glob("*/")] == [stopped.work]
    assert tiny.tree(stopped.work) == stopped.held
    process = run("--out_dir=elsewhere/run_7", quick=True)
    assert "going on from the checkpoint of step 3" in process.stdout


def test_an_edit_of_what_only_scores_keeps_the_training(run, stopped, scale, tmp_path):
    """Once the folder is gone: its numbers would be of two kinds of code."""
    shutil.rmtree(stopped.folder)
    edited = edited_laboratory(tmp_path / "edited", "fidelity.py", "\nunused = 1\n")
    other = replace(scale, k_values=(1,))
    process = run("--out_dir=run_7", script=edited, scale=other, quick=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert "going on from the checkpoint of step 3" in process.stdout


def test_a_second_process_with_the_same_work_stops_with_an_error(run, stopped, tmp_path):
    """In a folder of its own: what it would train is the same."""
    with stopped.work.with_name(f"{stopped.work.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = run("--out_dir=other/run_7")
        assert process.returncode == 1
        assert_refused(process, "another process is training the same run", "wait for it")
    assert tiny.tree(stopped.work) == stopped.held


def test_a_finished_run_leaves_the_work_of_the_same_run_in_another_folder_alone(run, stop):
    """It may be somebody's who is training at this moment."""
    process = run("--out_dir=elsewhere/run_7", quick=True)
    assert (process.returncode, process.stderr) == (0, "")
    stopped = stop()
    process = run("--out_dir=elsewhere/run_7", quick=True)
    assert "is finished (final_info.json is there): nothing to do" in process.stdout
    assert tiny.tree(stopped.work) == stopped.held


@pytest.fixture(scope="module")
def again(scale, finished, tmp_path_factory) -> SimpleNamespace:
    """The same command with an empty cache, in a folder where an execution was killed.

    Its leftovers are damaged; the path is absolute, nested and not ASCII, with a slash at its end.
    """
    root = tmp_path_factory.mktemp("again")
    folder = root / "sub folder" / "Größe" / "run_1"
    shutil.copytree(finished.folder, folder)
    (folder / "final_info.json").unlink()
    (folder / "training_log.jsonl").write_text('{"step": 0}\n{"st')
    (folder / "sae" / "layer_1_seed_0" / "sae_weights.safetensors").write_bytes(b"half")
    (folder / "eval" / "absorption" / "leftover.json").write_text("{")
    arguments = {"scale": scale, "cache": root / "cache", "cwd": root}
    process = tiny.run_script(f"--out_dir={folder}/", **arguments)
    assert (process.returncode, process.stderr) == (0, "")
    return SimpleNamespace(folder=folder, root=root, process=process)


def test_the_same_command_elsewhere_with_an_empty_cache_gives_the_same_bytes(again, finished):
    assert "(once)" in again.process.stdout  # the caches were made again
    weights = [
        f"sae/layer_1_seed_{s}/{n}.safetensors" for s in (0, 1) for n in ("sae_weights", "raw")
    ]
    for name in ("final_info.json", *weights):
        assert (again.folder / name).read_bytes() == (finished.folder / name).read_bytes()


def test_a_run_that_was_begun_and_not_finished_leaves_no_trace_in_the_next(again, finished):
    assert tiny.tree(again.folder).keys() == tiny.tree(finished.folder).keys()
    assert len((again.folder / "training_log.jsonl").read_text().splitlines()) == 20


def test_a_run_writes_into_its_folder_its_cache_and_the_table_beside_it_only(again):
    assert sorted(p.name for p in again.root.iterdir()) == ["cache", "sub folder"]
    assert sorted(p.name for p in again.folder.parent.iterdir()) == ["results.tsv", "run_1"]


def test_a_second_process_on_the_same_folder_stops_with_an_error(run, tmp_path):
    (tmp_path / "run_1").mkdir()
    with (tmp_path / "run_1" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(run("--out_dir=run_1"), "another process is working on run_1")
    assert [p.name for p in (tmp_path / "run_1").iterdir()] == [".lock"]


# Other rows of the table, and training that goes wrong.


@pytest.fixture(scope="module")
def others(scale, finished, cache, tmp_path_factory) -> Path:
    """A folder with run_2, run_8 and run_10 at one seed, one after the other in one process."""
    folder = tmp_path_factory.mktemp("others")
    first = "for name in ('run_2', 'run_8'): assert experiment.main([f'--out_dir={name}']) == 0"
    one = replace(scale, n_seeds=1)
    process = tiny.run_script("--out_dir=run_10", scale=one, cache=cache, cwd=folder, patch=first)
    assert (process.returncode, process.stderr) == (0, "")
    return folder


@pytest.mark.parametrize(
    ("name", "extra"), [("run_2", {"pace"}), ("run_8", set()), ("run_10", set())]
)
def test_adaptive_cosine_only_and_norm_restored_runs_finish(others, name, extra):
    folder = others / name
    (entry,) = json.loads((folder / "final_info.json").read_text()).values()
    (probing,) = entry["final_info_dict"]["probing_top_1"]
    assert entry["means"]["probing_top_1"] == float(f"{probing:.4g}")
    assert entry["means"]["absorption_letters"] >= 20
    assert set(entry["stderrs"].values()) == {None}  # one seed has no standard error
    assert entry["means"]["decoder_pw_mcc"] is None  # nor a partner
    records = [json.loads(line) for line in (folder / "training_log.jsonl").open()]
    assert len(records) == 20
    ours = {key for key, value in records[-1].items() if value is not None}
    assert ours >= extra | {"loss", "online_absorption_fraction"}
    assert ("ema_decay" in ours) == experiment.RUNS[name].ema
    config = json.loads((folder / "sae" / "layer_1_seed_0" / "cfg.json").read_text())
    assert config["alpha"] == pytest.approx({"run_2": 0.9}.get(name, 0.0))


def test_a_loss_that_is_not_finite_stops_with_step_seed_and_values(run, scale, cache, tmp_path):
    """The checkpoint before it is kept, and the same command goes on from there."""
    often = {"scale": replace(scale, checkpoint_seconds=0), "quick": True}
    spoil = "\n".join(
        [
            "step = experiment.Trainer.step",
            "def spoiled(self, x):",
            "    if self.steps_done == 3: self.sae.b_dec.data[1] = 1e30",
            "    return step(self, x)",
            "experiment.Trainer.step = spoiled",
        ]
    )
    process = run("--out_dir=run_7", patch=spoil, **often)
    assert_refused(process, "the loss is ", "nothing was evaluated")
    assert re.search(
        r"the loss is inf at step 3, layer 1, SAE 1 "
        r"\(mse=inf, l1=\S+, lambda=0\.0\d+, grad_norm=\S+\)",
        process.stderr,
    )
    left = {p.name for p in (tmp_path / "run_7").iterdir()}
    assert left == {".lock", "config.json", "experiment.py"}
    steps = sorted(p.name.split("_")[1] for p in cache.glob("training/*/step_*"))
    assert steps == ["00000002", "00000003"]
    process = run("--out_dir=run_7", **often)
    assert (process.returncode, process.stderr) == (0, "")
    assert "going on from the checkpoint of step 3" in process.stdout
