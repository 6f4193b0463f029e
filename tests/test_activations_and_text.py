"""Packing, probing texts, lanes of text, calibration, and the order that batches are drawn in."""

import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import tiny
import torch

import lab.activations
import lab.packaged_text
import lab.process
import lab.scales
import lab.text
from lab.activations import Block, Position
from lab.text import Lane

# ── Packing ─────────────────────────────────────────────────────────────────────────────────────

BOS, EOS = tiny.Numbers.bos_token_id, tiny.Numbers.eos_token_id


@pytest.mark.parametrize(
    ("n_tokens", "length", "contexts"),
    [
        (7, 5, [[BOS, 0, 1, 2, 3]]),
        (8, 5, [[BOS, 0, 1, 2, 3], [BOS, 4, 5, 6, 7]]),
        (3, 2, [[BOS, 0], [BOS, 1], [BOS, 2]]),
        (3, 5, []),
        (0, 5, []),
    ],
)
def test_a_context_is_bos_and_the_tokens_that_fit_and_a_remainder_is_left_out(
    n_tokens, length, contexts
):
    tokens = list(range(n_tokens))
    packed = lab.text.pack(tokens, BOS, length)
    assert packed.tolist() == contexts
    assert packed.shape == (len(contexts), length) and packed.dtype == torch.long
    assert tokens == list(range(n_tokens)), "the list is left as it was"


# ── Shingles and probing tasks ──────────────────────────────────────────────────────────────────


def words(first: int, n: int) -> str:
    return " ".join(f"word{i}" for i in range(first, first + n))


def test_a_text_has_one_shingle_for_every_run_of_8_words():
    assert len(lab.packaged_text.shingles(words(0, 8))) == 1
    assert len(lab.packaged_text.shingles(words(0, 20))) == 13
    assert len(lab.packaged_text.shingles(words(0, 20), words=3)) == 18


def test_a_text_below_8_words_is_one_shingle_of_its_own():
    assert len(lab.packaged_text.shingles("a b c")) == 1
    assert lab.packaged_text.shingles("a b c") != lab.packaged_text.shingles("a b")
    assert lab.packaged_text.shingles("a b c").isdisjoint(
        lab.packaged_text.shingles("a b c d e f g h")
    )
    assert len(lab.packaged_text.shingles("")) == 1


def test_shingles_ignore_case_and_spacing_but_not_order():
    text = "One two three four five six seven eight"
    assert lab.packaged_text.shingles(text) == lab.packaged_text.shingles(
        "  " + text.upper().replace(" ", "\n ")
    )
    turned = " ".join(reversed(text.split()))
    assert lab.packaged_text.shingles(text).isdisjoint(lab.packaged_text.shingles(turned))


@pytest.mark.parametrize(("shared", "found"), [(7, 0), (8, 1), (10, 3)])
def test_two_texts_share_a_shingle_from_8_words_in_common_on(shared, found):
    a = words(0, 30) + " " + words(500, shared)
    b = words(500, shared) + " " + words(1000, 30)
    assert len(lab.packaged_text.shingles(a) & lab.packaged_text.shingles(b)) == found


@pytest.mark.parametrize("order", ["short first", "long first"])
@pytest.mark.parametrize(("shared", "taken"), [(0, True), (11, True), (12, False), (20, False)])
def test_overlap_counts_against_the_shorter_text_whichever_comes_first(order, shared, taken):
    """A text of 20 words has 13 runs of 8: 12 words in a row are 5 of them, 11 words are 4."""
    short = words(0, 20)
    long = f"{words(5000, 60)} {words(0, shared)} {words(6000, 60)}"
    distinct = lab.packaged_text.DistinctTexts()
    first, second = (short, long) if order == "short first" else (long, short)
    assert distinct.take(words(9000, 30)), "others do not matter"
    assert distinct.take(first)
    assert distinct.take(second) is taken
    assert not distinct.take(first) and not distinct.take(second.upper())


def test_overlap_is_counted_with_one_text_at_a_time():
    """5 of 13 runs are too many of one text, and not of two."""
    distinct = lab.packaged_text.DistinctTexts()
    for start in (0, 10):
        assert distinct.take(f"{words(start, 10)} {words(1000 * (1 + start), 20)}")
    assert distinct.take(words(0, 20))  # 3 runs of the one, 3 of the other


def test_a_text_that_was_not_taken_does_not_stand_in_the_way_of_others():
    distinct = lab.packaged_text.DistinctTexts()
    assert distinct.take(words(0, 20))
    assert not distinct.take(f"{words(0, 20)} {words(700, 20)}")
    assert distinct.take(words(700, 20))


@pytest.fixture
def made_up_files(monkeypatch):
    """A task "fruit" of two classes and two files of prose, in place of the files on disk."""
    files = {
        1: [(words(100 * i, 20), 1) for i in range(8)] + [(words(9000, 20), 0)],
        2: [(words(100 * i, 20), 1) for i in range(50, 58)],
        3: [(words(100 * i, 20), 1) for i in range(80, 84)],
    }
    monkeypatch.setitem(lab.packaged_text.TASKS, "fruit", {"apple": (1, 1), "pear": (2, 1)})
    monkeypatch.setattr(lab.packaged_text, "PROSE", (3,))
    monkeypatch.setattr(lab.packaged_text, "sae_probes_rows", lambda number: files[number])
    return files


def texts_of(split: dict[str, list[str]]) -> list[str]:
    return [text for texts in split.values() for text in texts]


def test_a_probing_task_has_the_sizes_asked_for_and_shares_no_text_between_its_splits(
    made_up_files,
):
    train, test = lab.packaged_text.probing_task("fruit", 5, 3)
    assert {label: len(texts) for label, texts in train.items()} == {"apple": 5, "pear": 5}
    assert {label: len(texts) for label, texts in test.items()} == {"apple": 3, "pear": 3}
    assert len({*texts_of(train), *texts_of(test)}) == 16
    own = {"apple": {t for t, v in made_up_files[1] if v == 1}, "pear": dict(made_up_files[2])}
    assert all({*train[label], *test[label]} <= set(own[label]) for label in own)


def test_a_probing_task_does_not_depend_on_the_order_of_its_files(made_up_files):
    before = lab.packaged_text.probing_task("fruit", 4, 2)
    made_up_files[1].reverse()
    made_up_files[2].reverse()
    assert lab.packaged_text.probing_task("fruit", 4, 2) == before


@pytest.mark.parametrize(
    ("spoilt", "left"), [("claimed by both classes", 7), ("doubled", 8), ("nearly doubled", 8)]
)
def test_a_text_that_stands_twice_is_left_out_of_a_probing_task(made_up_files, spoilt, left):
    text = made_up_files[1][0][0]
    other = "intro " + text + " and more" if spoilt == "nearly doubled" else text
    made_up_files[2 if spoilt == "claimed by both classes" else 1].append((other, 1))
    train, test = lab.packaged_text.probing_task("fruit", left - 2, 2)
    copies = sum(text in t for t in texts_of(train) + texts_of(test))
    assert copies == (0 if spoilt == "claimed by both classes" else 1)
    with pytest.raises(lab.process.ExperimentError, match=f"has {left} texts of class 'apple'"):
        lab.packaged_text.probing_task("fruit", left - 1, 2)


def test_of_a_short_text_and_longer_ones_that_hold_it_a_probing_task_takes_one(
    made_up_files, monkeypatch
):
    """In whichever order they come: eight pairs are shuffled, so that both orders are there."""
    monkeypatch.setattr(lab.packaged_text, "TASK_CHARACTERS", 1200)
    made_up_files[1] += [
        (f"{words(20_000 + 200 * i, 30)} {text} {words(50_000 + 200 * i, 40)}", 1)
        for i, (text, target) in enumerate(made_up_files[1])
        if target == 1
    ]
    texts = texts_of(
        {split: t["apple"] for split, t in enumerate(lab.packaged_text.probing_task("fruit", 6, 2))}
    )
    starts = Counter(
        next(start for start in range(0, 800, 100) if words(start, 20) in text) for text in texts
    )
    assert len(starts) == 8 and set(starts.values()) == {1}
    assert {len(text.split()) for text in texts} == {20, 90}, "both orders were there"
    with pytest.raises(lab.process.ExperimentError, match="has 8 texts of class 'apple'"):
        lab.packaged_text.probing_task("fruit", 7, 2)


def test_a_probing_task_with_too_few_texts_is_refused_with_what_to_lower(made_up_files):
    with pytest.raises(lab.process.ExperimentError, match=r"'fruit' has 8 .*lower probe_train_set"):
        lab.packaged_text.probing_task("fruit", 6, 3)


def test_training_text_shares_no_run_of_8_words_with_a_probing_text(made_up_files):
    scale = lab.scales.Scale(
        "tiny", "none", "sae-probes", (0,), 2048, tasks=("fruit",),
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
    found = lab.packaged_text.training_documents(scale)
    assert set(found) == clean
    assert len(found) == len(clean), "no document twice"
    assert found == lab.packaged_text.training_documents(scale), "in a fixed order"


def test_the_documents_are_made_once_for_all_runs_of_the_same_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path))
    made = []

    def training_documents(scale):
        made.append(scale.tasks)
        return ["zwei", "eins", "dr\u00f6i"]

    monkeypatch.setattr(lab.packaged_text, "training_documents", training_documents)
    scale = lab.scales.Scale("tiny", "none", "sae-probes", (0,), 2048, tasks=("news",))
    for again in (scale, replace(scale, learning_rate=0.1)):
        assert lab.packaged_text.packaged_documents(again) == ["zwei", "eins", "dr\u00f6i"]
    assert made == [("news",)]
    for other in ({"tasks": ("code",)}, {"probe_test_set_size": 2}, {"probe_train_set_size": 2}):
        lab.packaged_text.packaged_documents(replace(scale, **other))
    assert len(made) == 4, "probing texts are left out of them"
    monkeypatch.setattr(lab.packaged_text, "TASK_CHARACTERS", 77)
    lab.packaged_text.packaged_documents(scale)
    assert len(made) == 5, "and other cuts of them are other texts"


# ── Lanes of text ───────────────────────────────────────────────────────────────────────────────


def tokens_of(document: int) -> list[int]:
    """No token stands twice in the text.  Documents are empty, short, and longer than a block."""
    length = random.Random(document).choice([0, 1, 5, 7, 7, 20, 90])
    return [1000 * document + i for i in range(length)]


class ReadingModel:
    """A language model whose residual stream is the token itself; every 17th is an outlier."""

    tokenizer, layers, identity, device = (
        tiny.Numbers(),
        (0, 2),
        {"model": "reader"},
        torch.device("cpu"),
    )

    def __init__(self):
        self.passes = 0

    def is_special(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens < 0

    def residuals(self, tokens_BL: torch.Tensor) -> dict[int, torch.Tensor]:
        self.passes += 1
        x = torch.stack([tokens_BL.float(), torch.where(tokens_BL % 17 == 0, 9.0, 1.0)], dim=-1)
        return {layer: x + layer for layer in self.layers}


LM, N_DOCUMENTS = ReadingModel(), 400
# A block is 2 contexts of 5 tokens from each of 4 lanes; a batch is 2 rows of each.
SCALE = lab.scales.Scale(
    "tiny", "none", "sae-probes", (0, 2), 64, batch_tokens=8, context_length=6,
    heldout_contexts=7, lm_batch=3, block_contexts=8, lanes=4,
)  # fmt: skip


@pytest.fixture
def documents(monkeypatch) -> None:
    texts = [" ".join(map(str, tokens_of(i))) for i in range(N_DOCUMENTS)]
    monkeypatch.setattr(lab.text, "packaged_documents", lambda scale: texts)


def lane_text(lane: int, first: int) -> list[int]:
    """What a lane holds: every fourth document from `first` on, each followed by EOS."""
    mine = (i for i in range(first, N_DOCUMENTS) if i % 4 == lane)
    return [token for i in mine for token in (*tokens_of(i), EOS)]


def in_pairs(items: list) -> list[tuple]:
    return list(zip(items[::2], items[1::2], strict=True))


def fresh(lanes: tuple[int, ...], first: int = 3) -> dict[int, Lane]:
    return {i: Lane(first, []) for i in lanes}


def blocks_from(start: dict[int, Lane], n: int | None = None) -> list[tuple[dict, list]]:
    """(the lanes before it, contexts) of every block, or of the first n."""
    found = lab.text.text_blocks(SCALE, LM, start)
    return [(before, contexts.tolist()) for before, contexts in itertools.islice(found, n)]


def test_a_lane_holds_its_documents_end_to_end_and_loses_and_doubles_none(documents):
    blocks = blocks_from(fresh((0, 1, 2, 3)))
    assert len(blocks) > 50
    for i in range(4):
        contexts = [c for _, block in blocks for c in block[2 * i : 2 * i + 2]]
        assert all(c[0] == BOS and BOS not in c[1:] and len(c) == 6 for c in contexts)
        packed = [token for context in contexts for token in context[1:]]
        assert packed == lane_text(i, 3)[: len(packed)]
    shortest = min(len(lane_text(i, 3)) for i in range(4))
    assert len(blocks) == shortest // 10, "it ends where a lane's text does, and not before"


@pytest.mark.parametrize("parts", [[(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)]])
def test_what_a_lane_holds_does_not_depend_on_how_processes_share_the_lanes(documents, parts):
    whole = blocks_from(fresh((0, 1, 2, 3)))
    alone = [blocks_from(fresh(part)) for part in parts]
    for n, (_, contexts) in enumerate(whole):
        assert [context for part in alone for context in part[n][1]] == contexts


def test_the_text_goes_on_from_every_block_as_if_it_had_never_stopped(documents):
    whole = blocks_from(fresh((0, 1, 2, 3)))
    for n in (0, 1, 2, 7, 30, len(whole) - 1):
        before = json.loads(json.dumps({i: asdict(lane) for i, lane in whole[n][0].items()}))
        start = {int(i): Lane(**lane) for i, lane in before.items()}
        again = blocks_from(start)
        assert again == whole[n:]
        assert start == whole[n][0], "the start is left as it was"


def test_reading_goes_on_with_the_first_document_that_a_lane_still_needs(documents, monkeypatch):
    opened = []

    def streamed(source: str, start: int) -> Iterator[str]:
        opened.append((source, start))
        return (" ".join(map(str, tokens_of(i))) for i in range(start, N_DOCUMENTS))

    monkeypatch.setattr(lab.text, "streamed_documents", streamed)
    hub = replace(SCALE, text="some/text@main")
    start = {0: Lane(40, [1, 2]), 1: Lane(33, []), 2: Lane(90, [3] * 500), 3: Lane(37, [])}
    _, contexts = next(lab.text.text_blocks(hub, LM, start))
    assert opened == [("some/text@main", 33)]
    expected = [[1, 2, *lane_text(0, 40)], lane_text(1, 33), [3] * 10, lane_text(3, 37)]
    found = [context[1:] for context in contexts.tolist()]
    assert [a + b for a, b in in_pairs(found)] == [e[:10] for e in expected]


def test_held_out_contexts_are_the_first_of_the_text_and_their_documents_are_never_trained_on(
    documents,
):
    heldout, first = lab.text.heldout_contexts(SCALE, LM)
    assert heldout.shape == (7, 6)
    text = [token for i in range(N_DOCUMENTS) for token in (*tokens_of(i), EOS)]
    assert heldout[:, 0].tolist() == [BOS] * 7
    assert heldout[:, 1:].flatten().tolist() == text[:35]
    needed = list(itertools.accumulate(len(tokens_of(i)) + 1 for i in range(N_DOCUMENTS)))
    assert first == 1 + next(i for i, total in enumerate(needed) if total >= 35)
    trained = {
        token
        for _, block in blocks_from(fresh((0, 1, 2, 3), first))
        for context in block
        for token in context
    }
    assert trained.isdisjoint(t for i in range(first) for t in tokens_of(i))
    assert not trained & {*heldout.flatten().tolist()} - {BOS, EOS}
    assert tokens_of(first)[:1] == [1000 * first] and 1000 * first in trained, (
        "nor is more left out"
    )


def test_a_text_shorter_than_what_is_held_out_is_an_error(documents):
    total = len([token for i in range(N_DOCUMENTS) for token in (*tokens_of(i), EOS)])
    all_of_it = replace(SCALE, heldout_contexts=total // 5)
    assert len(lab.text.heldout_contexts(all_of_it, LM)[0]) == total // 5
    with pytest.raises(lab.process.ExperimentError, match="nothing is left to train on"):
        lab.text.heldout_contexts(replace(SCALE, heldout_contexts=total // 5 + 1), LM)


def test_documents_are_tokenised_some_at_a_time_and_only_those_that_are_wanted(documents):
    found = lab.text.tokenized(SCALE, LM, 5, wanted=lambda i: i % 3 == 0, at_once=4)
    assert list(found) == [(i, tokens_of(i)) for i in range(6, N_DOCUMENTS, 3)]


def test_a_stream_that_breaks_off_goes_on_at_the_same_document(monkeypatch, capsys):
    import datasets

    opened, waits, failing = [], [], iter([3, 3, 5, None])

    class Rows:
        def __init__(self, start: int = 0):
            self.start, self.end = start, None

        def skip(self, n: int) -> "Rows":
            opened.append(n)
            return Rows(n)

        def __iter__(self):
            end = next(failing)
            for i in range(self.start, 8):
                if i == end:
                    raise ConnectionError("reset by peer\nand more")
                yield {"text": f"document {i}"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Rows())
    monkeypatch.setattr(time, "sleep", waits.append)
    found = list(lab.text.streamed_documents("some/text@main", 2))
    assert found == [f"document {i}" for i in range(2, 8)]
    assert opened == [2, 3, 3, 5]
    assert waits == [1, 2, 1], "longer each time, until a document arrives"
    out = capsys.readouterr().out
    assert "some/text: ConnectionError: reset by peer; trying again from document 3 in 1 s" in out
    assert "and more" not in out
    failing = itertools.repeat(2)
    waits.clear()
    with pytest.raises(
        lab.process.ExperimentError, match=r"some/text .* document 2, 6 times in a row"
    ):
        list(lab.text.streamed_documents("some/text@main", 2))
    assert waits == [1, 2, 4, 8, 16]


# ── Reading ahead ───────────────────────────────────────────────────────────────────────────────


def ends(thread: threading.Thread) -> bool:
    thread.join(timeout=5)
    return not thread.is_alive()


def started(action) -> threading.Thread:
    """The one thread that an action starts."""
    before = set(threading.enumerate())
    action()
    (thread,) = set(threading.enumerate()) - before
    return thread


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_thread_that_works_ahead_gives_the_same_items_in_the_same_order(depth):
    items = [*range(50), None, 0]
    found = lab.text.ahead(iter(items), depth)
    assert list(found) == items
    assert list(lab.text.ahead([], depth)) == []


@pytest.mark.parametrize(
    "error", [ValueError("half way"), SystemExit(3), lab.process.ExperimentError("no")]
)
def test_what_the_thread_raises_is_raised_where_it_is_read_after_what_came_before(error):
    def items():
        yield from (1, 2)
        raise error

    found = lab.text.ahead(items())
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(type(error)) as raised:
        next(found)
    assert raised.value is error


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_the_thread_ends_when_nobody_reads_on(how):
    found = lab.text.ahead(itertools.count())
    thread = started(lambda: next(found))
    if how == "closed":
        found.close()
    else:
        del found
    assert ends(thread)


def test_the_thread_works_ahead_but_no_further_than_it_may():
    made = []

    def items():
        for i in itertools.count():
            made.append(i)
            yield i

    found = lab.text.ahead(items(), depth=2)
    time.sleep(0.05)
    assert made == [], "nothing is made before the first is asked for"
    thread = started(lambda: next(found))
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3], "one is read, two wait, one is in hand"
    found.close()
    assert ends(thread)


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
    units = lab.activations.calibrate(x)
    kept = x[: len(x) - outliers] * units.scale
    distances = (kept - units.b_dec).norm(dim=-1)
    assert distances.square().mean().item() == pytest.approx(1.0, abs=1e-5)
    assert units.mean_norm == pytest.approx(distances.mean().item(), rel=1e-5)
    assert units.mean_norm < 1
    torch.testing.assert_close(units.b_dec, kept.mean(0))


def test_outliers_are_found_by_their_norm_and_counted():
    x = residuals(outliers=8)
    units = lab.activations.calibrate(x)
    norms = x.norm(dim=-1)
    assert units.outlier_norm == pytest.approx(3 * norms.sort().values[199].item())
    assert ((norms > units.outlier_norm).nonzero().flatten() >= 392).all()
    assert units.outlier_fraction == pytest.approx(8 / 400)
    assert lab.activations.calibrate(residuals()).outlier_fraction == 0


def test_outliers_left_in_would_change_the_unit():
    x = residuals(outliers=8)
    with_them = lab.activations.calibrate(x, times_median=1000.0)
    assert with_them.outlier_fraction == 0
    assert with_them.scale < 0.5 * lab.activations.calibrate(x).scale


def test_calibration_of_bfloat16_residuals_is_computed_in_float32():
    x = residuals(outliers=8)
    exact, found = lab.activations.calibrate(x), lab.activations.calibrate(x.bfloat16())
    assert found.b_dec.dtype == torch.float32
    assert found.scale == pytest.approx(exact.scale, rel=1e-3)


@pytest.mark.parametrize("same", [0.0, 2.5])
def test_residuals_that_do_not_vary_have_no_unit(same):
    with pytest.raises(lab.process.ExperimentError, match="are the same at every token"):
        lab.activations.calibrate(torch.full((50, 6), same))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_residuals_that_are_not_finite_are_an_error_and_no_outliers(value):
    x = residuals()
    x[7, 3] = value
    with pytest.raises(lab.process.ExperimentError, match="are not finite"):
        lab.activations.calibrate(x)
    units = lab.activations.calibrate(residuals())
    with pytest.raises(lab.process.ExperimentError, match="are not finite"):
        lab.activations.without_outliers(block(x[:, None], len(x)), [units])


def block(rows: torch.Tensor, *lengths: int, lanes: tuple[int, ...] | None = None) -> Block:
    lanes = lanes or tuple(range(len(lengths)))
    return Block(fresh(lanes), rows, list(lengths))


def test_a_token_that_is_an_outlier_at_any_layer_is_left_out_at_all():
    unit = lab.activations.Calibration(1.0, torch.zeros(2), 1.0, 10.0, 0.0)
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
        kept = lab.activations.without_outliers(whole, calibrations)
        assert torch.equal(kept.rows, rows[[0, 3]].bfloat16())
        assert kept.lengths == left, "every lane is shorter by its own outliers"
        assert kept.before == whole.before


# ── Residuals of blocks of text ─────────────────────────────────────────────────────────────────


def test_a_block_of_residuals_has_every_token_but_special_ones_lane_after_lane(documents):
    start = fresh((0, 1, 2, 3))
    text = list(itertools.islice(lab.text.text_blocks(SCALE, LM, start), 3))
    for (before, contexts), found in zip(
        text, lab.activations.residual_blocks(SCALE, LM, text), strict=True
    ):
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
        text = itertools.islice(lab.text.text_blocks(scale, lm, fresh((0, 1, 2, 3))), 2)
        return [found.rows for found in lab.activations.residual_blocks(scale, lm, text)]

    first, passes = rows(keeps), lm.passes
    assert passes == 2 * 3  # 8 contexts are three batches of 3
    again = rows(keeps)
    assert lm.passes == passes
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    rows(replace(keeps, lm_batch=4))
    assert lm.passes == passes + 2 * 2, "other batches round differently"
    rows(SCALE)
    assert lm.passes == passes + 2 * 2 + 2 * 3, "nothing is kept unless it is asked for"


# ── Shuffled batches ────────────────────────────────────────────────────────────────────────────


ALONE = SimpleNamespace(smallest=lambda n: n)
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
    found = lab.activations.shuffled_batches(SCALE, blocks, ranks, start)
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
    batches = lab.activations.shuffled_batches(SCALE, [block(rows, *(80,) * 4)], ALONE, START)
    found = torch.cat([batch for _, batch in batches])
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


def test_the_order_neither_uses_nor_disturbs_the_global_generator():
    torch.manual_seed(0)
    undisturbed, expected = torch.rand(3).tolist(), drawn(numbered((40,) * 4))
    torch.manual_seed(0)
    found, between = [], []
    for _, batch in lab.activations.shuffled_batches(SCALE, numbered((40,) * 4), ALONE, START):
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

    batches = lab.activations.shuffled_batches(SCALE, blocks(), ALONE, START)
    assert read == []
    for expected in ([0], [0], [0, 1], [0, 1], [0, 1, 2]):
        next(batches)
        assert read == expected


def test_going_on_from_any_position_gives_the_batches_of_an_uninterrupted_pass():
    blocks = numbered(*BLOCKS)
    whole = list(lab.activations.shuffled_batches(SCALE, blocks, ALONE, START))
    assert [position[:2] for position, _ in whole] == [
        *((0, n) for n in (1, 2, 3, 4)),
        *((1, n) for n in (1, 2)),
        *((3, n) for n in (1, 2, 3)),
    ]
    for n, (position, _) in enumerate(whole):
        assert position.lanes is blocks[position.block].before
        rest = lab.activations.shuffled_batches(SCALE, blocks[position.block :], ALONE, position)
        found = [(p[:2], rows.tolist()) for p, rows in rest]
        assert found == [(p[:2], rows.tolist()) for p, rows in whole[n + 1 :]]


# ── The whole chain ─────────────────────────────────────────────────────────────────────────────

LIMITS = [lab.activations.Calibration(1.0, torch.zeros(2), 1.0, 400_000.0, 0.0)] * 2


def chain(ranks, position: Position) -> Iterator[tuple[Position, torch.Tensor]]:
    """Documents to batches, as a training reads them, on a limit that some tokens are above."""
    text = lab.text.text_blocks(SCALE, LM, position.lanes)
    blocks = lab.activations.residual_blocks(SCALE, LM, text)
    kept = (lab.activations.without_outliers(found, LIMITS) for found in blocks)
    return lab.activations.shuffled_batches(SCALE, kept, ranks, position)


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
    tokens = [batch[:, 0, 0].long().tolist() for _, batch in whole]
    assert len(tokens) > 100
    assert max(row for batch in tokens for row in batch) < 400_000, "outliers are left out"
    assert len({len(batch) for batch in tokens}) == 1
    everything = [row for batch in tokens for row in batch]
    assert len(set(everything)) == len(everything)

    for part in ((0, 1), (2, 3)):
        told = Recorder(ranks.asked)
        found = list(itertools.islice(chain(told, Position(0, 0, fresh(part))), len(whole)))
        mine = slice(0, 4) if part == (0, 1) else slice(4, 8)
        assert [rows[:, 0, 0].long().tolist() for _, rows in found] == [
            batch[mine] for batch in tokens
        ]
        assert max(told.asked) > min(told.asked), "a process alone would have made other batches"
    for n in (0, 3, 50, len(whole) - 1):
        position, _ = whole[n]
        rest = [rows[:, 0, 0].long().tolist() for _, rows in chain(Recorder(), position)]
        assert rest == tokens[n + 1 :]
