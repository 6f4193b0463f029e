"""Packing, lanes of text that lose and double nothing, and a thread that reads ahead."""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import tiny
import torch
from tiny import N_DOCUMENTS, fresh, in_pairs, tokens_of

import lab.text
from lab.hub import TextFiles
from lab.process import ExperimentError
from lab.text import Lane, ahead, heldout_contexts, pack, streamed_documents, text_blocks, tokenized

BOS, EOS = tiny.Numbers.bos_token_id, tiny.Numbers.eos_token_id
LM, SCALE = tiny.ReadingModel(), tiny.IN_LANES


# ── Packing ─────────────────────────────────────────────────────────────────────────────────────


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
    packed = pack(tokens, BOS, length)
    assert packed.tolist() == contexts
    assert packed.shape == (len(contexts), length) and packed.dtype == torch.long
    assert tokens == list(range(n_tokens)), "the list is left as it was"


# ── Lanes of text ───────────────────────────────────────────────────────────────────────────────


def lane_text(lane: int, first: int) -> list[int]:
    """What a lane holds: every fourth document from `first` on, each followed by EOS."""
    mine = (i for i in range(first, N_DOCUMENTS) if i % 4 == lane)
    return [token for i in mine for token in (*tokens_of(i), EOS)]


def blocks_from(start: dict[int, Lane], n: int | None = None) -> list[tuple[dict, list]]:
    """(the lanes before it, contexts) of every block, or of the first n."""
    found = text_blocks(SCALE, LM, start)
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
    _, contexts = next(text_blocks(hub, LM, start))
    assert opened == [("some/text@main", 33)]
    expected = [[1, 2, *lane_text(0, 40)], lane_text(1, 33), [3] * 10, lane_text(3, 37)]
    found = [context[1:] for context in contexts.tolist()]
    assert [a + b for a, b in in_pairs(found)] == [e[:10] for e in expected]


def test_held_out_contexts_are_the_first_of_the_text_and_their_documents_are_never_trained_on(
    documents,
):
    heldout, first = heldout_contexts(SCALE, LM)
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
    assert len(heldout_contexts(all_of_it, LM)[0]) == total // 5
    with pytest.raises(ExperimentError, match="nothing is left to train on"):
        heldout_contexts(replace(SCALE, heldout_contexts=total // 5 + 1), LM)


def test_documents_are_tokenised_some_at_a_time_and_only_those_that_are_wanted(documents):
    found = tokenized(SCALE, LM, 5, wanted=lambda i: i % 3 == 0, at_once=4)
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

    monkeypatch.setattr(lab.text, "text_files", lambda source: TextFiles([]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Rows())
    monkeypatch.setattr(time, "sleep", waits.append)
    found = list(streamed_documents("some/text@main", 2))
    assert found == [f"document {i}" for i in range(2, 8)]
    assert opened == [2, 3, 3, 5]
    assert waits == [1, 2, 1], "longer each time, until a document arrives"
    out = capsys.readouterr().out
    assert "some/text: ConnectionError: reset by peer; trying again from document 3 in 1 s" in out
    assert "and more" not in out
    failing = itertools.repeat(2)
    waits.clear()
    with pytest.raises(ExperimentError, match=r"some/text .* document 2, 6 times in a row"):
        list(streamed_documents("some/text@main", 2))
    assert waits == [1, 2, 4, 8, 16]


def test_a_row_without_text_is_an_empty_document_and_one_without_the_column_an_error(monkeypatch):
    """The documents after it keep their numbers: a run that is taken up counts them."""
    import datasets

    rows = [{"text": "a"}, {"text": None}, {"text": "c"}]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    monkeypatch.setattr(lab.text, "text_files", lambda source: TextFiles([]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    assert list(streamed_documents("some/text@main")) == ["a", "", "c"]
    assert list(streamed_documents("some/text@main", 2)) == ["c"]
    kept = TextFiles([], "train-00001-of-00080")  # the copy ends, and the text does not
    monkeypatch.setattr(lab.text, "text_files", lambda source: kept)
    with pytest.raises(ExperimentError, match=r"goes on in train-00001-of-00080, which is not k"):
        list(streamed_documents("some/text@main"))
    stream = stream.rename_column("text", "content")
    with pytest.raises(
        ExperimentError, match=r"some/text@main has no column 'text', but 'content'"
    ):
        list(streamed_documents("some/text@main"))


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
    found = ahead(iter(items), depth)
    assert list(found) == items
    assert list(ahead([], depth)) == []


@pytest.mark.parametrize("error", [ValueError("half way"), SystemExit(3), ExperimentError("no")])
def test_what_the_thread_raises_is_raised_where_it_is_read_after_what_came_before(error):
    def items():
        yield from (1, 2)
        raise error

    found = ahead(items())
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(type(error)) as raised:
        next(found)
    assert raised.value is error


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_the_thread_ends_when_nobody_reads_on(how):
    found = ahead(itertools.count())
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

    found = ahead(items(), depth=2)
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
