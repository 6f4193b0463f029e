"""What an SAE makes of a world with known features: absorption as it is, not as it is inferred.

For every edge (parent p, child c) of the world's trees, with the latent that matches p best by
decoder cosine (as proposed in SAELens' issue 729):

    gap = P(latent fires | p on, c off) - P(latent fires | p on, c on)

An SAE that absorbs lets the child's latent carry the parent too, and the parent's falls silent.
Promises that all of it is measured on rows that no SAE was trained on.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from lab.activations import Calibration, harvest
from lab.metrics import between_seeds, pairwise_mcc, stability
from lab.process import Clock
from lab.results import by_metric, each_target, entry, title, units_notes
from lab.saved_sae import decoder_rows, load_sae, read_out
from lab.scales import Scale
from lab.synthetic import KnownWorld

LEAST = 50  # samples on either side of an edge, or it is not counted


class Edges(NamedTuple):
    """Of the latent that matches each edge's parent best; over all edges that count."""

    gap: float  # mean over edges, NaN where none counts
    fires: float  # mean of P(fires | parent on, child off)
    cosine: float  # mean over parents of that latent's decoder row with the parent
    count: int


def edges_of(
    fires_NF: torch.Tensor,
    W_dec_FD: torch.Tensor,
    on_NK: torch.Tensor,
    directions_KD: torch.Tensor,
    edges: list[tuple[int, int]],
) -> Edges:
    """Rows that fire (bool) against features that are on (bool), unit decoder rows and directions.

    A latent that points the other way does not match: its cosine counts with its sign."""
    parents, children = torch.tensor(edges, device=fires_NF.device).T
    cosine_K, best_K = (W_dec_FD @ directions_KD.T).max(0)
    fires_NE = fires_NF[:, best_K[parents]]
    parent_NE, child_NE = on_NK[:, parents], on_NK[:, children]
    rates, enough = [], torch.ones(len(edges), dtype=torch.bool, device=fires_NF.device)
    for side_NE in (parent_NE & ~child_NE, parent_NE & child_NE):
        n_E = side_NE.sum(0)
        rates.append((fires_NE & side_NE).sum(0) / n_E.clamp_min(1))
        enough &= n_E >= LEAST
    alone_E, with_child_E = (rate[enough] for rate in rates)
    gap, fires = (alone_E - with_child_E).mean().item(), alone_E.mean().item()
    return Edges(gap, fires, cosine_K[parents.unique()].mean().item(), int(enough.sum()))


def f1_of(fires_NF: torch.Tensor, W_dec_FD: torch.Tensor, on_NK: torch.Tensor, directions_KD):
    """Mean over latents of the F1 with which each tells whether the feature is on that matches its
    decoder row best (SAELens' synthetic evaluation); 0 of a latent that never is right."""
    on_NF = on_NK[:, (W_dec_FD @ directions_KD.T).abs().argmax(1)]
    right_F = (fires_NF & on_NF).sum(0)
    return (2 * right_F / (fires_NF.sum(0) + on_NF.sum(0)).clamp_min(1)).mean().item()


class OnlineTruth:
    """The gap of the live SAEs during training, on rows of their own: what paces run_2 here."""

    def __init__(self, lm: KnownWorld, layer: int):
        self.x_ND = lm.spread(lm.online.x_ND, lm.online.log_norm_N, layer).to(lm.device)
        self.on_NK, self.directions_KD = (
            t.to(lm.device) for t in (lm.online.on_NK, lm.directions_KD)
        )
        self.edges = lm.world.edges

    @torch.no_grad()
    def measure(
        self, sae: torch.nn.Module, alphas: list[float], scale: float, dtype: torch.dtype
    ) -> list[tuple[float, float]]:
        """(gap, 1 - P(fires | parent on, child off)) of every SAE: in the place of the absorption
        fraction and of full absorption."""
        fires = sae.encode(self.x_ND * scale, alphas, dtype) > 0
        rows = decoder_rows(sae, len(fires), fires.shape[-1])
        rows = torch.nn.functional.normalize(rows, dim=-1)
        found = [
            edges_of(f, W, self.on_NK, self.directions_KD, self.edges)
            for f, W in zip(fires, rows, strict=True)
        ]
        return [(edges.gap, 1 - edges.fires) for edges in found]


def online_truth(scale: Scale, lm: KnownWorld, layer: int) -> OnlineTruth:
    return OnlineTruth(lm, layer)


@torch.no_grad()
def truth_of(sae, lm: KnownWorld, x_ND: torch.Tensor, on_NK: torch.Tensor) -> dict:
    """All that is known of one saved SAE, on rows with these features on."""
    parts = [sae.encode(x) for x in x_ND.split(16384)]
    error = sum(
        (x - sae.decode(f)).square().sum().item()
        for x, f in zip(x_ND.split(16384), parts, strict=True)
    )
    fires_NF, directions_KD = torch.cat([f > 0 for f in parts]), lm.directions_KD.to(x_ND.device)
    edges = edges_of(fires_NF, sae.W_dec, on_NK, directions_KD, lm.world.edges)
    return {
        "absorption_gap": edges.gap,
        "parent_fires_alone": edges.fires,
        "parent_cosine": edges.cosine,
        "edges": float(edges.count),
        "mcc": pairwise_mcc(sae.W_dec.cpu(), lm.directions_KD),
        "f1": f1_of(fires_NF, sae.W_dec, on_NK, directions_KD),
        "fvu": error / (x_ND - x_ND.mean(0)).square().sum().item(),
        "l0": fires_NF.sum(1).float().mean().item(),
        "dead": 1 - fires_NF.any(0).float().mean().item(),
    }


def evaluate_truth(
    scale: Scale,
    readout_alphas: tuple[float, ...],
    lm: KnownWorld,
    units: dict[int, Calibration],
    saved: dict[int, dict[str, Path]],
    heldout_NL: torch.Tensor,
    records: list[dict],
    work: Path,
    clock: Clock,
) -> tuple[dict[str, dict], Path]:
    """lab.evaluation.evaluate() of a world: final_info.json's entries, and an empty folder in the
    place of SAE-Bench's files."""
    rows_NLD = harvest(lm, heldout_NL, scale.lm_batch)
    numbers = heldout_NL[~lm.is_special(heldout_NL)]
    entries = {}
    for i, layer in enumerate(lm.layers):
        x_ND, on_NK = rows_NLD[:, i].float(), lm.on_NK[numbers].to(rows_NLD.device)
        kept = x_ND.norm(dim=-1) <= units[layer].outlier_norm
        held = x_ND[kept], on_NK[kept]
        saes = [load_sae(path).to(lm.device) for path in saved[layer].values()]
        known = {"norm_spread": lm.world.norm_spreads[layer], "true_l0": lm.world.true_l0}
        for target_l0, seeds, own in each_target(scale, layer, records):
            curves = ("loss", "mse", "grad_norm")
            trained = [
                stability(*([r[name][s] for r in own] for name in curves))
                for s in range(scale.n_seeds)
            ]
            truths = [truth_of(sae, lm, *held) for sae in saes[seeds]]
            values = by_metric([a | b for a, b in zip(truths, trained, strict=True)])
            decoders = [sae.W_dec.cpu() for sae in saes[seeds]]
            values["decoder_pw_mcc"] = between_seeds(decoders, pairwise_mcc)
            alone = {"l0_target": target_l0, "training_steps": float(len(own))}
            found = entry(values, alone) | {"notes": known | units_notes(units[layer])}
            entries[title(scale, layer, target_l0)] = found
            for alpha in readout_alphas:
                swapped = [truth_of(read_out(sae, alpha), lm, *held) for sae in saes[seeds]]
                entries[title(scale, layer, target_l0, alpha)] = entry(by_metric(swapped), {})
    clock.lap("ground truth")
    folder = work / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    return entries, folder
