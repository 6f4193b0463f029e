"""Faults on purpose, in the real script: whatever happens, no wrong number and no lost run.

Ordinarily a short form of each; `pytest -m faults` is the long one.
"""

import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from test_behaviour import SIGNAL_AT, assert_refused, assert_stopped

import experiment

KILLS = 100  # of the long form


@pytest.fixture(scope="module")
def alone(scale, cache, tmp_path_factory) -> Callable[[str], bytes]:
    """final_info.json of a run that nothing happened to."""
    folder, found = tmp_path_factory.mktemp("alone"), {}

    def result(name: str) -> bytes:
        if name not in found:
            process = tiny.run_script(f"--out_dir={name}", scale=scale, cache=cache, cwd=folder)
            assert (process.returncode, process.stderr) == (0, "")
            found[name] = (folder / name / "final_info.json").read_bytes()
        return found[name]

    return result


def final_info(folder: Path) -> bytes:
    return (folder / "final_info.json").read_bytes()


# ── Corruption ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def stopped(scale, cache, alone, tmp_path_factory) -> SimpleNamespace:
    """run_1 stopped in its last evaluation, with a cache that holds all there is to hold."""
    alone("run_1")
    folder = tmp_path_factory.mktemp("stopped")
    patch = SIGNAL_AT.format(where="evaluate_absorption", when="True", name="SIGTERM")
    process = tiny.run_script("--out_dir=run_1", scale=scale, cache=cache, cwd=folder, patch=patch)
    assert_stopped(process, 75, "SIGTERM")
    return SimpleNamespace(folder=folder / "run_1", cache=cache)


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "one bit flipped": flipped,
    "another's": lambda data: b'{"key": {}, "sha256": {}, "value": 0}',
}


LONG = [d if d == "one bit flipped" else pytest.param(d, marks=pytest.mark.faults) for d in DAMAGE]


@pytest.mark.parametrize("damage", LONG)
@pytest.mark.parametrize("where", ["the cache", "the run"])
def test_damage_to_every_file_that_is_trusted_changes_no_number(
    where, damage, stopped, alone, scale, tmp_path
):
    shutil.copytree(stopped.folder, tmp_path / "run_1")
    shutil.copytree(stopped.cache, tmp_path / "cache")
    # config.json says whose folder it is: a damaged one is refused, which has a test of its own.
    root = tmp_path / ("cache" if where == "the cache" else "run_1")
    files = [p for p in root.rglob("*") if p.is_file() and p.name != "config.json"]
    files = [p for p in files if p.suffix != ".lock" and p.name != ".lock" and p.stat().st_size]
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


# ── Resources and concurrency ───────────────────────────────────────────────────────────────────


def test_a_cache_that_is_removed_while_a_run_uses_it_is_made_again(scale, alone, tmp_path):
    patch = """
import shutil
real = experiment.Trainer.step
def step(self, x):
    if self.steps_done == 9:
        shutil.rmtree(experiment.cache_root())
    return real(self, x)
experiment.Trainer.step = step
"""
    arguments = {"scale": scale, "cache": tmp_path / "cache", "cwd": tmp_path}
    process = tiny.run_script("--out_dir=run_1", patch=patch, **arguments)
    assert (process.returncode, process.stderr) == (0, "")
    assert final_info(tmp_path / "run_1") == alone("run_1")


def test_a_cache_that_cannot_be_written_is_one_clear_sentence(scale, tmp_path):
    (tmp_path / "cache").write_text("a file")
    arguments = {"scale": scale, "cache": tmp_path / "cache", "cwd": tmp_path}
    process = tiny.run_script("--out_dir=run_1", **arguments)
    assert_refused(process, str(tmp_path / "cache"), "run the same command again")
    assert (tmp_path / "cache").read_text() == "a file"


def test_memory_that_runs_out_is_one_clear_sentence(scale, alone, cache, tmp_path):
    alone("run_1")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)"
    wide = experiment.replace(scale, d_sae=4_000_000)
    process = tiny.run_script("--out_dir=run_7", scale=wide, cache=cache, cwd=tmp_path, patch=limit)
    assert_refused(process, "memory is full", "run the same command again")


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
    patch = f"experiment.packaged_documents = lambda _: {documents}"
    arguments = {"scale": scale, "cache": cache, "cwd": tmp_path, "patch": patch}
    process = tiny.run_script("--out_dir=run_7", **arguments)
    if said or process.returncode:
        assert_refused(process, said or "")
        assert not (tmp_path / "run_7" / "final_info.json").exists()
    else:
        json.loads(final_info(tmp_path / "run_7"))


# ── Long runs ───────────────────────────────────────────────────────────────────────────────────

WATCH = """
import os, sys
real = experiment.Trainer.step
def step(self, x):
    if self.steps_done % {every} == 0:
        pages = int(open("/proc/self/statm").read().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        experiment.say(f"watched {{self.steps_done}} {{pages}} {{files}}")
    return real(self, x)
experiment.Trainer.step = step
"""


def watched(steps: int, every: int, scale, cache, tmp_path) -> list[tuple[int, int, int]]:
    """(step, pages resident, files open), now and then."""
    long = experiment.replace(scale, training_tokens=steps * 256, keep_activations=False)
    repeated = (
        "documents = experiment.packaged_documents\n"
        "experiment.packaged_documents = lambda scale: documents(scale) * 3\n"
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
    assert log / 5_000 < 1_200, "bytes a step, as README has it"


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
        process = tiny.run_script("--out_dir=run_1", **arguments)
        assert (process.returncode, process.stderr) == (0, ""), (runs, kills)
        assert final_info(tmp_path / "run_1") == alone("run_1"), (runs, kills)
        assert not (tmp_path / "run_1" / "checkpoint").exists()
        runs += 1
    print(f"{kills} kills, {runs} runs, none lost")
