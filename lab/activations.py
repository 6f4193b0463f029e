"""From contexts to batches of residuals: calibration, harvest, blocks, their order."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from lab.language_model import LanguageModel
from lab.process import Ranks, require, seed_for
from lab.scales import Scale
from lab.storage import cached, tensor_sha256
from lab.text import Lane


class Calibration(NamedTuple):
    """Units of one layer, measured on its first block and then fixed."""

    scale: float  # residuals times this have E||x - b_dec||^2 = 1
    b_dec: torch.Tensor  # [D], training units: the mean residual
    mean_norm: float  # E||x - b_dec||, training units
    outlier_norm: float  # residual-stream units; tokens above it are left out of training
    outlier_fraction: float  # of the first block


def finite_norms(x: torch.Tensor) -> torch.Tensor:
    """Norms over the last dimension, in float32.  Raises ExperimentError if one is not finite: it
    would pass for an outlier."""
    norms = x.float().norm(dim=-1)
    require(
        bool(norms.isfinite().all()),
        "the language model's residuals are not finite (NaN or infinity): check its weights",
    )
    return norms


def calibrate(residuals_ND: torch.Tensor, times_median: float = 3.0) -> Calibration:
    """Left in, the 2% of tokens with many times the usual norm would own the squared error.

    An outlier has more than `times_median` times the median norm of the residuals.  Raises
    ExperimentError where residuals have no scale: not finite, or all the same.
    """
    x = residuals_ND.float()
    norms = finite_norms(x)
    limit = times_median * norms.median().item()
    kept = x[norms <= limit]
    mean = kept.mean(0)
    distances = (kept - mean).norm(dim=-1)
    spread = distances.square().mean().sqrt().item()
    require(
        spread > 1e-6 * limit,
        "the language model's residuals are the same at every token: check its weights and the "
        "text",
    )
    scale = 1.0 / spread
    outliers = 1 - len(kept) / len(x)
    return Calibration(scale, mean * scale, distances.mean().item() * scale, limit, outliers)


def harvest(lm: LanguageModel, contexts_NL: torch.Tensor, batch: int) -> torch.Tensor:
    """Residuals [N, layers, D] of every token of some contexts but BOS and EOS, in text order."""
    parts = []
    for tokens_BL in contexts_NL.split(batch):
        found = lm.residuals(tokens_BL)
        acts = torch.stack([found[layer] for layer in lm.layers], dim=2)
        parts.append(acts[~lm.is_special(tokens_BL).to(acts.device)])
    return torch.cat(parts)


class Block(NamedTuple):
    """Residuals that are shuffled together."""

    before: dict[int, Lane]  # the text as it stood before: from here it can be read again
    rows: torch.Tensor  # [N, layers, D], lane after lane
    lengths: list[int]  # rows of each lane


def residual_blocks(
    scale: Scale, lm: LanguageModel, text: Iterable[tuple[dict[int, Lane], torch.Tensor]]
) -> Iterator[Block]:
    """The residuals of blocks of text, as they are asked for.

    With keep_activations each is a cache entry of its own, so that later runs (and a run that was
    killed) skip the language model.
    """
    for before, contexts in text:

        def build(folder: Path, contexts: torch.Tensor = contexts) -> None:
            residuals = harvest(lm, contexts, scale.lm_batch).cpu()
            save_file({"residuals": residuals}, folder / "residuals.safetensors")

        if scale.keep_activations:
            tokens = tensor_sha256(contexts)
            key = {**lm.identity, "tokens": tokens, "layers": lm.layers, "lm_batch": scale.lm_batch}
            entry = cached("residuals", key, build)
            rows = load_file(entry / "residuals.safetensors")["residuals"]
        else:
            rows = harvest(lm, contexts, scale.lm_batch)
        per_lane = (~lm.is_special(contexts)).view(len(before), -1).sum(1).tolist()
        yield Block(before, rows, per_lane)


def without_outliers(block: Block, calibrations: list[Calibration]) -> Block:
    """The block less the tokens that are outliers at any layer."""
    limits = torch.tensor([c.outlier_norm for c in calibrations], device=block.rows.device)
    keep_N = (finite_norms(block.rows) <= limits).all(-1)
    lengths = [int(part.sum()) for part in keep_N.split(block.lengths)]
    return Block(block.before, block.rows[keep_N], lengths)


def block_order(
    lanes: Iterable[int], lengths: list[int], n_batches: int, share: int, *names: object
) -> torch.Tensor:
    """Rows [n_batches, lanes * share] of a block's batches: `share` from every lane, at random.

    A lane's order depends on its number and on `names` alone, so that it is the same in every
    process and every execution.  Rows that fill no batch are dropped.
    """
    columns, offset = [], 0
    for lane, length in zip(lanes, lengths, strict=True):
        generator = torch.Generator().manual_seed(seed_for(*names, lane))
        order = torch.randperm(length, generator=generator)[: n_batches * share]
        columns.append(offset + order.view(n_batches, share))
        offset += length
    return torch.cat(columns, dim=1)


class Position(NamedTuple):
    """Where training stands in its text: the next batch is number `batch` of block `block`."""

    block: int
    batch: int
    lanes: dict[int, Lane]  # as they stood before that block


def shuffled_batches(
    scale: Scale, blocks: Iterable[Block], ranks: Ranks, start: Position
) -> Iterator[tuple[Position, torch.Tensor]]:
    """Batches of rows from `start` on, each with the position after it.

    `blocks` begins with block number start.block.  Which rows the n-th batch of a block holds is a
    pure function of the text, the block's number and n; of several processes each gets its part.
    """
    share = scale.batch_tokens // scale.lanes
    for index, block in enumerate(blocks, start.block):
        n_batches = ranks.smallest(min(block.lengths) // share)
        order = block_order(block.before, block.lengths, n_batches, share, "batches", index)
        for n in range(start.batch if index == start.block else 0, n_batches):
            rows = block.rows[order[n].to(block.rows.device)]
            yield Position(index, n + 1, block.before), rows
