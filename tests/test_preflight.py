"""Before any work: what is missing is said at once, and nothing is asked needlessly."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import hundred_steps

import lab.preflight
from lab.preflight import not_enough_room, preflight
from lab.process import ExperimentError
from lab.scales import SCALES


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with so many GB free: its disks by a part of their path, and its GPU."""
    from huggingface_hub import constants

    def with_free(disk: float, gpu: float | None = None, **other_disks: float) -> Path:
        def disk_usage(path):
            named = [free for part, free in other_disks.items() if part in str(path)]
            return SimpleNamespace(free=1e9 * (named or [disk])[0])

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(cuda, "mem_get_info", lambda device: (1e9 * gpu, 80e9))
        return tmp_path / "not there yet" / "run_1"

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path / "cache"))
    return with_free


def complaints(name: str, out_dir: Path) -> list[str]:
    return list(not_enough_room(SCALES[name], out_dir))


def test_a_disk_that_holds_everything_must_have_room_for_all_of_it(machine, tmp_path):
    """Gemma: 10 GB of the hub's, 8 of the cache's, 10 times 9 SAEs of 2 * 2304 * 2304 floats."""
    assert complaints("gemma-2-2b", machine(disk=21.9)) == []
    assert complaints("gemma-2-2b", machine(disk=21.7)) == [
        f"free disk space at {tmp_path}: 21.7 GB of the 22 GB needed"
    ]
    # Pythia: 5 + 1, and 10 times 3 SAEs of 2 * 512 * 4096 floats.
    assert complaints("pythia-70m", machine(disk=6.6)) == []
    (found,) = complaints("pythia-70m", machine(disk=6.4))
    assert found.endswith("6.4 GB of the 7 GB needed")


def test_several_disks_are_asked_for_what_each_has_to_hold(machine, monkeypatch):
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == Path().absolute().stat().st_dev:
        pytest.skip("there is no second disk here")
    monkeypatch.setenv("COSINE_SAE_CACHE", str(shm / "not there yet" / "cache"))
    assert complaints("gemma-2-2b", machine(disk=13.9, shm=8.1)) == []
    (found,) = complaints("gemma-2-2b", machine(disk=13.9, shm=7.9))
    assert found == "free disk space at /dev/shm: 7.9 GB of the 8 GB needed"
    assert len(complaints("gemma-2-2b", machine(disk=13.7, shm=7.9))) == 2


def test_the_gpu_must_have_room_for_the_model_the_saes_and_two_blocks(machine):
    """8 + 5 * 0.382 (9 SAEs) + 2 * 1.812 (131,072 tokens of 3 layers in bfloat16) = 13.5."""
    assert complaints("gemma-2-2b", machine(disk=99, gpu=13.6)) == []
    assert complaints("gemma-2-2b", machine(disk=99, gpu=13.4)) == [
        "free GPU memory: 13.4 GB of about 14 GB needed are free"
    ]
    assert complaints("pythia-70m", machine(disk=99, gpu=1.1)) == []
    assert len(complaints("pythia-70m", machine(disk=1, gpu=0.9))) == 2


def test_everything_that_is_missing_is_said_at_once(monkeypatch):
    monkeypatch.setattr(lab.preflight, "not_to_be_had", lambda scale: iter(["a licence", "a text"]))
    monkeypatch.setattr(lab.preflight, "not_enough_room", lambda scale, out_dir: iter(["room"]))
    with pytest.raises(ExperimentError) as error:
        preflight(SCALES["gemma-2-2b"], Path("run_1"))
    lines = str(error.value).splitlines()
    assert lines == ["before this run can start:", "  - a licence", "  - a text", "  - room"]
    for name in ("not_to_be_had", "not_enough_room"):
        monkeypatch.setattr(lab.preflight, name, lambda *_: iter(()))
    preflight(SCALES["gemma-2-2b"], Path("run_1"))


def test_nothing_is_asked_where_nothing_is_fetched_from_the_hub(monkeypatch, tmp_path):
    for name in ("not_to_be_had", "not_enough_room"):
        monkeypatch.setattr(lab.preflight, name, lambda *_: pytest.fail("asked"))
    for scale_ in (SCALES["laptop"], hundred_steps(), hundred_steps(language_model=str(tmp_path))):
        preflight(scale_, tmp_path)
