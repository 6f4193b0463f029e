"""final_info.json: an entry for each layer and each read-out, from one value per seed."""

from collections.abc import Iterator

import torch

from lab.activations import Calibration
from lab.fidelity import Fidelity
from lab.metrics import (
    ABSORPTION_NAMES,
    absorption_metrics,
    between_seeds,
    finite_or_none,
    mean_or_none,
    pairwise_mcc,
    probing_metrics,
    rank_correlation,
    readout_metrics,
    rounded,
    sd_or_none,
    stability,
    stderr_or_none,
)
from lab.scales import Scale
from lab.seeds import seed_for


def title(scale: Scale, layer: int, target_l0: float, alpha: float | None = None) -> str:
    """Of an entry of final_info.json; with `alpha` of its read-out."""
    at = "" if len(scale.target_l0s) == 1 else f", L0 {target_l0:g}"
    read = "" if alpha is None else f", read out with alpha = {alpha:g}"
    return f"{scale.name} layer {layer}{at}{read}"


def each_target(
    scale: Scale, layer: int, records: list[dict]
) -> Iterator[tuple[float, slice, list[dict]]]:
    """(target L0, where its SAEs stand in the layer's stack, the training log's lines with their
    values alone) for every target of a scale."""
    for i, target_l0 in enumerate(scale.target_l0s):
        seeds = slice(i * scale.n_seeds, (i + 1) * scale.n_seeds)
        yield target_l0, seeds, [of_seeds(r, seeds) for r in records if r["layer"] == layer]


def of_seeds(record: dict, seeds: slice) -> dict:
    return {name: v[seeds] if isinstance(v, list) else v for name, v in record.items()}


def units_notes(units: Calibration) -> dict:
    """What an entry says of the units that its SAEs were trained in."""
    return {
        "activation_scale": units.scale,
        "outlier_norm": units.outlier_norm,
        "outlier_fraction": units.outlier_fraction,
    }


def layer_results(
    scale: Scale,
    target_l0: float,
    records: list[dict],
    fidelities: list[Fidelity],
    probing: list[dict],
    absorption: list[dict],
    decoders: list[torch.Tensor],
) -> dict:
    """final_info.json's entry of one layer and target, from one value per seed of everything."""
    per_seed = [
        stability(*([r[name][s] for r in records] for name in ("loss", "mse", "grad_norm")))
        | fidelities[s]._asdict()
        | absorption_metrics(absorption[s])
        | probing_metrics(probing[s], scale.k_values)
        | {
            name: records[-1][name][s] if records[-1][name] else None
            for name in ("online_absorption_fraction", "online_absorption_full")
        }
        for s in range(scale.n_seeds)
    ]
    values = by_metric(per_seed)
    letters: dict[str, dict[str, list[float]]] = {}
    for name, (_, detail) in ABSORPTION_NAMES.items():
        rates = [
            {d["first_letter"]: d[detail] for d in a["sae_bench"]["eval_result_details"]}
            for a in absorption
            if a["sae_bench"]
        ]
        common = sorted(set.intersection(*map(set, rates))) if len(rates) == scale.n_seeds else []
        letters[name] = {letter: [r[letter] for r in rates] for letter in common}
        vectors = [[r[letter] for letter in common] for r in rates] if common else []
        values[f"{name}_rank_correlation"] = (
            between_seeds(vectors, rank_correlation) if vectors else [None] * scale.n_seeds
        )
    values["decoder_pw_mcc"] = between_seeds(decoders, pairwise_mcc)
    generator = torch.Generator().manual_seed(seed_for("random dictionaries"))
    random_decoders = [
        torch.nn.functional.normalize(torch.randn(d.shape, generator=generator), dim=-1)
        for d in decoders
    ]
    values["decoder_pw_mcc_null"] = between_seeds(random_decoders, pairwise_mcc)
    alone = {"l0_target": target_l0, "training_steps": float(len(records))}
    for name in ("absorption_full", "absorption_fraction", "probing_top_1"):
        alone[f"{name}_sd_over_seeds"] = sd_or_none([finite_or_none(x) for x in values[name]])
    return {
        **entry(values, alone),
        "per_letter": letters,
        **probing_details(scale.k_values, [found["sae_bench"] for found in probing]),
        "sae_bench": {
            "sparse_probing": [without_times(p["sae_bench"]) for p in probing],
            "absorption": [without_times(a["sae_bench"]) for a in absorption],
        },
    }


def by_metric(per_seed: list[dict]) -> dict[str, list]:
    """{metric: one value per seed} of a dictionary of metrics for each seed."""
    return {name: [seed[name] for seed in per_seed] for name in per_seed[0]}


def entry(values: dict[str, list], alone: dict[str, float | None]) -> dict:
    """What every entry has: means and standard errors to 4 digits, which an agent's loop reads, and
    final_info_dict with one value per seed.  `alone`: what is one number for all of them."""
    values = {name: [finite_or_none(x) for x in v] for name, v in values.items()}
    means = {name: mean_or_none(v) for name, v in values.items()} | alone
    stderrs = {name: stderr_or_none(v) for name, v in values.items()} | dict.fromkeys(alone)
    for name in values:  # pairs share seeds: their spread is no standard error
        if name.startswith("decoder_pw_mcc") or name.endswith("rank_correlation"):
            stderrs[name] = None
    return {
        "means": {name: rounded(v) for name, v in means.items()},
        "stderrs": {name: rounded(v) for name, v in stderrs.items()},
        "final_info_dict": values,
    }


def probing_details(k_values: tuple[int, ...], probing: list[dict]) -> dict:
    """{"per_task": {k: {task: [per seed]}}}: what paired differences between runs are made of."""
    per_task: dict[str, dict[str, list[float]]] = {}
    for k in k_values:
        rows = per_task[f"probing_top_{k}"] = {}
        for found in probing:
            for task in found["eval_result_details"]:
                name = task["dataset_name"].removesuffix("_results")
                rows.setdefault(name, []).append(task[f"sae_top_{k}_test_accuracy"])
    return {"per_task": per_task}


def readout_results(scale: Scale, probing: list[dict]) -> dict:
    """The entry of a read-out check: the same SAEs, probed with another alpha at few latents."""
    ks = scale.readout_k_values
    values = by_metric([readout_metrics(found, ks) for found in probing])
    said = (
        "the SAEs of the entry of this name without its end, probed with another alpha on the very "
        f"texts drawn for them, on {', '.join(map(str, ks))} latents: probes on all latents or on "
        "another number, and the language model's own, are not of a read-out"
    )
    return entry(values, {}) | probing_details(ks, probing) | {"notes": {"read_out": said}}


def without_times(found: dict | None) -> dict | None:
    """SAE-Bench's result less what differs from one execution to the next."""
    changing = ("eval_id", "datetime_epoch_millis", "sae_bench_commit_hash")
    return found and {name: value for name, value in found.items() if name not in changing}
