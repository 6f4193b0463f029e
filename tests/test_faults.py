"""Faults on purpose, in the real script: whatever happens, no wrong number and no lost run.

Ordinarily a short form of each; `pytest -m faults` is the long one.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_behaviour import SIGNAL_AT, assert_refused, assert_stopped

import experiment
from lab.folders import is_finished
from lab.process import ExperimentError
from lab.results import without_times
from lab.scales import SCALES
from lab.storage import file_sha256

KILLS = 100  # of the long form


SECRETS = {
    "HF_TOKEN": "hf_tokenthatnobodymaysee",
    "WANDB_API_KEY": "wandbkeythatnobodymaysee",
    "SOME_VARIABLE": "variablethatnobodymaysee",
}

# Changes nothing of what a run does: which files are unpickled is written to a file of its own.
LISTENING = """
import atexit, json, pickle
from functools import wraps
import numpy, torch
unpickled, trusted = set(), []

def noted(function):
    @wraps(function)
    def call(source, *arguments, **named):
        unpickled.add(str(source))
        trusted.append(source)
        try:
            return function(source, *arguments, **named)
        finally:
            trusted.pop()
    return call

torch.load, pickle.load, numpy.load = noted(torch.load), noted(pickle.load), noted(numpy.load)
atexit.register(lambda: open({notes!r}, "w").write(json.dumps(sorted(unpickled))))

def hook(event, arguments):
    if event == "pickle.find_class" and not trusted:
        unpickled.add("something unknown, for " + ".".join(map(str, arguments)))
sys.addaudithook(hook)
"""


@pytest.fixture(autouse=True)
def no_work_is_left(cache):
    """Unfinished work is taken up by whoever asks for the same training, in any folder."""
    yield
    shutil.rmtree(cache / "training", ignore_errors=True)


def work_of(cache: Path) -> list[Path]:
    """Where unfinished runs have theirs."""
    return sorted((cache / "training").glob("*/"))


@pytest.fixture(scope="module")
def alone_in(tmp_path_factory) -> Path:
    """Where `alone` runs."""
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(scale, cache, alone_in) -> Callable[[str], bytes]:
    """final_info.json of a run that nothing happened to."""

    def result(name: str) -> bytes:
        if not (alone_in / name).exists():
            patch = LISTENING.format(notes=str(alone_in / f"unpickled_{name}.json"))
            arguments = {"scale": scale, "cache": cache, "cwd": alone_in, "patch": patch}
            process = tiny.run_script(f"--out_dir={name}", **arguments, **SECRETS)
            assert (process.returncode, process.stderr) == (0, "")
            (alone_in / f"stdout_{name}").write_text(process.stdout)
        return final_info(alone_in / name)

    return result


def final_info(folder: Path) -> bytes:
    return (folder / "final_info.json").read_bytes()


# ── Corruption ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def stopped(scale, cache, alone, tmp_path_factory) -> SimpleNamespace:
    """run_1 stopped in its last evaluation, with a cache that holds all there is to hold."""
    alone("run_1")
    folder = tmp_path_factory.mktemp("stopped")
    cache = shutil.copytree(cache, folder / "cache")
    patch = SIGNAL_AT.format(
        where="lab.evaluation.evaluate_absorption", when="True", name="SIGTERM"
    )
    process = tiny.run_script("--out_dir=run_1", scale=scale, cache=cache, cwd=folder, patch=patch)
    assert_stopped(process, 75, "SIGTERM")
    (work,) = work_of(cache)
    return SimpleNamespace(folder=folder / "run_1", cache=cache, work=work)


def flipped(data: bytes, at: int | None = None) -> bytes:
    """One bit of the byte `at`, or of the middle one."""
    at = len(data) // 2 if at is None else at
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "one bit flipped": flipped,
    "another's": lambda data: b'{"key": {}, "sha256": {}, "value": 0}',
}


LONG = [d if d == "one bit flipped" else pytest.param(d, marks=pytest.mark.faults) for d in DAMAGE]


@pytest.mark.parametrize("damage", LONG)
@pytest.mark.parametrize("where", ["the cache", "the run and its work"])
def test_damage_to_every_file_that_is_trusted_changes_no_number(
    where, damage, stopped, alone, scale, tmp_path
):
    shutil.copytree(stopped.folder, tmp_path / "run_1")
    shutil.copytree(stopped.cache, tmp_path / "cache")
    # config.json says whose folder it is: a damaged one is refused, which has a test of its own.
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p != tmp_path / "run_1/config.json"]
    files = [p for p in files if p.suffix != ".lock" and p.name != ".lock" and p.stat().st_size]
    kept = [p for p in files if p.is_relative_to(tmp_path / "cache")]
    kept = [p for p in kept if not p.is_relative_to(tmp_path / "cache" / "training")]
    files = kept if where == "the cache" else [p for p in files if p not in kept]
    assert len(files) > 10
    for path in files:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    arguments = {"scale": scale, "cache": tmp_path / "cache", "cwd": tmp_path}
    process = tiny.run_script("--out_dir=run_1", **arguments)
    assert (process.returncode, process.stderr) == (0, "")
    assert "is damaged" in process.stdout
    assert final_info(tmp_path / "run_1") == alone("run_1")
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run_1" / "training_log.jsonl").open()
    ]
    assert steps == list(range(20)), "no step lost and none logged twice"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_finished_run_that_was_changed_is_refused_by_name_and_left_out_of_the_figures(
    damage, alone, alone_in, scale, tmp_path, monkeypatch, capfd
):
    alone("run_1")
    shutil.copytree(alone_in / "run_1", tmp_path / "run_1")
    monkeypatch.setitem(SCALES, scale.name, scale)
    monkeypatch.setitem(experiment.RECIPES, scale.name, tiny.RECIPE)
    monkeypatch.setenv("EXPERIMENT_SCALE", scale.name)
    argument = f"--out_dir={tmp_path / 'run_1'}"
    files = [p for p in (tmp_path / "run_1").rglob("*") if p.is_file() and p.name != ".lock"]
    assert len(files) > 15
    for path in files:
        name, good = str(path.relative_to(tmp_path / "run_1")), path.read_bytes()
        if not good:  # nobody had anything to say in sae_bench.log
            continue
        if name == "config.json" and damage == "one bit flipped":  # see the next test
            continue
        path.write_bytes(DAMAGE[damage](good))
        with tiny.signals():
            status = experiment.main([argument])
        (error,) = capfd.readouterr().err.splitlines()
        assert status == 1
        assert error.startswith("error: ") and name in error
        if name in ("final_info.json", "training_log.jsonl"):
            code = f"import plot; plot.load(plot.Path({str(tmp_path)!r}))"
            drawn = subprocess.run(
                [sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True
            )
            assert f"{name} is" in drawn.stdout and "changed since" in drawn.stdout
        path.write_bytes(good)
    with tiny.signals():
        assert experiment.main([argument]) == 0


def test_no_flipped_bit_in_a_configuration_is_taken_for_a_run_that_was_asked_for(
    alone, alone_in, scale, tmp_path
):
    """It is refused, or stands where nothing is read: what a run does comes from the program."""
    alone("run_1")
    folder = tmp_path / "run_1"
    shutil.copytree(alone_in / "run_1", folder)
    good = (folder / "config.json").read_bytes()
    config = json.loads(good)
    names = ("run_name", "run", "recipe", "scale", "experiment")
    identity = {name: config[name] for name in names}
    sums, refused = config["sha256"], 0
    for at in range(len(good)):
        (folder / "config.json").write_bytes(flipped(good, at))
        try:
            assert is_finished(folder, identity)
        except ExperimentError:
            refused += 1
            continue
        found = json.loads((folder / "config.json").read_bytes())
        assert {name: found[name] for name in identity} == identity
        assert found["laboratory"] == config["laboratory"]
        claimed = found.get("sha256", {})  # of a file whose name was changed nothing is claimed
        assert {n: claimed[n] for n in claimed.keys() & sums.keys()}.items() <= sums.items()
    assert refused > len(good) / 4


def test_damage_to_what_sae_bench_wrote_for_a_stopped_run_is_not_taken_over(
    stopped, alone, alone_in, scale, tmp_path
):
    """Its numbers are remembered elsewhere: the files beside them have to be right as well."""
    shutil.copytree(stopped.folder, tmp_path / "run_1")
    shutil.copytree(stopped.cache, tmp_path / "cache")
    written = [*tmp_path.glob("cache/training/*/evaluated_*/eval/**/*.json")]
    assert written
    for path in written:
        path.write_bytes(flipped(path.read_bytes()))
    written = [
        tmp_path / "run_1" / Path(*path.parts[path.parts.index("eval") :]) for path in written
    ]
    arguments = {"scale": scale, "cache": tmp_path / "cache", "cwd": tmp_path}
    process = tiny.run_script("--out_dir=run_1", **arguments)
    assert (process.returncode, process.stderr) == (0, "")
    assert "is damaged and is made again" in process.stdout
    assert final_info(tmp_path / "run_1") == alone("run_1")
    for path in written:
        there = alone_in / path.relative_to(tmp_path)
        mine, its = (json.loads(p.read_text(encoding="utf-8")) for p in (path, there))
        assert without_times(mine) == without_times(its)


# ── Resources and concurrency ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("at", [9, 10, 17])
def test_a_cache_that_is_removed_while_a_run_uses_it_is_made_again(
    at, scale, alone, cache, tmp_path
):
    """With the run's own work in it, before the first lines of the log were written and after."""
    alone("run_1")
    shutil.copytree(cache, tmp_path / "cache")
    patch = """
import shutil
real = experiment.Trainer.step
def step(self, x):
    if self.steps_done == {at}:
        shutil.rmtree(lab.storage.cache_root())
    return real(self, x)
experiment.Trainer.step = step
"""
    patch = patch.replace("{at}", str(at))
    how = {"scale": scale, "cache": tmp_path / "cache", "cwd": tmp_path, "patch": patch}
    process = tiny.run_script("--out_dir=run_1", **how)
    assert (process.returncode, process.stderr) == (0, "")
    assert final_info(tmp_path / "run_1") == alone("run_1")
    log = (tmp_path / "run_1" / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(20))
    assert not work_of(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_one_clear_sentence(scale, tmp_path):
    (tmp_path / "cache").write_text("a file")
    arguments = {"scale": scale, "cache": tmp_path / "cache", "cwd": tmp_path}
    process = tiny.run_script("--out_dir=run_1", **arguments)
    assert_refused(process, str(tmp_path / "cache"), "run the same command again")
    assert (tmp_path / "cache").read_text() == "a file"


def test_memory_that_runs_out_is_one_clear_sentence_under_the_line_that_asked_for_it(
    scale, alone, cache, tmp_path
):
    alone("run_1")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)"
    wide = replace(scale, d_sae=40_000_000)  # 10 GB of weights
    process = tiny.run_script("--out_dir=run_7", scale=wide, cache=cache, cwd=tmp_path, patch=limit)
    assert process.returncode == 1
    *traceback, last = process.stderr.splitlines()
    assert last.startswith("error: memory is full") and "run the same command again" in last
    assert any(f'{experiment.__file__}"' in line for line in traceback), "an experimenter's size"


# main() in one process, again and again until it ends well: the first file with `place` in its
# path that is opened for writing finds no room, once for each place.
NO_ROOM = """
import errno, os
full, places = [], {places!r}
root = os.path.realpath({root!r})

def no_room(path):
    path = os.path.realpath(os.fsdecode(path))
    if full and path.startswith(root) and full[0] in path[len(root):]:
        full.pop()
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

def hook(event, arguments):
    path, _, flags = arguments if event == "open" else (0, 0, 0)
    if flags & (os.O_WRONLY | os.O_RDWR) and not isinstance(path, int):
        if error := no_room(path):
            raise error
sys.addaudithook(hook)

from safetensors import SafetensorError, torch as safetensors
save_file = safetensors.save_file
def saved(tensors, path, **named):
    if no_room(path):
        words = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(words)
    return save_file(tensors, path, **named)
rooms = [room for name, room in sys.modules.items() if name.startswith("lab.")]
for room in rooms:
    if hasattr(room, "save_file"):
        room.save_file = saved

import torch
torch_save = torch.save
def torch_saved(value, path):
    if no_room(path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    return torch_save(value, path)
torch.save = torch_saved

for place in places:
    full.append(place)
    status = experiment.main(sys.argv[1:])
    print("tried", place, status, not full, flush=True)
    full.clear()
"""


def test_a_disk_that_is_full_at_any_kind_of_file_is_one_clear_sentence_and_no_loss(
    scale, alone, cache, tmp_path
):
    """Through a symbolic link, which names the run; the cache holds the documents and no more."""
    alone("run_1")
    shutil.copytree(cache / "documents", tmp_path / "cache" / "documents")
    (tmp_path / "disk").mkdir()
    (tmp_path / "run_1").symlink_to("disk")
    places = ["/.lock", "config.json", "disk/.experiment.py", "probe.pth", "training/", "identity",
              "residuals.safetensors", "training_log.jsonl", "/partial", "sae_weights",
              "fidelity", "probing/", "prompts", "features.jsonl", "features.html",
              "disk/features.html", "disk/training_log.jsonl", "disk/sae/layer",
              "disk/eval/", "final_info.json"]  # fmt: skip
    patch = NO_ROOM.format(places=places, root=str(tmp_path))
    arguments = {"scale": scale, "cache": tmp_path / "cache", "cwd": tmp_path}
    process = tiny.run_script("--out_dir=run_1", patch=patch, **arguments)
    assert process.returncode == 0
    tried = [line.split()[1:] for line in process.stdout.splitlines() if line.startswith("tried ")]
    assert tried == [[place, "1", "True"] for place in places]
    errors = process.stderr.splitlines()
    assert len(errors) == len(places)
    for place, error in zip(places, errors, strict=True):
        assert error.startswith("error: "), place
        assert "No space left on device" in error or "file could not be written" in error, place
        assert "free space" in error and "run the same command again" in error, place
        assert place in error or place == "probe.pth", "torch.save does not say where"
    assert not work_of(tmp_path / "cache")
    assert final_info(tmp_path / "run_1") == alone("run_1")
    assert (tmp_path / "run_1").is_symlink()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own: yields its folder, and what gives it so many KiB of room."""
    disk = tmp_path / "small"
    disk.mkdir()

    def resize(kibibytes: int, how: str = "remount,") -> bool:
        command = f"mount -t tmpfs -o {how}size={kibibytes}k tmpfs {disk}"
        return subprocess.run(command.split(), capture_output=True).returncode == 0

    if not resize(64, how=""):
        pytest.skip("only root can make a small file system")
    yield disk, resize
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.faults
def test_a_disk_that_is_ever_a_little_too_small_loses_nothing(small_disk, scale, alone, cache):
    """Wherever it happens to be full: in the cache, in SAE-Bench, in the run's own files."""
    disk, resize = small_disk
    alone("run_1")
    text = cache / "documents"  # by far the largest, and one file: not again and again
    kibibytes = 64 + sum(p.stat().st_size for p in text.rglob("*") if p.is_file()) // 1024
    assert resize(kibibytes)
    shutil.copytree(text, disk / "cache" / "documents")
    arguments = {"scale": scale, "cache": disk / "cache", "cwd": disk}
    full = 0
    while (process := tiny.run_script("--out_dir=run_1", **arguments)).returncode:
        assert_refused(process, "free space", "run the same command again")
        assert process.returncode == 1
        full, kibibytes = full + 1, kibibytes + 128
        assert resize(kibibytes)
    assert process.stderr == ""
    assert final_info(disk / "run_1") == alone("run_1")
    print(f"full {full} times, up to {kibibytes} KiB")
    assert full > 10


# Even root obeys a folder's permissions once it has given up CAP_DAC_OVERRIDE (1) and
# CAP_DAC_READ_SEARCH (2), and what it wrote stays as it was.
NOT_ALMIGHTY = """
import ctypes, os
libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)
held = (ctypes.c_uint32 * 6)()
assert libc.capget(header, held) == 0
for i in (0, 1):
    held[i] &= ~0b110
assert libc.capset(header, held) == 0
for place, cache in {tries!r}:
    os.environ["COSINE_SAE_CACHE"] = cache
    print("tried", experiment.main(["--out_dir=" + place]), flush=True)
"""


def test_a_folder_without_permission_is_one_clear_sentence_and_stays_as_it_was(
    scale, alone, cache, tmp_path
):
    alone("run_1")
    for name in ("closed", "run_3", "cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    before = tiny.tree(tmp_path)
    closed = [tmp_path / name for name in ("closed", "run_3", "cache")]
    for folder in closed:
        folder.chmod(0o500)
    tries = [(f"{tmp_path}/closed/run_1", str(cache)), (f"{tmp_path}/run_3", str(cache)),
             (f"{tmp_path}/run_5", f"{tmp_path}/cache")]  # fmt: skip
    arguments = {"scale": scale, "cache": cache, "cwd": tmp_path}
    patch = NOT_ALMIGHTY.format(tries=tries)
    try:
        process = tiny.run_script("--out_dir=run_1", patch=patch, **arguments)
    finally:
        for folder in closed:
            folder.chmod(0o700)
    assert process.stdout.count("tried 1\n") == 3
    errors = process.stderr.splitlines()[:3]
    for error, folder in zip(errors, closed, strict=True):
        assert error.startswith(f"error: Permission denied at {folder}/"), process.stderr
        assert "fix the folder, then run the same command again" in error
    assert before.items() <= tiny.tree(tmp_path).items()


@pytest.mark.faults
def test_four_runs_at_once_on_a_cold_cache_give_the_results_they_give_alone(alone, scale, tmp_path):
    names = ["run_1", "run_2", "run_7", "run_8"]
    arguments = {"scale": scale, "cache": tmp_path / "cold", "cwd": tmp_path}
    started = [tiny.start_script(f"--out_dir={name}", **arguments) for name in names]
    for name, process in zip(names, started, strict=True):
        done = tiny.ended(process)
        assert (done.returncode, done.stderr) == (0, ""), name
        assert final_info(tmp_path / name) == alone(name), name


# ── Text that is not text ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ("[]", "is shorter than its 16 held-out contexts"),
        ("['word']", "is shorter than its 16 held-out contexts"),
        ("['the the the ' * 200_000]", "shorter than one block"),  # held out, with all it holds
        ("['the ' * 900] * 4000", None),
        ("[chr(0xdcff) + chr(0xfffd) + ' good bad ' * 300] * 4000", None),
    ],
    ids=["none", "one word", "one enormous document", "one word throughout", "no valid unicode"],
)
def test_odd_text_is_trained_on_or_refused_in_one_sentence(documents, said, scale, cache, tmp_path):
    patch = f"lab.text.packaged_documents = lambda _: {documents}"
    arguments = {"scale": scale, "cache": cache, "cwd": tmp_path, "patch": patch}
    process = tiny.run_script("--out_dir=run_7", **arguments)
    if said or process.returncode:
        assert_refused(process, said or "")
        assert not (tmp_path / "run_7" / "final_info.json").exists()
    else:
        json.loads(final_info(tmp_path / "run_7"))


SPOILED = """
real = lab.language_model.LanguageModel.residuals
for factor in ("nan", "inf", "0"):
    lab.language_model.LanguageModel.residuals = lambda self, tokens: {
        layer: x * float(factor) for layer, x in real(self, tokens).items()
    }
    print("tried", factor, experiment.main(sys.argv[1:]), flush=True)
"""


def test_residuals_that_are_no_numbers_or_all_the_same_are_refused(scale, alone, cache, tmp_path):
    """Where the first texts are read, or, of what is the same everywhere, in training."""
    alone("run_1")
    fresh = replace(scale, keep_activations=False)
    arguments = {"scale": fresh, "cache": cache, "cwd": tmp_path, "patch": SPOILED}
    process = tiny.run_script("--out_dir=run_7", **arguments)
    assert [f"tried {factor} 1" in process.stdout for factor in ("nan", "inf", "0")] == [True] * 3
    *errors, _ = process.stderr.splitlines()
    assert [error.split(" (")[0].split(":")[1] for error in errors] == [
        " the language model's residuals are not finite",
        " the language model's residuals are not finite",
        " the language model's residuals are the same at every token",
    ]
    assert not (tmp_path / "run_7" / "final_info.json").exists()


# ── Security ──────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_unpickled_but_checked_entries_of_the_cache(alone, alone_in, cache):
    """What is in the cache was written by this program and is checked at every use: see DAMAGE."""
    alone("run_1")
    found = json.loads((alone_in / "unpickled_run_1.json").read_text())
    assert any(path.endswith("probe.pth") for path in found), "SAE-Bench's own probes"
    for path in found:
        assert path.startswith(str(cache)), path


class Evil:
    """Whoever unpickles it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_of_a_stopped_run_only_its_own_checkpoint_is_unpickled(alone, scale, cache, tmp_path):
    """Not what lies beside it under such a name, however it is called."""
    alone("run_1")
    arguments = {"scale": scale, "cache": cache, "cwd": tmp_path, "quick": True}
    patch = SIGNAL_AT.format(where="experiment.Trainer.step", when="True", name="SIGTERM")
    assert_stopped(tiny.run_script("--out_dir=run_7", patch=patch, **arguments), 75, "SIGTERM")
    (work,) = work_of(cache)
    (own,) = work.glob("step_*")
    torch.save({"step": 1, "log": Evil(tmp_path / "executed")}, tmp_path / "evil")
    evil = (tmp_path / "evil").read_bytes()
    names = (f"step_00000019_{own.stem[-16:]}.pt", f"step_00000018_{file_sha256(own)[:16]}.pt")
    for name in names:
        (work / name).write_bytes(evil)
    patch = LISTENING.format(notes=str(tmp_path / "unpickled.json"))
    process = tiny.run_script("--out_dir=run_7", patch=patch, **arguments)
    assert (process.returncode, process.stderr) == (0, "")
    for name in names:
        assert f"checkpoint {name} is damaged, or not of this run: not used" in process.stdout
    assert "going on from the checkpoint of step 1" in process.stdout
    assert not (tmp_path / "executed").exists()
    assert json.loads((tmp_path / "unpickled.json").read_text()) == [str(own)]
    torch.load(tmp_path / "evil", weights_only=False)
    assert (tmp_path / "executed").exists(), "it would have been seen"


def test_no_token_and_nothing_of_the_environment_is_written_or_printed(alone, alone_in, cache):
    alone("run_1")
    plot = [sys.executable, tiny.ROOT / "plot.py", alone_in]
    drawn = subprocess.run(plot, env=os.environ | SECRETS, capture_output=True, check=True)
    (alone_in / "stdout_plot").write_bytes(drawn.stdout + drawn.stderr)
    read = 0
    for path in [*alone_in.rglob("*"), *cache.rglob("*")]:
        content = path.read_bytes() if path.is_file() else b""
        read += bool(content)
        for secret in SECRETS.values():
            assert secret.encode() not in content, path
    assert read > 50
    assert (alone_in / "report.html").exists()


# ── Long runs ───────────────────────────────────────────────────────────────────────────────────

WATCH = """
import os, sys
real = experiment.Trainer.step
def step(self, x):
    if self.steps_done % {every} == 0:
        pages = int(open("/proc/self/statm").read().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        lab.process.say(f"watched {{self.steps_done}} {{pages}} {{files}}")
    return real(self, x)
experiment.Trainer.step = step
"""


def watched(steps: int, every: int, scale, cache, tmp_path) -> list[tuple[int, int, int]]:
    """(step, pages resident, files open), now and then."""
    long = replace(scale, training_tokens=steps * 256, keep_activations=False)
    repeated = (
        "documents = lab.text.packaged_documents\n"
        "lab.text.packaged_documents = lambda scale: documents(scale) * 3\n"
    )
    patch = repeated + WATCH.format(every=every)
    arguments = {"scale": long, "cache": cache, "cwd": tmp_path, "patch": patch}
    process = tiny.run_script("--out_dir=run_1", **arguments)
    assert (process.returncode, process.stderr) == (0, "")
    lines = [line.split() for line in process.stdout.splitlines() if line.startswith("watched")]
    return [tuple(map(int, line[1:])) for line in lines]


@pytest.mark.faults
def test_memory_and_open_files_stay_flat_over_five_thousand_steps(scale, cache, tmp_path):
    found = watched(5_000, 500, scale, cache, tmp_path)
    _, pages, files = zip(*found[2:], strict=True)  # from step 1,000 on
    assert len(pages) == 8
    assert max(pages) / pages[0] - 1 < 0.02, pages
    assert max(files) <= files[0], files
    log = (tmp_path / "run_1" / "training_log.jsonl").stat().st_size
    assert log / 5_000 < 1_200, "bytes a step, as docs/survival.md has it"


# ── Kills ───────────────────────────────────────────────────────────────────────────────────────


def killed(process: subprocess.Popen, after: float) -> bool:
    """SIGKILL `after` seconds from now; False if it had ended by itself."""
    try:
        process.communicate(timeout=after)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True


@pytest.mark.faults
def test_a_hundred_kills_at_random_moments_lose_no_run(alone, scale, tmp_path):
    """Runs one after the other, each killed again and again until it gets to its end; every third
    from an empty cache, so that preparing is hit as well."""
    r, kills, runs = random.Random(0), 0, 0
    alone("run_1")
    begun = time.monotonic()
    arguments = {"scale": scale, "cache": tmp_path / "cache", "cwd": tmp_path}
    tiny.run_script("--out_dir=run_7", **arguments)
    whole = time.monotonic() - begun
    while kills < KILLS:
        shutil.rmtree(tmp_path / "run_1", ignore_errors=True)
        if runs % 3 == 0:
            shutil.rmtree(tmp_path / "cache")
        for _ in range(8):
            process = tiny.start_script("--out_dir=run_1", **arguments)
            if not killed(process, r.uniform(0, whole)):
                break
            kills += 1
            if r.random() < 0.3:  # as a loop that deletes what did not finish
                shutil.rmtree(tmp_path / "run_1", ignore_errors=True)
        process = tiny.run_script("--out_dir=run_1", **arguments)
        assert (process.returncode, process.stderr) == (0, ""), (runs, kills)
        assert final_info(tmp_path / "run_1") == alone("run_1"), (runs, kills)
        assert not work_of(tmp_path / "cache")
        runs += 1
    print(f"{kills} kills, {runs} runs, none lost")
