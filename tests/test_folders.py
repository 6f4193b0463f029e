"""A run's folder: whose it is, whether it is finished, and what is put into it at the end."""

import json
from pathlib import Path

import pytest
import torch

import experiment
import lab.folders
from lab.folders import begin, chosen_run, differences, finish, is_finished
from lab.identity import laboratory_fingerprint
from lab.process import Clock, ExperimentError
from lab.storage import file_sha256, json_text
from lab.work import Work, work_root


def test_equal_configurations_do_not_differ():
    config = {"run": {"ema": True, "alphas": [0.0, 1.0]}, "name": "run_1"}
    assert differences(config, json.loads(json.dumps(config))) == []


def test_every_difference_is_named_with_both_values_and_where_it_stands():
    old = {"run": {"ema": True, "alpha": 0.1}, "name": "run_1", "layers": [3]}
    new = {"run": {"ema": False, "alpha": 0.1}, "name": "run_1", "layers": [3, 4], "more": 7}
    assert differences(old, new) == [
        "layers is [3] there and [3, 4] now",
        "more is 'absent' there and 7 now",
        "run.ema is True there and False now",
    ]
    assert differences({"run": None}, {"run": {"ema": True}}) == [
        "run is None there and {'ema': True} now"
    ]


# ── Whose folder it is ──────────────────────────────────────────────────────────────────────────

IDENTITY = {
    "run_name": "run_1",
    "run": {"title": "the method", "readout_alphas": (0.0, 1.0)},
    "recipe": {"gate_init": 0.2},
    "scale": {"name": "tiny", "layers": (1,)},
    "experiment": "0123456789abcdef",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run that has begun."""
    (tmp_path / "run_1").mkdir()
    begin(tmp_path / "run_1", IDENTITY, experiment.__file__, {"total_steps": 20})
    return tmp_path / "run_1"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(run: Path, *said: str, identity: dict = IDENTITY) -> None:
    """It is an error that says so, and nothing is touched."""
    before = contents(run)
    with pytest.raises(ExperimentError) as error:
        is_finished(run, identity)
    for text in said:
        assert text in str(error.value)
    assert contents(run) == before


def test_a_new_folder_is_free(tmp_path):
    assert not is_finished(tmp_path / "run_1", IDENTITY)
    (tmp_path / "run_1").mkdir()
    (tmp_path / "run_1" / "notes.txt").write_text("mine")
    (tmp_path / "run_1" / ".lock").write_text("")
    assert not is_finished(tmp_path / "run_1", IDENTITY)


def test_a_begun_run_holds_its_configuration_its_script_and_its_machine(run):
    config = json.loads((run / "config.json").read_text())
    assert {name: config[name] for name in IDENTITY} == json.loads(json_text(IDENTITY))
    assert config["laboratory"] == laboratory_fingerprint()
    assert config["total_steps"] == 20
    assert config["threads"] == torch.get_num_threads()
    assert config["versions"]["torch"] == torch.__version__
    assert config["processor"] in ("amx_bf16", "avx512_bf16", "no_bf16", "unknown")
    assert (run / "experiment.py").read_bytes() == Path(experiment.__file__).read_bytes()
    assert not is_finished(run, IDENTITY), "it may go on"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": {"gate_init": 0.3}}, "recipe.gate_init is 0.2 there and 0.3 now"),
        ({"run": IDENTITY["run"] | {"title": "x"}}, "run.title is 'the method' there and 'x' now"),
        ({"scale": {"name": "tiny", "layers": (1, 2)}}, "scale.layers is [1] there and [1, 2] now"),
        ({"run_name": "run_2"}, "run_name is 'run_1' there"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_run_of_another_configuration_is_refused_with_what_differs(run, changes, said, finished):
    if finished:
        (run / "final_info.json").write_text("{}")
    refused(run, "was begun with another configuration", said, identity=IDENTITY | changes)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("which", ["experiment", "laboratory", "both"])
def test_a_run_of_other_code_is_refused_with_which_and_what_to_do(
    run, which, finished, monkeypatch
):
    if finished:
        (run / "final_info.json").write_text("{}")
    now = IDENTITY
    if which != "laboratory":
        now = IDENTITY | {"experiment": "fedcba9876543210"}
    if which != "experiment":
        monkeypatch.setattr(lab.folders, "laboratory_fingerprint", lambda: "fedcba9876543210")
    with pytest.raises(ExperimentError, match="the code has changed since") as error:
        is_finished(run, now)
    text = str(error.value)
    assert ("experiment.py (it was" in text) == (which != "laboratory")
    assert (": lab/" in text or "and lab/" in text) == (which != "experiment")
    assert "delete or rename the folder, or undo the change" in text
    assert "0123456789abcdef" not in text, "fingerprints tell nobody anything"


@pytest.mark.parametrize("name", ["final_info.json", "training_log.jsonl", "sae", "eval"])
def test_a_folder_that_holds_results_and_no_configuration_is_nobodys_and_left_alone(name, tmp_path):
    run = tmp_path / "run_1"
    run.mkdir()
    (run / name).mkdir() if "." not in name else (run / name).write_text("{}")
    refused(run, name, "no config.json", "move it away or delete it")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"run": 1}', '{"sha256": 3}'], ids=lambda text: text or "empty"
)
def test_a_configuration_that_this_program_did_not_write_is_refused(text, run):
    (run / "config.json").write_text(text)
    refused(run, "is not a configuration this program wrote")


# ── The end of a run ────────────────────────────────────────────────────────────────────────────

RESULTS = {"tiny layer 1": {"means": {"fvu": 0.25}}}


def worked(run: Path) -> tuple[Work, Path]:
    """Finished work in the cache: (it, the folder of SAE-Bench's files)."""
    work = Work({"run_name": "run_1"})
    evaluated = work.folder / "evaluated_0123" / "eval"
    (evaluated / "absorption").mkdir(parents=True)
    (evaluated / "absorption" / "a.json").write_text("{}")
    (work.folder / "training_log.jsonl").write_text('{"step": 0}\n')
    (work.folder / "sae" / "layer_1_seed_0").mkdir(parents=True)
    (work.folder / "sae" / "layer_1_seed_0" / "cfg.json").write_text("{}")
    (work.folder / "step_00000001_0.pt").write_bytes(b"x")
    return work, evaluated


def finished(run: Path) -> dict:
    """finish() it, and return its config.json."""
    work, evaluated = worked(run)
    config = json.loads((run / "config.json").read_text())
    finish(run, work, config, Clock(), RESULTS, evaluated)
    return json.loads((run / "config.json").read_text())


WRITTEN = [
    "config.json",
    "eval/absorption/a.json",
    "experiment.py",
    "final_info.json",
    "sae/layer_1_seed_0/cfg.json",
    "training_log.jsonl",
]


def test_a_finished_run_holds_everything_with_its_sums_and_its_work_is_gone(run):
    config = finished(run)
    assert sorted(contents(run)) == WRITTEN
    assert json.loads((run / "final_info.json").read_text()) == RESULTS
    expected = {name: file_sha256(run / name) for name in WRITTEN if name != "config.json"}
    assert config["sha256"] == expected
    assert config["seconds"]["total"] >= 0 and config["total_steps"] == 20
    assert not (work_root() / config["work"]).exists()
    assert is_finished(run, IDENTITY)


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - {"config.json"}))
def test_a_finished_run_one_of_whose_files_changed_is_refused_by_its_name(name, run):
    finished(run)
    (run / name).write_text((run / name).read_text() + " ")
    refused(run, "is finished, but", name, "changed since")


def test_what_was_taken_out_of_a_finished_run_is_not_missed(run):
    """Weights are large: who moves them away has not changed a number."""
    finished(run)
    (run / "sae" / "layer_1_seed_0" / "cfg.json").unlink()
    assert is_finished(run, IDENTITY)


def test_a_run_killed_while_its_files_were_put_in_place_is_finished_by_the_next_execution(
    run, monkeypatch
):
    """final_info.json comes last: before it the run is not finished, and its work is kept."""
    work, evaluated = worked(run)
    config = json.loads((run / "config.json").read_text())
    write, killed_at = lab.folders.write_atomically, []

    def killed(path: Path, text: str) -> None:
        if path.name == killed_at[-1]:
            raise KeyboardInterrupt
        write(path, text)

    for name in ("config.json", "final_info.json"):
        killed_at.append(name)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(lab.folders, "write_atomically", killed)
            finish(run, work, config, Clock(), RESULTS, evaluated)
        assert (run / "training_log.jsonl").exists() and not (run / "final_info.json").exists()
        assert not is_finished(run, IDENTITY)
        assert work.folder.exists()
        (run / "sae" / "of_another_execution").write_text("half")
    finish(run, work, config, Clock(), RESULTS, evaluated)
    assert sorted(contents(run)) == WRITTEN, "nothing of the killed ones is left"
    assert is_finished(run, IDENTITY)


def test_work_that_outlived_its_finished_run_is_removed_by_the_next_look(run):
    """The run may have been killed in its last moment."""
    config = finished(run)
    work = work_root() / config["work"]
    work.mkdir()
    assert is_finished(run, IDENTITY)
    assert work.exists(), "without the mark it is the same run's in another folder"
    (work / "finished").touch()
    assert is_finished(run, IDENTITY)
    assert not work.exists()


@pytest.mark.parametrize("name", ["../../precious", "..", ".", "", 3, None, "a/b"])
def test_no_other_folder_is_ever_removed_whatever_a_configuration_names(name, run, tmp_path):
    finished(run)
    work_root().mkdir(parents=True, exist_ok=True)
    (tmp_path / "precious").mkdir()
    (work_root() / "a" / "b").mkdir(parents=True)
    config = json.loads((run / "config.json").read_text()) | {"work": name}
    (run / "config.json").write_text(json_text(config))
    assert is_finished(run, IDENTITY)
    assert (tmp_path / "precious").exists() and (work_root() / "a" / "b").exists()


# ── Which run is asked for ──────────────────────────────────────────────────────────────────────

TITLES = {"run_1": "the method", "run_2": "another"}


@pytest.mark.parametrize(
    ("out_dir", "name"),
    [("run_1", "run_1"), ("a/run_2/", "run_2"), ("./run_2", "run_2"), ("run_2/../run_1", "run_1")],
)
def test_the_last_part_of_out_dir_names_the_run(out_dir, name):
    assert chosen_run(TITLES, [f"--out_dir={out_dir}"]) == (Path(out_dir), name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--out_dir is missing"),
        (["--out_dir="], "--out_dir is missing"),
        (["--out_dir=run_0"], "run_0 holds the given baseline and is never re-run"),
        (["--out_dir=x/run_0/"], "never re-run"),
        (["--out_dir=run_3"], "'run_3' is not a row of RUNS"),
        (["--out_dir=/"], "is not a row of RUNS"),
    ],
)
def test_what_names_no_run_is_refused_with_the_runs_there_are(arguments, said):
    with pytest.raises(ExperimentError) as error:
        chosen_run(TITLES, arguments)
    assert said in str(error.value)
    if "run_0" not in said and "never" not in said:
        assert all(title in str(error.value) for title in TITLES.values())


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "run_1").write_text("")
    with pytest.raises(ExperimentError, match="is a file: name a folder"):
        chosen_run(TITLES, [f"--out_dir={tmp_path / 'run_1'}"])
