"""From contexts to batches of residuals: calibration, harvest, blocks, their order."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from lab.devices import Ranks
from lab.language_model import LanguageModel
from lab.process import require
from lab.scales import Scale
from lab.seeds import seed_for
from lab.storage import cached, disjoint, save_tensors, tensor_sha256
from lab.text import Lane, ahead, text_blocks

COLUMNS = 64  # that are summed at a time: of fewer, a CPU adds up the rows in another order


class Calibration(NamedTuple):
    """Units of one layer, measured on its first block and then fixed."""

    scale: float  # residuals times this have E||x - b_dec||^2 = 1
    b_dec: torch.Tensor  # [D], training units: the mean residual
    outlier_norm: float  # residual-stream units; tokens above it are left out of training
    outlier_fraction: float  # of the first block

    def ordinary(self, residuals_ND: torch.Tensor) -> torch.Tensor:
        """The rows that are no outliers, in float32."""
        residuals_ND = residuals_ND.float()
        return residuals_ND[residuals_ND.norm(dim=-1) <= self.outlier_norm]


def finite_norms(x: torch.Tensor) -> torch.Tensor:
    """Norms over the last dimension, in float32.  Raises ExperimentError if one is not finite: it
    would pass for an outlier."""
    # Some rows at a time: in float32 a whole block would be two more of them in memory.
    norms = torch.cat([some.float().norm(dim=-1) for some in x.split(4096)])
    require(
        bool(norms.isfinite().all()),
        "the language model's residuals are not finite (NaN or infinity): check its weights",
    )
    return norms


def calibrate(residuals_ND: torch.Tensor, ranks: Ranks, times_median: float = 3.0) -> Calibration:
    """Left in, the 2% of tokens with many times the usual norm would own the squared error.

    An outlier has more than `times_median` times the median norm of the residuals, of which every
    process has its part.  Raises ExperimentError where they have no scale: not finite, or all the
    same.
    """
    norms_N = finite_norms(residuals_ND)
    limit = times_median * ranks.joined(norms_N).median().item()
    kept = (norms_N <= limit).nonzero()[:, 0]
    n_kept, n_all = (sum(ranks.gathered(len(rows))) for rows in (kept, norms_N))
    # Some columns, then some rows at a time: see finite_norms().
    sums = [columns[kept].float().sum(0) for columns in residuals_ND.split(COLUMNS, dim=1)]
    mean = ranks.total_(torch.cat(sums)) / n_kept
    rows = (residuals_ND[some].float() for some in kept.split(4096))
    distances = torch.cat([(some - mean).norm(dim=-1) for some in rows])
    spread = (ranks.total_(distances.square().sum()) / n_kept).sqrt().item()
    require(
        spread > 1e-6 * limit,
        "the language model's residuals are the same at every token: check its weights and the "
        "text",
    )
    scale = 1.0 / spread
    return Calibration(scale, mean * scale, limit, 1 - n_kept / n_all)


def harvest(lm: LanguageModel, contexts_NL: torch.Tensor, batch: int) -> torch.Tensor:
    """Residuals [N, layers, D] of every token of some contexts but BOS and EOS, in text order."""
    ordinary_NL = ~lm.is_special(contexts_NL)
    rows, filled = None, 0
    for tokens_BL, ordinary_BL in zip(
        contexts_NL.split(batch), ordinary_NL.split(batch), strict=True
    ):
        found = lm.residuals(tokens_BL)
        acts = torch.stack([found[layer] for layer in lm.layers], dim=2)
        some = acts[ordinary_BL.to(acts.device)]
        if rows is None:  # written in place: parts and what they are joined to would be two blocks
            rows = some.new_empty(int(ordinary_NL.sum()), *some.shape[1:])
        rows[filled : filled + len(some)] = some
        filled += len(some)
    return rows


class Block(NamedTuple):
    """Residuals that are shuffled together.

    On a GPU there is room for one of them and a little: whoever passes blocks on holds none while
    the next is made, and none is copied."""

    before: dict[int, Lane]  # the text as it stood before: from here it can be read again
    rows: torch.Tensor  # [N, layers, D], lane after lane
    chosen: torch.Tensor  # the rows that are trained on, in order
    lengths: list[int]  # how many of them each lane has


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
            save_tensors({"residuals": residuals}, folder / "residuals.safetensors")

        per_lane = (~lm.is_special(contexts)).view(len(before), -1).sum(1).tolist()
        if scale.keep_activations:
            tokens = tensor_sha256(contexts)
            read = {"tokens": tokens, "layers": lm.layers, "lm_batch": scale.lm_batch}
            kept = cached("residuals", disjoint(lm.identity, read), build) / "residuals.safetensors"
            yield whole_block(before, load_file(kept)["residuals"], per_lane)
        else:
            yield whole_block(before, harvest(lm, contexts, scale.lm_batch), per_lane)


def whole_block(before: dict[int, Lane], rows: torch.Tensor, per_lane: list[int]) -> Block:
    """A block of which every row is trained on."""
    return Block(before, rows, torch.arange(len(rows), device=rows.device), per_lane)


def without_outliers(block: Block, calibrations: list[Calibration]) -> Block:
    """The block less the tokens that are outliers at any layer."""
    limits = torch.tensor([c.outlier_norm for c in calibrations], device=block.rows.device)
    keep_N = (finite_norms(block.rows) <= limits).all(-1)[block.chosen]
    lengths = [int(part.sum()) for part in keep_N.cpu().split(block.lengths)]
    return block._replace(chosen=block.chosen[keep_N], lengths=lengths)


def first_of(block: list[Block], others: Iterable[Block]) -> Iterator[Block]:
    """The one block of a list, which is emptied, and then the others."""
    yield block.pop()
    yield from others


def block_order(
    lanes: Iterable[int], lengths: list[int], n_batches: int, share: int, *names: object
) -> torch.Tensor:
    """Rows [n_batches, lanes * share] of a block's batches: `share` from every lane, at random.

    A lane's order depends on its number and on `names` alone, so that it is the same in every
    process and every execution, and for a seed in every run.  Rows that fill no batch are dropped.
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
    """Batches of rows [seeds, B, layers, D] from `start` on, each with the position after it.

    `blocks` begins with block number start.block.  Every seed goes through a block in an order of
    its own.  Which rows its n-th batch of a block holds is a pure function of the text, the block's
    number, the seed and n; of several processes each gets its part.
    """
    share, index = scale.batch_tokens // scale.lanes, start.block
    for block in blocks:
        n_batches = ranks.smallest(min(block.lengths) // share)
        orders = [
            block_order(block.before, block.lengths, n_batches, share, "batches", index, seed)
            for seed in range(scale.n_seeds)
        ]
        order = block.chosen[torch.stack(orders, dim=1).to(block.chosen.device)]
        for n in range(start.batch if index == start.block else 0, n_batches):
            yield Position(index, n + 1, block.before), block.rows[order[n]]
        index += 1  # not enumerate(), which would hold the block while the next is made
        del block


class ActivationStream:
    """Batches of residuals, each seed's in its fixed order, begun anew or where a checkpoint left
    them.

    One pass of the language model feeds every layer.  `position` is the place in the text; whoever
    reads sets it when a batch is done with.
    """

    def __init__(
        self,
        scale: Scale,
        lm: LanguageModel,
        ranks: Ranks,
        first_document: int,
        state: dict | None = None,
    ):
        """`state`: what state() gave, if there is a checkpoint."""
        self.scale, self.ranks = scale, ranks
        mine = ranks.lanes(scale.lanes)
        if state:
            lanes = {i: Lane(**state["lanes"][i]) for i in mine}
            self.position = Position(state["block"], state["batch"], lanes)
        else:
            self.position = Position(0, 0, {i: Lane(first_document, []) for i in mine})
        self._text = ahead(text_blocks(scale, lm, self.position.lanes))
        self._blocks = residual_blocks(scale, lm, self._text)

    def calibrations(self) -> list[Calibration]:
        """Units of every layer, from the first block, which stays to be read.  Raises
        ExperimentError if the text is shorter than that."""
        first = next(self._blocks, None)
        require(
            first is not None,
            f"the text of scale {self.scale.name!r} is shorter than one block of "
            f"{self.scale.block_contexts} contexts: add text or lower block_contexts",
        )
        self._blocks = first_of([first], self._blocks)
        n_layers = len(self.scale.layers)
        return [calibrate(first.rows[:, i], self.ranks) for i in range(n_layers)]

    def batches(self, units: list[Calibration]) -> Iterator[tuple[Position, torch.Tensor]]:
        """Rows [seeds, B, layers, D], outliers left out, each with the position after it, to the
        end of the text."""
        blocks = map(partial(without_outliers, calibrations=units), self._blocks)
        return shuffled_batches(self.scale, blocks, self.ranks, self.position)

    def state(self) -> dict:
        """What __init__ takes; of several processes all must call it."""
        block, batch, lanes = self.position
        lanes = {i: lane for part in self.ranks.gathered(lanes) for i, lane in part.items()}
        return {"block": block, "batch": batch, "lanes": {i: asdict(lanes[i]) for i in lanes}}

    def close(self) -> None:
        """Its thread must not tokenise while SAE-Bench does."""
        self._text.close()
