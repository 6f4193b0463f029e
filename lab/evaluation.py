"""From saved SAEs to results, part by part; what is finished is kept."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from lab.absorption import evaluate_absorption, first_letter_probes
from lab.activations import Calibration, harvest
from lab.bench import first_letter_words
from lab.fidelity import Fidelity, HeldOut
from lab.identity import code_behind
from lab.language_model import LanguageModel
from lab.metrics import finite_or_none
from lab.probing import evaluate_probing, probing_artifacts
from lab.process import Clock, require, say
from lab.results import each_target, layer_results, readout_results, title, units_notes
from lab.saved_sae import Trained, check_saved, load_sae
from lab.scales import Scale
from lab.storage import json_text, remembered, versions


def prepare(scale: Scale, lm: LanguageModel) -> dict:
    """What scores need of the language model, made before training: a setting, a task or a text
    that cannot be scored is refused before it costs a training.  Returns what config.json says of
    it, a digest of the probing texts: datasets of the hub are known by name only.

    Raises ExperimentError."""
    texts = probing_artifacts(scale, lm)
    for layer in scale.layers:
        first_letter_probes(scale, lm, layer)
    names = sorted(path.name for path in texts.glob("*.safetensors"))  # of their tokens' sums
    return {"probing_texts": hashlib.sha256(json_text(names).encode()).hexdigest()[:16]}


def check_all(
    scale: Scale,
    lm: LanguageModel,
    trainers: list[Trained],
    saved: dict[int, dict[str, Path]],
    heldout_NL: torch.Tensor,
    records: list[dict],
) -> None:
    """Load every saved SAE as a user does and compare it with the one that was trained, on ordinary
    tokens of held-out text, and its alpha with the last that was logged.  Raises ExperimentError
    where they differ."""
    rows_NLD, worst = harvest(lm, heldout_NL[:16], scale.lm_batch), 0.0
    last = {record["layer"]: record for record in records}
    for i, trainer in enumerate(trainers):
        trained, saved_as = last[trainer.layer]["alpha"], trainer.final_alphas()
        require(
            trained == saved_as or trainer.run.schedule == "adaptive",
            f"the last step trained with alpha {trained}, and the SAEs were saved with {saved_as}: "
            "both must come from schedule_at(); nothing was evaluated",
        )
        rows_ND = trainer.units.ordinary(rows_NLD[:, i])
        for seed, folder in enumerate(saved[trainer.layer].values()):
            worst = max(worst, *check_saved(trainer, folder, seed, rows_ND).values())
        check_trained_on_this(trainer, last[trainer.layer], rows_ND)
    say(f"every saved SAE, loaded afresh, computes what was trained (to {worst:.1g})")


@torch.no_grad()
def check_trained_on_this(trainer: Trained, record: dict, rows_ND: torch.Tensor) -> None:
    """The last step's L0 and mse are those of the saved SAEs on held-out rows, but for a factor of
    two: an SAE that was trained on something else than it will read is far off."""
    nothing, alphas = torch.zeros(1, device=rows_ND.device), trainer.final_alphas()
    with trainer.averaged():
        now = trainer.sae(rows_ND * trainer.units.scale, alphas, nothing, torch.float32)
    for name, found in (("l0", now.l0_S), ("mse", now.mse_S)):
        for i, (logged, value) in enumerate(zip(record[name], found.tolist(), strict=True)):
            low, high = sorted((logged, value))
            require(
                low >= 0 and high <= 2 * low + 1e-6,
                f"layer {trainer.layer}, SAE {i}: the last step logged {name} {logged:.3g}, "
                f"but the saved SAE has {value:.3g} on held-out text: step() does not train on "
                "what the SAE will read; nothing was evaluated",
            )


def evaluate(
    scale: Scale,
    readout_alphas: tuple[float, ...],
    lm: LanguageModel,
    units: dict[int, Calibration],
    saved: dict[int, dict[str, Path]],
    heldout_NL: torch.Tensor,
    records: list[dict],
    work: Path,
    clock: Clock,
) -> tuple[dict[str, dict], Path]:
    """final_info.json's entries, from the saved SAEs {layer: {name: folder}}, names by seed, and
    the folder with SAE-Bench's own files.

    Each part that is finished is kept in a folder of `work`, so that a run that is stopped goes on
    after it.  The folder's name holds all that scores depend on: the weights' hashes (in the SAEs'
    names), the settings, the model, the code of the laboratory.
    """
    names = [name for paths in saved.values() for name in paths]
    key = {
        "saes": names,
        "scale": asdict(scale),
        "readout_alphas": readout_alphas,
        "language_model": lm.identity,
        "code": code_behind(__name__),
        **versions("sae-lens", "sae-bench", "sae-probes", "scikit-learn", "numpy"),
    }
    kept = work / f"evaluated_{hashlib.sha256(json_text(key).encode()).hexdigest()[:16]}"
    folder = kept / "eval"

    def part(kind: str, compute: Callable[[], object]) -> object:
        return remembered(kept / f"{kind}.json", compute, beside=folder / kind.split("_layer")[0])

    fidelities, absorption, probing = {}, {}, {}
    for layer, paths in saved.items():

        def fidelity(layer: int = layer, paths: dict = paths) -> list[list[float]]:
            norm, keep = units[layer].outlier_norm, scale.keep_activations
            held = HeldOut(lm, heldout_NL, layer, norm, scale.lm_batch, keep)
            found = [held.fidelity(load_sae(path).to(lm.device)) for path in paths.values()]
            return [[finite_or_none(value) for value in fidelity] for fidelity in found]

        fidelities[layer] = [Fidelity(*f) for f in part(f"fidelity_layer_{layer}", fidelity)]
    clock.lap("fidelity")

    def all_probing() -> list:
        norms = {layer: of_layer.outlier_norm for layer, of_layer in units.items()}
        where = folder / "sparse_probing"
        found = evaluate_probing(scale, lm, saved, where, readout_alphas, norms)
        return [[*key, results] for key, results in found.items()]

    for layer, alpha, results in part("sparse_probing", all_probing):
        probing[layer, alpha] = results
    clock.lap("sparse probing")
    for layer, paths in saved.items():
        compute = partial(evaluate_absorption, scale, lm, layer, paths, folder / "absorption")
        absorption[layer] = part(f"absorption_layer_{layer}", compute)
    clock.lap("absorption")

    entries = {}
    for layer in saved:
        decoders = [load_sae(path).W_dec for path in saved[layer].values()]
        for target_l0, seeds, own in each_target(scale, layer, records):
            notes = units_notes(units[layer])
            if any(found["sae_bench"] is None for found in absorption[layer][seeds]):
                f1 = load_file(first_letter_probes(scale, lm, layer) / "probe.safetensors")["f1"]
                notes["absorption"] = (
                    "null: SAE-Bench needs 20 letters whose probe reaches F1 0.6; of "
                    f"{len(first_letter_words(scale, lm))} words as layer {layer} of {lm.name} has "
                    f"them, {int((f1 > 0.6).sum())} letters do: more words, or a model that spells"
                )
            scores = fidelities[layer], probing[layer, None], absorption[layer], decoders
            of_target = (of_layer[seeds] for of_layer in scores)
            found = layer_results(scale, target_l0, own, *of_target)
            entries[title(scale, layer, target_l0)] = found | {"notes": notes}
            for alpha in readout_alphas:
                found = readout_results(scale, probing[layer, alpha][seeds])
                entries[title(scale, layer, target_l0, alpha)] = found
    return entries, folder
