"""Calibration, blocks of residuals, and the order that batches are drawn in."""

import gc
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny import IN_LANES, ReadingModel, fresh, in_pairs

import lab.storage
from lab.activations import (
    ActivationStream,
    Block,
    Calibration,
    Position,
    calibrate,
    harvest,
    residual_blocks,
    shuffled_batches,
    whole_block,
    without_outliers,
)
from lab.devices import Ranks
from lab.process import ExperimentError
from lab.text import text_blocks

LM, SCALE = ReadingModel(), replace(IN_LANES, n_seeds=1)
ALONE = Ranks()


# ── Calibration ─────────────────────────────────────────────────────────────────────────────────


def residuals(n: int = 400, outliers: int = 0, seed: int = 0) -> torch.Tensor:
    """Tokens around a mean that is not 0; the last `outliers` of them 30 times as long."""
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)) * 2
    x += torch.tensor([3.0, -1.0, 0.0, 2.0, 0.0, 5.0])
    x[n - outliers :] *= 30
    return x


@pytest.mark.parametrize("outliers", [0, 8])
def test_the_unit_of_training_is_the_root_mean_square_distance_of_kept_tokens(outliers):
    x = residuals(outliers=outliers)
    units = calibrate(x, ALONE)
    kept = x[: len(x) - outliers] * units.scale
    distances = (kept - units.b_dec).norm(dim=-1)
    assert distances.square().mean().item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(units.b_dec, kept.mean(0))


def test_outliers_are_found_by_their_norm_and_counted():
    x = residuals(outliers=8)
    units = calibrate(x, ALONE)
    norms = x.norm(dim=-1)
    assert units.outlier_norm == pytest.approx(3 * norms.sort().values[199].item())
    assert ((norms > units.outlier_norm).nonzero().flatten() >= 392).all()
    assert units.outlier_fraction == pytest.approx(8 / 400)
    assert calibrate(residuals(), ALONE).outlier_fraction == 0


def test_outliers_left_in_would_change_the_unit():
    x = residuals(outliers=8)
    with_them = calibrate(x, ALONE, times_median=1000.0)
    assert with_them.outlier_fraction == 0
    assert with_them.scale < 0.5 * calibrate(x, ALONE).scale


def test_calibration_of_bfloat16_residuals_is_computed_in_float32():
    x = residuals(outliers=8)
    exact, found = calibrate(x, ALONE), calibrate(x.bfloat16(), ALONE)
    assert found.b_dec.dtype == torch.float32
    assert found.scale == pytest.approx(exact.scale, rel=1e-3)


@pytest.mark.parametrize("same", [0.0, 2.5])
def test_residuals_that_do_not_vary_have_no_unit(same):
    with pytest.raises(ExperimentError, match="are the same at every token"):
        calibrate(torch.full((50, 6), same), ALONE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_residuals_that_are_not_finite_are_an_error_and_no_outliers(value):
    x = residuals()
    x[7, 3] = value
    with pytest.raises(ExperimentError, match="are not finite"):
        calibrate(x, ALONE)
    units = calibrate(residuals(), ALONE)
    with pytest.raises(ExperimentError, match="are not finite"):
        without_outliers(block(x[:, None], len(x)), [units])


def block(rows: torch.Tensor, *lengths: int, lanes: tuple[int, ...] | None = None) -> Block:
    lanes = lanes or tuple(range(len(lengths)))
    return whole_block(fresh(lanes), rows, list(lengths))


def test_a_token_that_is_an_outlier_at_any_layer_is_left_out_at_all():
    unit = Calibration(1.0, torch.zeros(2), 10.0, 0.0)
    rows = torch.tensor(
        [
            [[1.0, 0.0], [1.0, 0.0]],
            [[11.0, 0.0], [2.0, 0.0]],  # at the first layer
            [[3.0, 0.0], [0.0, 4.1]],  # at the second
            [[6.0, 8.0], [0.0, 4.0]],  # just on both limits
        ]
    )
    calibrations = [unit, unit._replace(outlier_norm=4.0)]
    for lengths, left in (((4,), [2]), ((2, 2), [1, 1]), ((1, 0, 3), [1, 0, 1]), ((3, 1), [1, 1])):
        whole = block(rows.bfloat16(), *lengths)
        kept = without_outliers(whole, calibrations)
        assert torch.equal(kept.rows[kept.chosen], rows[[0, 3]].bfloat16())
        assert kept.rows is whole.rows, "nothing is copied"
        assert kept.lengths == left, "every lane is shorter by its own outliers"
        assert kept.before == whole.before


# ── Residuals of blocks of text ─────────────────────────────────────────────────────────────────


def test_a_block_of_residuals_has_every_token_but_special_ones_lane_after_lane(documents):
    start = fresh((0, 1, 2, 3))
    text = list(itertools.islice(text_blocks(SCALE, LM, start), 3))
    for (before, contexts), found in zip(text, residual_blocks(SCALE, LM, text), strict=True):
        tokens = [[t for t in c if t >= 0] for c in contexts.tolist()]
        flat = torch.tensor([t for c in tokens for t in c]).float()
        assert found.before is before
        assert found.rows.shape == (len(flat), 2, 2)
        assert torch.equal(found.rows[:, 0, 0], flat)
        assert torch.equal(found.rows[:, 1, 0], flat + 2), "layer after layer"
        assert found.lengths == [len(a) + len(b) for a, b in in_pairs(tokens)]


def test_kept_activations_are_read_back_in_place_of_the_language_model(
    documents, tmp_path, monkeypatch
):
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path))
    lm, keeps = ReadingModel(), replace(SCALE, keep_activations=True)

    def rows(scale) -> list[torch.Tensor]:
        text = itertools.islice(text_blocks(scale, lm, fresh((0, 1, 2, 3))), 2)
        return [found.rows for found in residual_blocks(scale, lm, text)]

    first, passes = rows(keeps), lm.passes
    assert passes == 2 * 3  # 8 contexts are three batches of 3
    again = rows(keeps)
    assert lm.passes == passes
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    rows(replace(keeps, lm_batch=4))
    assert lm.passes == passes + 2 * 2, "other batches round differently"
    rows(SCALE)
    assert lm.passes == passes + 2 * 2 + 2 * 3, "nothing is kept unless it is asked for"


def test_kept_activations_of_other_code_or_under_a_key_that_lost_a_value_are_not_read(
    documents, tmp_path, monkeypatch
):
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path))
    lm, keeps = ReadingModel(), replace(SCALE, keep_activations=True)
    text = list(itertools.islice(text_blocks(SCALE, lm, fresh((0, 1, 2, 3))), 1))
    asked, found = [], lab.storage.code_behind

    def code_behind(module: str) -> str:
        asked.append(module)
        return found(module)

    monkeypatch.setattr(lab.storage, "code_behind", code_behind)
    list(residual_blocks(keeps, lm, text))
    list(residual_blocks(keeps, lm, text))
    assert lm.passes == 3
    assert set(asked) == {"lab.activations"}, "the room that makes them"
    monkeypatch.setattr(lab.storage, "code_behind", lambda module: "edited")
    list(residual_blocks(keeps, lm, text))
    assert lm.passes == 2 * 3
    lm.identity = {"model": "reader", "tokens": "of its own"}
    with pytest.raises(ValueError, match="tokens"):
        list(residual_blocks(keeps, lm, text))


# ── Shuffled batches ────────────────────────────────────────────────────────────────────────────

START = Position(0, 0, {})


def numbered(*lengths: tuple[int, ...], lanes: tuple[int, ...] | None = None) -> list[Block]:
    """Blocks whose rows are numbered through; `lengths`: rows of each lane, for every block."""
    first, found = 0, []
    for sizes in lengths:
        rows = torch.arange(first, first + sum(sizes))[:, None]
        found.append(block(rows, *sizes, lanes=lanes))
        first += sum(sizes)
    return found


def drawn(blocks, start: Position = START, ranks=ALONE) -> list[list[int]]:
    """Batches of 8 rows, two from each of four lanes."""
    found = shuffled_batches(SCALE, blocks, ranks, start)
    return [rows.flatten().tolist() for _, rows in found]


BLOCKS = ((8, 9, 8, 12), (4, 30, 5, 4), (1, 9, 9, 9), (6, 6, 6, 6))  # 4, 2, 0 and 3 batches


def test_batches_are_full_and_hold_every_row_at_most_once():
    batches = drawn(numbered(*BLOCKS))
    rows = [row for batch in batches for row in batch]
    assert [len(batch) for batch in batches] == [8] * 9, "what fills no batch is dropped"
    assert len(set(rows)) == len(rows)


def test_every_lane_gives_a_batch_its_share_and_blocks_come_in_order():
    # Rows 0 to 36 are the first block's, its lanes begin at 0, 8, 17 and 25.
    batches = drawn(numbered(*BLOCKS))
    starts = list(itertools.accumulate(itertools.chain(*BLOCKS), initial=0))
    lane_of = {row: n for n, (a, b) in enumerate(itertools.pairwise(starts)) for row in range(a, b)}
    owners = [[lane_of[row] for row in batch] for batch in batches]
    shares = [[4 * b, 4 * b, 4 * b + 1, 4 * b + 1, 4 * b + 2, 4 * b + 2, 4 * b + 3, 4 * b + 3]
              for b in (0, 0, 0, 0, 1, 1, 3, 3, 3)]  # fmt: skip
    assert owners == shares


def test_rows_are_shuffled_and_keep_what_belongs_to_them():
    (whole,) = numbered((80,) * 4)
    rows = torch.cat([whole.rows, 3 * whole.rows], dim=1)
    batches = shuffled_batches(SCALE, [block(rows, *(80,) * 4)], ALONE, START)
    found = torch.cat([batch[0] for _, batch in batches])
    assert sorted(found[:, 0].tolist()) == list(range(320))
    of_lane_0 = [row for row in found[:, 0].tolist() if row < 80]
    assert of_lane_0 != sorted(of_lane_0)
    assert torch.equal(found[:, 1], 3 * found[:, 0])


def test_the_order_of_a_lane_depends_on_its_number_and_the_blocks_number_alone():
    def of_lane_2(found: list[list[int]], first: int) -> list[int]:
        return [row - first for batch in found for row in batch[4:6]]

    whole = of_lane_2(drawn(numbered((40, 40, 40, 40))), 80)
    assert of_lane_2(drawn(numbered((44, 50, 40, 61))), 94) == whole, "not on the other lanes"
    assert drawn(numbered((40,) * 4)) == drawn(numbered((40,) * 4))
    second = of_lane_2(drawn(numbered((0,) * 4, (40,) * 4)), 80)
    assert sorted(second) == sorted(whole) and second != whole, "each block has its own order"
    of_lane_1 = [row - 40 for batch in drawn(numbered((40,) * 4)) for row in batch[2:4]]
    assert sorted(of_lane_1) == sorted(whole) and of_lane_1 != whole, "and so has each lane"


def test_every_seed_goes_through_a_block_in_an_order_of_its_own():
    three = replace(SCALE, n_seeds=3)
    batches = [rows for _, rows in shuffled_batches(three, numbered((40,) * 4), ALONE, START)]
    assert {rows.shape for rows in batches} == {(3, 8, 1)}
    first, second, third = (rows.flatten().tolist() for rows in torch.cat(batches, dim=1))
    assert sorted(first) == sorted(second) == sorted(third) == list(range(160))
    assert first != second != third != first
    of_lane_0 = [[row for row in rows if row < 40] for rows in (first, second)]
    assert of_lane_0[0] != of_lane_0[1], "within a lane too"
    alone = [row for batch in drawn(numbered((40,) * 4)) for row in batch]
    assert alone == first, "whatever seeds stand beside it"


def test_the_order_neither_uses_nor_disturbs_the_global_generator():
    torch.manual_seed(0)
    undisturbed, expected = torch.rand(3).tolist(), drawn(numbered((40,) * 4))
    torch.manual_seed(0)
    found, between = [], []
    for _, batch in shuffled_batches(SCALE, numbered((40,) * 4), ALONE, START):
        found.append(batch.flatten().tolist())
        if len(between) < 3:
            between.append(torch.rand(1).item())
    assert found == expected
    assert between == undisturbed


def test_a_block_is_read_only_when_its_first_batch_is_asked_for():
    read = []

    def blocks():
        for index, found in enumerate(numbered((4,) * 4, (4,) * 4, (4,) * 4)):
            read.append(index)
            yield found

    batches = shuffled_batches(SCALE, blocks(), ALONE, START)
    assert read == []
    for expected in ([0], [0], [0, 1], [0, 1], [0, 1, 2]):
        next(batches)
        assert read == expected


def test_going_on_from_any_position_gives_the_batches_of_an_uninterrupted_pass():
    blocks = numbered(*BLOCKS)
    whole = list(shuffled_batches(SCALE, blocks, ALONE, START))
    assert [position[:2] for position, _ in whole] == [
        *((0, n) for n in (1, 2, 3, 4)),
        *((1, n) for n in (1, 2)),
        *((3, n) for n in (1, 2, 3)),
    ]
    for n, (position, _) in enumerate(whole):
        assert position.lanes is blocks[position.block].before
        rest = shuffled_batches(SCALE, blocks[position.block :], ALONE, position)
        found = [(p[:2], rows.tolist()) for p, rows in rest]
        assert found == [(p[:2], rows.tolist()) for p, rows in whole[n + 1 :]]


# ── The whole chain ─────────────────────────────────────────────────────────────────────────────

LIMITS = [Calibration(1.0, torch.zeros(2), 400_000.0, 0.0)] * 2


def chain(ranks, position: Position) -> Iterator[tuple[Position, torch.Tensor]]:
    """Documents to batches, as a training reads them, on a limit that some tokens are above."""
    text = text_blocks(SCALE, LM, position.lanes)
    blocks = residual_blocks(SCALE, LM, text)
    kept = (without_outliers(found, LIMITS) for found in blocks)
    return shuffled_batches(SCALE, kept, ranks, position)


class Recorder:
    """Ranks of one process, or of one of several: then smallest() says what it does for all."""

    def __init__(self, told: list[int] | None = None):
        self.told, self.asked = told and iter(told), []

    def smallest(self, n: int) -> int:
        self.asked.append(n)
        return next(self.told) if self.told else n


def test_batches_are_the_same_in_one_process_and_in_several_and_after_any_interruption(documents):
    ranks = Recorder()
    whole = list(chain(ranks, Position(0, 0, fresh((0, 1, 2, 3)))))
    tokens = [batch[0, :, 0, 0].long().tolist() for _, batch in whole]
    assert len(tokens) > 100
    assert max(row for batch in tokens for row in batch) < 400_000, "outliers are left out"
    assert len({len(batch) for batch in tokens}) == 1
    everything = [row for batch in tokens for row in batch]
    assert len(set(everything)) == len(everything)

    for part in ((0, 1), (2, 3)):
        told = Recorder(ranks.asked)
        found = list(itertools.islice(chain(told, Position(0, 0, fresh(part))), len(whole)))
        mine = slice(0, 4) if part == (0, 1) else slice(4, 8)
        assert [rows[0, :, 0, 0].long().tolist() for _, rows in found] == [
            batch[mine] for batch in tokens
        ]
        assert max(told.asked) > min(told.asked), "a process alone would have made other batches"
    for n in (0, 3, 50, len(whole) - 1):
        position, _ = whole[n]
        rest = [rows[0, :, 0, 0].long().tolist() for _, rows in chain(Recorder(), position)]
        assert rest == tokens[n + 1 :]


def test_a_block_is_let_go_before_the_next_is_made_and_with_its_reader(documents, monkeypatch):
    made, alive_at = [], []

    def counted(*args):
        gc.collect()
        alive_at.append(sum(block() is not None for block in made))
        rows = harvest(*args)
        made.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(lab.activations, "harvest", counted)
    stream = ActivationStream(SCALE, LM, ALONE, 3)
    stream.calibrations()
    batches = stream.batches(LIMITS)
    for _ in range(30):
        next(batches)
    assert len(made) > 3
    assert set(alive_at) == {0}
    del batches
    gc.collect()
    assert not any(block() is not None for block in made)
