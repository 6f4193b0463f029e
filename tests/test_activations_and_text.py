"""Packing, probing texts, calibration, outliers, and the order that batches are drawn in."""

import itertools
import random

import pytest
import torch

import experiment

# ── Packing ─────────────────────────────────────────────────────────────────────────────────────

BOS, EOS = -1, -2


def check_packing(documents: list[list[int]], length: int) -> list[list[int]]:
    """What pack() makes of some documents, after checking that it is all of them, in order."""
    contexts = list(experiment.pack(documents, length, BOS, EOS))
    assert all(len(context) == length for context in contexts)
    assert all(context[0] == BOS and BOS not in context[1:] for context in contexts)
    packed = [token for context in contexts for token in context[1:]]
    stream = [token for document in documents for token in (*document, EOS)]
    assert packed == stream[: len(packed)], "in order, nothing lost and nothing twice"
    assert len(stream) - len(packed) < length - 1, "only a remainder too short is left out"
    return contexts


def test_documents_are_packed_end_to_end_with_bos_first_and_eos_between():
    contexts = check_packing([[1, 2, 3], [4], [5, 6, 7, 8], [9]], length=5)
    assert contexts == [[BOS, 1, 2, 3, EOS], [BOS, 4, EOS, 5, 6], [BOS, 7, 8, EOS, 9]]


@pytest.mark.parametrize("length", [2, 3, 8, 128])
def test_packing_loses_and_doubles_nothing_but_the_remainder(length):
    r = random.Random(length)
    counter = itertools.count()
    documents = [[next(counter) for _ in range(r.choice([0, 1, 5, 7, 300]))] for _ in range(60)]
    check_packing(documents, length)


def test_a_document_of_many_contexts_is_cut_and_goes_on_in_the_next_one():
    contexts = check_packing([[7], list(range(100, 20_100)), [8, 9]], length=128)
    assert len(contexts) == 157
    assert all(EOS not in context for context in contexts[1:-1])


def test_a_document_that_just_fills_a_context_hands_its_eos_to_the_next():
    assert check_packing([[1, 2, 3], [4, 5]], length=4) == [[BOS, 1, 2, 3], [BOS, EOS, 4, 5]]


@pytest.mark.parametrize("documents", [[], [[]], [[1, 2]]])
def test_too_little_text_for_a_context_gives_none(documents):
    assert check_packing(documents, length=5) == []


def test_empty_documents_do_not_break_the_packing():
    assert check_packing([[], [1], [], [2, 3]], length=4) == [[BOS, EOS, 1, EOS], [BOS, EOS, 2, 3]]


def test_packing_reads_no_further_than_it_must():
    documents = iter([[i] * 9 for i in range(10)])
    packed = experiment.pack(documents, 11, BOS, EOS)
    assert [next(packed)[1] for _ in range(3)] == [0, 1, 2]
    assert next(documents) == [3] * 9


# ── Shingles and probing tasks ──────────────────────────────────────────────────────────────────


def words(first: int, n: int) -> str:
    return " ".join(f"word{i}" for i in range(first, first + n))


def test_a_text_has_one_shingle_for_every_run_of_8_words():
    assert len(experiment.shingles(words(0, 8))) == 1
    assert len(experiment.shingles(words(0, 20))) == 13
    assert len(experiment.shingles(words(0, 20), words=3)) == 18


def test_a_text_below_8_words_is_one_shingle_of_its_own():
    assert len(experiment.shingles("a b c")) == 1
    assert experiment.shingles("a b c") != experiment.shingles("a b")
    assert experiment.shingles("a b c").isdisjoint(experiment.shingles("a b c d e f g h"))
    assert len(experiment.shingles("")) == 1


def test_shingles_ignore_case_and_spacing_but_not_order():
    text = "One two three four five six seven eight"
    assert experiment.shingles(text) == experiment.shingles("  " + text.upper().replace(" ", "\n "))
    turned = " ".join(reversed(text.split()))
    assert experiment.shingles(text).isdisjoint(experiment.shingles(turned))


@pytest.mark.parametrize(("shared", "found"), [(7, 0), (8, 1), (10, 3)])
def test_two_texts_share_a_shingle_from_8_words_in_common_on(shared, found):
    a = words(0, 30) + " " + words(500, shared)
    b = words(500, shared) + " " + words(1000, 30)
    assert len(experiment.shingles(a) & experiment.shingles(b)) == found


@pytest.fixture
def made_up_files(monkeypatch):
    """A task "fruit" of two classes and two files of prose, in place of the files on disk."""
    files = {
        1: [(words(100 * i, 20), 1) for i in range(8)] + [(words(9000, 20), 0)],
        2: [(words(100 * i, 20), 1) for i in range(50, 58)],
        3: [(words(100 * i, 20), 1) for i in range(80, 84)],
    }
    monkeypatch.setitem(experiment.TASKS, "fruit", {"apple": (1, 1), "pear": (2, 1)})
    monkeypatch.setattr(experiment, "PROSE", (3,))
    monkeypatch.setattr(experiment, "sae_probes_rows", lambda number: files[number])
    return files


def texts_of(split: dict[str, list[str]]) -> list[str]:
    return [text for texts in split.values() for text in texts]


def test_a_probing_task_has_the_sizes_asked_for_and_shares_no_text_between_its_splits(
    made_up_files,
):
    train, test = experiment.probing_task("fruit", 5, 3)
    assert {label: len(texts) for label, texts in train.items()} == {"apple": 5, "pear": 5}
    assert {label: len(texts) for label, texts in test.items()} == {"apple": 3, "pear": 3}
    assert len({*texts_of(train), *texts_of(test)}) == 16
    own = {"apple": {t for t, v in made_up_files[1] if v == 1}, "pear": dict(made_up_files[2])}
    assert all({*train[label], *test[label]} <= set(own[label]) for label in own)


def test_a_probing_task_does_not_depend_on_the_order_of_its_files(made_up_files):
    before = experiment.probing_task("fruit", 4, 2)
    made_up_files[1].reverse()
    made_up_files[2].reverse()
    assert experiment.probing_task("fruit", 4, 2) == before


@pytest.mark.parametrize(
    ("spoilt", "left"), [("claimed by both classes", 7), ("doubled", 8), ("nearly doubled", 8)]
)
def test_a_text_that_stands_twice_is_left_out_of_a_probing_task(made_up_files, spoilt, left):
    text = made_up_files[1][0][0]
    other = "intro " + text + " and more" if spoilt == "nearly doubled" else text
    made_up_files[2 if spoilt == "claimed by both classes" else 1].append((other, 1))
    train, test = experiment.probing_task("fruit", left - 2, 2)
    copies = sum(text in t for t in texts_of(train) + texts_of(test))
    assert copies == (0 if spoilt == "claimed by both classes" else 1)
    with pytest.raises(experiment.ExperimentError, match=f"has {left} texts of class 'apple'"):
        experiment.probing_task("fruit", left - 1, 2)


def test_a_probing_task_with_too_few_texts_is_refused_with_what_to_lower(made_up_files):
    with pytest.raises(experiment.ExperimentError, match=r"'fruit' has 8 .*lower probe_train_set"):
        experiment.probing_task("fruit", 6, 3)


def test_training_text_shares_no_run_of_8_words_with_a_probing_text(made_up_files):
    scale = experiment.Scale(
        "tiny", "none", "none", (0,), 2048, tasks=("fruit",),
        probe_train_set_size=12, probe_test_set_size=4,
    )  # fmt: skip
    probing = made_up_files[1][0][0].split()
    clean = {text for text, _ in made_up_files[3]}
    made_up_files[3] += [
        ("a page that quotes " + " ".join(probing[4:12]) + " in the middle", 1),
        ("a page that nearly quotes " + " ".join(probing[4:11]) + " in the middle", 1),
        made_up_files[3][0],
    ]
    clean.add(made_up_files[3][-2][0])
    found = experiment.training_documents(scale)
    assert set(found) == clean
    assert len(found) == len(clean), "no document twice"
    assert found == experiment.training_documents(scale), "in a fixed order"


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
    units = experiment.calibrate(x)
    kept = x[: len(x) - outliers] * units.scale
    distances = (kept - units.b_dec).norm(dim=-1)
    assert distances.square().mean().item() == pytest.approx(1.0, abs=1e-5)
    assert units.mean_norm == pytest.approx(distances.mean().item(), rel=1e-5)
    assert units.mean_norm < 1
    torch.testing.assert_close(units.b_dec, kept.mean(0))


def test_outliers_are_found_by_their_norm_and_counted():
    x = residuals(outliers=8)
    units = experiment.calibrate(x)
    norms = x.norm(dim=-1)
    assert units.outlier_norm == pytest.approx(3 * norms.sort().values[199].item())
    assert ((norms > units.outlier_norm).nonzero().flatten() >= 392).all()
    assert units.outlier_fraction == pytest.approx(8 / 400)
    assert experiment.calibrate(residuals()).outlier_fraction == 0


def test_outliers_left_in_would_change_the_unit():
    x = residuals(outliers=8)
    with_them = experiment.calibrate(x, times_median=1000.0)
    assert with_them.outlier_fraction == 0
    assert with_them.scale < 0.5 * experiment.calibrate(x).scale


def test_calibration_of_bfloat16_residuals_is_computed_in_float32():
    x = residuals(outliers=8)
    exact, found = experiment.calibrate(x), experiment.calibrate(x.bfloat16())
    assert found.b_dec.dtype == torch.float32
    assert found.scale == pytest.approx(exact.scale, rel=1e-3)


def test_a_token_that_is_an_outlier_at_any_layer_is_left_out_at_all():
    unit = experiment.Calibration(1.0, torch.zeros(2), 1.0, 10.0, 0.0)
    block = torch.tensor(
        [
            [[1.0, 0.0], [1.0, 0.0]],
            [[11.0, 0.0], [2.0, 0.0]],  # at the first layer
            [[3.0, 0.0], [0.0, 4.1]],  # at the second
            [[6.0, 8.0], [0.0, 4.0]],  # just on both limits
        ]
    )
    calibrations = [unit, unit._replace(outlier_norm=4.0)]
    (kept,) = experiment.without_outliers([block], calibrations)
    assert torch.equal(kept, block[[0, 3]])
    first, second = experiment.without_outliers([block[:2].bfloat16(), block[2:]], calibrations)
    assert (len(first), len(second)) == (1, 1)
    assert first.dtype == torch.bfloat16


# ── Shuffled batches ────────────────────────────────────────────────────────────────────────────


def numbered(*sizes: int) -> list[torch.Tensor]:
    """Blocks whose rows are numbered through."""
    return list(torch.arange(sum(sizes))[:, None].split(list(sizes)))


def drawn(blocks, batch: int, seed: int = 5) -> list[list[int]]:
    return [b.flatten().tolist() for b in experiment.shuffled_batches(blocks, batch, seed)]


@pytest.mark.parametrize("sizes", [(12,), (12, 8), (13, 3, 6, 10), (4, 0, 4)])
def test_batches_are_full_and_hold_every_row_at_most_once(sizes):
    batches = drawn(numbered(*sizes), 4)
    rows = [row for batch in batches for row in batch]
    assert all(len(batch) == 4 for batch in batches)
    assert len(set(rows)) == len(rows)
    assert len(batches) == sum(size // 4 for size in sizes), "only a block's remainder is dropped"


def test_a_batch_comes_from_one_block_and_blocks_come_in_order():
    owners = [{row // 12 for row in batch} for batch in drawn(numbered(12, 12), 4)]
    assert owners == [{0}, {0}, {0}, {1}, {1}, {1}]


def test_rows_are_shuffled_and_keep_what_belongs_to_them():
    (rows,) = numbered(400)
    (batch,) = experiment.shuffled_batches([torch.cat([rows, 3 * rows], dim=1)], 400, 5)
    assert batch[:, 0].tolist() != list(range(400))
    assert torch.equal(batch[:, 1], 3 * batch[:, 0])


def test_the_order_is_a_pure_function_of_seed_block_and_batch():
    whole = drawn(numbered(40, 40), 4)
    assert drawn(numbered(40, 40), 4) == whole
    assert drawn(numbered(40, 40), 4, seed=6) != whole
    # Another first block, as long as it is there, leaves the second block's order alone.
    second = drawn([torch.empty(17, 1), numbered(40, 40)[1]], 4)[-10:]
    assert second == whole[10:]


def test_each_block_has_an_order_of_its_own():
    first, second = (drawn(numbered(40, 40), 40)[i] for i in (0, 1))
    assert first != [row - 40 for row in second]


def test_the_order_neither_uses_nor_disturbs_the_global_generator():
    torch.manual_seed(0)
    undisturbed, expected = torch.rand(3).tolist(), drawn(numbered(40, 40), 4)
    torch.manual_seed(0)
    found, between = [], []
    for batch in experiment.shuffled_batches(numbered(40, 40), 4, 5):
        found.append(batch.flatten().tolist())
        if len(between) < 3:
            between.append(torch.rand(1).item())
    assert found == expected
    assert between == undisturbed


def test_a_block_is_read_only_when_its_first_batch_is_asked_for():
    read = []

    def blocks():
        for index, block in enumerate(numbered(8, 8, 8)):
            read.append(index)
            yield block

    batches = experiment.shuffled_batches(blocks(), 4, 5)
    assert read == []
    for expected in ([0], [0], [0, 1], [0, 1], [0, 1, 2]):
        next(batches)
        assert read == expected


def test_the_whole_chain_is_lazy_and_leaves_outliers_out():
    read = []

    def blocks():
        for index in range(10):
            read.append(index)
            block = residuals(100, outliers=4, seed=index)
            yield torch.stack([block, block], dim=1)

    unit = experiment.calibrate(residuals(100, outliers=4))
    kept = experiment.without_outliers(blocks(), [unit, unit])
    batches = experiment.shuffled_batches(kept, 32, 5)
    found = [next(batches) for _ in range(6)]
    assert read == [0, 1]
    assert all(batch.shape == (32, 2, 6) for batch in found)
    assert max(batch.norm(dim=-1).max().item() for batch in found) <= unit.outlier_norm
