"""The real script on the real SmolLM2-135M: few batches, few texts, everything else as it ships.

The converted model is taken from, or put into, the cache where the program keeps it
(COSINE_SAE_CACHE or ~/.cache/cosine-sae), so that only a first execution downloads it (93 MB, from
the package index).  Everything else is made anew in a temporary cache.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

import experiment
from lab.language_model import load_language_model
from lab.saved_sae import load_sae
from lab.scales import SCALES
from lab.smollm2 import smollm2_folder

ENTRY = "tiny-smollm2 layer 8"
STORY = (
    "Once upon a time there was a little girl who lived in a small village near the forest. "
    "Every morning she walked to school with her brother, and every evening they helped their "
    "mother cook dinner. One day, on the way home, they found a small dog that had lost its way."
)


@pytest.fixture(scope="module")
def cache(never_the_users_cache, tmp_path_factory) -> Path:
    """An empty cache but for the converted models, which are the program's own."""
    kept = Path(never_the_users_cache or "~/.cache/cosine-sae").expanduser() / "models"
    kept.mkdir(parents=True, exist_ok=True)
    root = tmp_path_factory.mktemp("cache")
    (root / "models").symlink_to(kept)
    return root


def index_is_out_of_reach(folder: Path) -> bool:
    """Whether pip cannot download a package of 11 kB either."""
    pip = f"-m pip download --quiet --no-deps --dest {folder} six==1.17.0"
    return subprocess.run([sys.executable, *pip.split()], capture_output=True).returncode != 0


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory) -> SimpleNamespace:
    """A finished run_7, the control, of 6 batches."""
    scale = replace(
        SCALES["laptop"],
        name="tiny-smollm2",
        training_tokens=6 * 2048,
        n_seeds=2,
        d_sae=256,
        heldout_contexts=16,
        block_contexts=128,
        tasks=("spam",),
        probe_train_set_size=160,
        probe_test_set_size=80,
        k_values=(1, 5),
        absorption_words=1000,  # fewer, and SAE-Bench finds no word for some letter
        online_every=2,
        online_words=300,
    )
    folder = tmp_path_factory.mktemp("real")
    recipe = experiment.Recipe(warmup_steps=2)
    how = {"scale": scale, "recipe": recipe, "cache": cache, "cwd": folder}
    process = tiny.run_script("--out_dir=run_7", **how, few_k=False)
    if "could not download" in process.stderr and index_is_out_of_reach(folder):
        pytest.skip("SmolLM2 is not in the cache and pip reaches no index: " + process.stderr)
    assert (process.returncode, process.stderr) == (0, ""), process.stdout
    results = json.loads((folder / "run_7" / "final_info.json").read_text())
    return SimpleNamespace(
        scale=scale, folder=folder / "run_7", entry=results[ENTRY], out=process.stdout
    )


def test_the_script_trains_and_scores_saes_of_the_real_model(finished):
    folder, scale = finished.folder, finished.scale
    experiment.register_with_sae_lens()
    for seed in range(scale.n_seeds):
        sae = load_sae(folder / "sae" / f"layer_8_seed_{seed}")
        assert tuple(sae.W_dec.shape) == (256, 576)
        assert sae.cfg.metadata.model_name == "smollm2-135m-instruct"
        assert sae.cfg.metadata.hook_name == "blocks.8.hook_resid_post"
    records = [json.loads(line) for line in (folder / "training_log.jsonl").open()]
    assert [r["step"] for r in records] == list(range(6))
    assert max(records[-1]["mse"]) < min(records[0]["mse"])  # it learns
    entry = finished.entry
    missing = {name for name, values in entry["final_info_dict"].items() if None in values}
    missing.remove("probing_top_1_sd_over_tasks")  # of one task
    # What SAE-Bench measures of absorption is there, or missing for a reason that is given.
    of_words = {"l0_on_words", "fvu_on_words"}
    assert all(name.startswith("absorption_") or name in of_words for name in missing), missing
    assert bool(missing) == ("absorption" in entry["notes"])
    for name, values in entry["final_info_dict"].items():
        assert len(values) == 2
        assert all(math.isfinite(v) for v in values if v is not None), name
    means = entry["means"]
    assert 0 < means["fvu"] < 1.2
    assert 0 < means["l0"] < 256
    assert means["ce_recovered"] < 1
    # As the design saw: about 2% of the tokens have many times the usual norm.
    assert 0.005 < entry["notes"]["outlier_fraction"] < 0.05


def test_the_language_models_own_channels_tell_spam_from_messages(finished):
    means = finished.entry["means"]
    assert means["lm_all_channels"] > 0.7
    assert means["lm_top_5"] > 0.55


def test_the_model_reads_english_as_a_trained_model_does(finished, cache, monkeypatch):
    """Converted from a 4-bit file: one weight matrix wrongly laid out, and this is gone."""
    monkeypatch.setenv("COSINE_SAE_CACHE", str(cache))
    lm = load_language_model(finished.scale)
    tokens = lm.tokenizer([STORY], return_tensors="pt").input_ids
    assert tokens[0, 0] == lm.tokenizer.bos_token_id
    order = torch.randperm(tokens.shape[1] - 1) + 1
    shuffled = torch.cat([tokens[:, :1], tokens[:, order]], dim=1)
    assert lm.cross_entropy(tokens) < 2.6
    assert lm.cross_entropy(shuffled) > 5
    residuals = lm.residuals(tokens)[8]
    assert tuple(residuals.shape) == (*tokens.shape, 576)
    assert lm.cross_entropy(tokens, {8: residuals}) == lm.cross_entropy(tokens)
    assert lm.cross_entropy(tokens, {8: 0 * residuals}) > lm.cross_entropy(tokens) + 3


def test_the_model_is_converted_once(finished, cache, monkeypatch):
    model = cache / "models"
    before = tiny.tree(model)
    monkeypatch.setenv("COSINE_SAE_CACHE", str(cache))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was asked again"))
    assert smollm2_folder() in cache.glob("models/*")
    assert tiny.tree(model) == before
