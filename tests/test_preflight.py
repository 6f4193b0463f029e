"""Before any work: what is missing is said at once, and nothing is asked needlessly."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import hundred_steps

import lab.preflight
from lab.preflight import ModelNeeds, needs_of_model, not_enough_room, preflight, wanted
from lab.process import ExperimentError
from lab.scales import OPENWEBTEXT, SCALES


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


# The real ones' widths, vocabularies and parameters (docs/hub.md), nothing of them kept yet.
NEEDS = {
    "gemma-2-2b": ModelNeeds(2304, 256_000, 2_614_341_888, 10_457_367_552),
    "pythia-70m": ModelNeeds(512, 50_304, 70_426_624, 166_000_000),
}


def complaints(name: str, out_dir: Path, **changes) -> list[str]:
    return list(not_enough_room(SCALES[name], out_dir, NEEDS[name]._replace(**changes)))


def test_a_disk_that_holds_everything_must_have_room_for_all_of_it(machine, tmp_path):
    """Gemma: 10.46 GB of model and 4 of datasets; 9.60 of prompts (128,000 words, 25 kB a layer);
    1.48 of means and tokens (100,000 texts); 12 times 9 SAEs of 2 * 2304 * 2304 floats, 0.382 GB:
    30.13."""
    assert complaints("gemma-2-2b", machine(disk=30.2)) == []
    assert complaints("gemma-2-2b", machine(disk=30.0)) == [
        f"free disk space at {tmp_path}: 30.0 GB of the 30.1 GB needed"
    ]
    assert complaints("gemma-2-2b", machine(disk=19.7), to_fetch=0) == [], "the model is kept"
    # Pythia: 4.17 + 0.14 + 0.31, and 12 times 3 SAEs of 2 * 512 * 4096 floats, 0.05 GB: 5.22.
    assert complaints("pythia-70m", machine(disk=5.3)) == []
    (found,) = complaints("pythia-70m", machine(disk=5.1))
    assert found.endswith("5.1 GB of the 5.2 GB needed")


def test_the_machine_must_have_memory_for_the_latents_of_a_task(machine, monkeypatch):
    """Gemma: five classes of 2,500 texts, 9 SAEs and their two read-outs, 2,304 latents in
    bfloat16: 1.56 GB, less than the weights' 5.23 on their way; 12 read-outs would be more."""
    pages = {"SC_PAGE_SIZE": 1_000_000, "SC_PHYS_PAGES": 8_200}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    out_dir, scale, needs = machine(disk=99), SCALES["gemma-2-2b"], NEEDS["gemma-2-2b"]
    assert list(not_enough_room(scale, out_dir, needs, 2)) == [
        "memory: this machine has 8.2 GB of about 8.2 GB needed"
    ]
    pages["SC_PHYS_PAGES"] = 8_300
    assert list(not_enough_room(scale, out_dir, needs, 2)) == []
    (found,) = not_enough_room(scale, out_dir, needs, 12)
    assert found == "memory: this machine has 8.3 GB of about 9.7 GB needed"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each loads the model
    (found,) = not_enough_room(scale, out_dir, needs, 2)
    assert found == "memory: this machine has 8.3 GB of about 16.5 GB needed"


def test_several_disks_are_asked_for_what_each_has_to_hold(machine, monkeypatch):
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == Path().absolute().stat().st_dev:
        pytest.skip("there is no second disk here")
    monkeypatch.setenv("COSINE_SAE_CACHE", str(shm / "not there yet" / "cache"))
    # The cache: prompts, means, and two checkpoints with what is saved: 9.60 + 1.48 + 10 * 0.382.
    assert complaints("gemma-2-2b", machine(disk=15.3, shm=15.0)) == []
    (found,) = complaints("gemma-2-2b", machine(disk=15.3, shm=14.8))
    assert found == "free disk space at /dev/shm: 14.8 GB of the 14.9 GB needed"
    assert len(complaints("gemma-2-2b", machine(disk=15.1, shm=14.8))) == 2


def test_the_gpu_must_have_room_for_the_model_the_saes_and_a_block(machine):
    """Gemma in bfloat16 5.23; 5 * 0.382 (9 SAEs) and twice a layer's, 0.127; logits of 8 contexts
    at 12 bytes each, 3.15, beside four times 256 held-out contexts in float32, 1.21, which are
    more than a block and a step of training: 11.75.  A run at these sizes took 11.24 of an H100.
    Pythia is read in bfloat16 and in float32: 0.42; its SAEs 0.35; logits and contexts 0.89, more
    than scores (copies of the SAEs, and twice the latents of 20,122 words): 1.66."""
    assert complaints("gemma-2-2b", machine(disk=99, gpu=11.8)) == []
    assert complaints("gemma-2-2b", machine(disk=99, gpu=11.6)) == [
        "free GPU memory: 11.6 GB of about 11.7 GB needed are free (language model 5.2, SAEs 2.2, "
        "training, cross-entropy or scores 4.4)"
    ]
    assert complaints("pythia-70m", machine(disk=99, gpu=1.7)) == []
    assert len(complaints("pythia-70m", machine(disk=1, gpu=1.6))) == 2


def test_a_models_needs_are_those_of_its_own_configuration_whatever_its_name_suggests(tmp_path):
    from transformers import GPTNeoXConfig

    folder = tmp_path / "pythia-70m-but-wider"
    GPTNeoXConfig(vocab_size=1000, hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
                  intermediate_size=8).save_pretrained(folder)  # fmt: skip
    needs = needs_of_model(hundred_steps(language_model=str(folder), text="a/b@main"))
    attention, mlp, norms = 4 * (96 * 96 + 96), 2 * 96 * 8 + 96 + 8, 4 * 96
    parameters = 2 * 1000 * 96 + 2 * (attention + mlp + norms) + 2 * 96
    assert needs == ModelNeeds(96, 1000, parameters, 0)


def test_everything_that_is_missing_is_said_at_once(monkeypatch):
    monkeypatch.setattr(lab.preflight, "not_to_be_had", lambda scale: iter(["a licence", "a text"]))
    monkeypatch.setattr(lab.preflight, "needs_of_model", lambda scale: NEEDS[scale.name])
    monkeypatch.setattr(lab.preflight, "not_enough_room", lambda *_: iter(["room", "memory"]))
    scale = replace(SCALES["gemma-2-2b"], tasks=("news", "nwes"))
    with pytest.raises(ExperimentError) as error:
        preflight(scale, Path("run_1"))
    first, task, *lines = str(error.value).splitlines()
    assert first == "before this run can start:"
    assert task.startswith("  - the task 'nwes' is not one of occupation, news, code,")
    assert lines == ["  - a licence", "  - a text"]
    monkeypatch.setattr(lab.preflight, "not_to_be_had", lambda scale: iter(()))
    with pytest.raises(ExperimentError, match=r"  - room\n  - memory$"):
        preflight(SCALES["gemma-2-2b"], Path("run_1"))
    monkeypatch.setattr(lab.preflight, "not_enough_room", lambda *_: iter(()))
    preflight(SCALES["gemma-2-2b"], Path("run_1"))


def test_nothing_is_asked_where_nothing_is_fetched_from_the_hub(monkeypatch, tmp_path):
    for name in ("not_to_be_had", "not_enough_room", "needs_of_model"):
        monkeypatch.setattr(lab.preflight, name, lambda *_: pytest.fail("asked"))
    for scale_ in (SCALES["laptop"], hundred_steps(language_model=str(tmp_path))):
        preflight(scale_, tmp_path)


def test_what_a_scale_reads_from_the_hub_is_named_once():
    assert list(wanted(SCALES["synthetic"])) == []
    assert list(wanted(SCALES["gemma-2-2b"])) == [
        ("model", "google/gemma-2-2b", None),
        ("dataset", *OPENWEBTEXT.split("@")),
        ("dataset", "LabHC/bias_in_bios", None),
        ("dataset", "canrager/amazon_reviews_mcauley_1and5", None),
        ("dataset", "codeparrot/github-code", None),
        ("dataset", "fancyzhx/ag_news", None),
        ("dataset", "Helsinki-NLP/europarl", None),
    ]
