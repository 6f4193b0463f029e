"""From saved SAEs to results, part by part; what is finished is kept."""

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from lab.absorption import evaluate_absorption
from lab.activations import Calibration
from lab.fidelity import Fidelity, HeldOut
from lab.language_model import LanguageModel
from lab.metrics import finite_or_none
from lab.probing import evaluate_probing
from lab.process import Clock
from lab.results import layer_results, readout_results
from lab.saved_sae import load_sae
from lab.scales import Scale
from lab.storage import remembered


def evaluate(
    scale: Scale,
    readout_alphas: tuple[float, ...],
    lm: LanguageModel,
    units: dict[int, Calibration],
    saved: dict[int, dict[str, Path]],
    heldout_NL: torch.Tensor,
    records: list[dict],
    finished: Path,
    clock: Clock,
) -> dict[str, dict]:
    """final_info.json's entries, from the saved SAEs {layer: {name: folder}}, names by seed.

    Each part that is finished is kept in `finished`, so that a run that is stopped goes on after
    it; the names hold the weights' hashes, so nothing of other weights is ever taken up.
    """
    folder, alphas = finished.parent.parent / "eval", readout_alphas

    def part(kind: str, names: Iterable[str], compute: Callable[[], object]) -> object:
        digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]
        return remembered(finished / f"{kind}_{digest}.json", compute, beside=folder / kind)

    fidelities, absorption, probing = {}, {}, {}
    for layer, paths in saved.items():

        def fidelity(layer: int = layer, paths: dict = paths) -> list[list[float]]:
            held = HeldOut(lm, heldout_NL, layer, units[layer].outlier_norm, scale.lm_batch)
            found = [held.fidelity(load_sae(path).to(lm.device)) for path in paths.values()]
            return [[finite_or_none(value) for value in fidelity] for fidelity in found]

        fidelities[layer] = [Fidelity(*f) for f in part("fidelity", paths, fidelity)]
    clock.lap("fidelity")

    def all_probing() -> list:
        found = evaluate_probing(scale, lm, saved, folder / "sparse_probing", alphas)
        return [[*key, results] for key, results in found.items()]

    names = [name for paths in saved.values() for name in paths]
    for layer, alpha, results in part("sparse_probing", names, all_probing):
        probing[layer, alpha] = results
    clock.lap("sparse probing")
    for layer, paths in saved.items():
        compute = partial(evaluate_absorption, scale, lm, layer, paths, folder / "absorption")
        absorption[layer] = part("absorption", paths, compute)
    clock.lap("absorption")

    entries = {}
    for layer in saved:
        title = f"{scale.name} layer {layer}"
        own = [record for record in records if record["layer"] == layer]
        decoders = [load_sae(path).W_dec.detach() for path in saved[layer].values()]
        entries[title] = layer_results(
            scale, own, fidelities[layer], probing[layer, None], absorption[layer], decoders
        )
        entries[title]["notes"] = {
            "activation_scale": units[layer].scale,
            "outlier_norm": units[layer].outlier_norm,
            "outlier_fraction": units[layer].outlier_fraction,
        }
        if None in absorption[layer]:
            entries[title]["notes"]["absorption"] = (
                "null: SAE-Bench needs 20 letters whose probe reaches F1 0.6, and "
                f"layer {layer} of {lm.name} has fewer"
            )
        for alpha in readout_alphas:
            name = f"{title}, read out with alpha = {alpha:g}"
            entries[name] = readout_results(scale, probing[layer, alpha])
    return entries
