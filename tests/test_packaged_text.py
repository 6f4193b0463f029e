"""Probing tasks and training text share nothing, and no text of a task stands in it twice."""

import os
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import tiny

import lab.packaged_text
from lab.packaged_text import (
    PROSE,
    TASK_CHARACTERS,
    TASKS,
    DistinctTexts,
    packaged_documents,
    probing_task,
    sae_probes_rows,
    shingles,
    training_documents,
)
from lab.process import ExperimentError
from lab.scales import SCALES, Scale

# ── Shingles and probing tasks ──────────────────────────────────────────────────────────────────


def words(first: int, n: int) -> str:
    return " ".join(f"word{i}" for i in range(first, first + n))


def test_a_text_has_one_shingle_for_every_run_of_8_words():
    assert len(shingles(words(0, 8))) == 1
    assert len(shingles(words(0, 20))) == 13
    assert len(shingles(words(0, 20), words=3)) == 18


def test_a_text_below_8_words_is_one_shingle_of_its_own():
    assert len(shingles("a b c")) == 1
    assert shingles("a b c") != shingles("a b")
    assert shingles("a b c").isdisjoint(shingles("a b c d e f g h"))
    assert len(shingles("")) == 1


def test_shingles_ignore_case_and_spacing_but_not_order():
    text = "One two three four five six seven eight"
    assert shingles(text) == shingles("  " + text.upper().replace(" ", "\n "))
    turned = " ".join(reversed(text.split()))
    assert shingles(text).isdisjoint(shingles(turned))


@pytest.mark.parametrize(("shared", "found"), [(7, 0), (8, 1), (10, 3)])
def test_two_texts_share_a_shingle_from_8_words_in_common_on(shared, found):
    a = words(0, 30) + " " + words(500, shared)
    b = words(500, shared) + " " + words(1000, 30)
    assert len(shingles(a) & shingles(b)) == found


@pytest.mark.parametrize("order", ["short first", "long first"])
@pytest.mark.parametrize(("shared", "taken"), [(0, True), (11, True), (12, False), (20, False)])
def test_overlap_counts_against_the_shorter_text_whichever_comes_first(order, shared, taken):
    """A text of 20 words has 13 runs of 8: 12 words in a row are 5 of them, 11 words are 4."""
    short = words(0, 20)
    long = f"{words(5000, 60)} {words(0, shared)} {words(6000, 60)}"
    distinct = DistinctTexts()
    first, second = (short, long) if order == "short first" else (long, short)
    assert distinct.take(words(9000, 30)), "others do not matter"
    assert distinct.take(first)
    assert distinct.take(second) is taken
    assert not distinct.take(first) and not distinct.take(second.upper())


def test_overlap_is_counted_with_one_text_at_a_time():
    """5 of 13 runs are too many of one text, and not of two."""
    distinct = DistinctTexts()
    for start in (0, 10):
        assert distinct.take(f"{words(start, 10)} {words(1000 * (1 + start), 20)}")
    assert distinct.take(words(0, 20))  # 3 runs of the one, 3 of the other


def test_a_text_that_was_not_taken_does_not_stand_in_the_way_of_others():
    distinct = DistinctTexts()
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
    monkeypatch.setitem(TASKS, "fruit", {"apple": (1, 1), "pear": (2, 1)})
    monkeypatch.setattr(lab.packaged_text, "PROSE", (3,))
    monkeypatch.setattr(lab.packaged_text, "sae_probes_rows", lambda number: files[number])
    return files


def texts_of(split: dict[str, list[str]]) -> list[str]:
    return [text for texts in split.values() for text in texts]


def test_a_probing_task_has_the_sizes_asked_for_and_shares_no_text_between_its_splits(
    made_up_files,
):
    train, test = probing_task("fruit", 5, 3)
    assert {label: len(texts) for label, texts in train.items()} == {"apple": 5, "pear": 5}
    assert {label: len(texts) for label, texts in test.items()} == {"apple": 3, "pear": 3}
    assert len({*texts_of(train), *texts_of(test)}) == 16
    own = {"apple": {t for t, v in made_up_files[1] if v == 1}, "pear": dict(made_up_files[2])}
    assert all({*train[label], *test[label]} <= set(own[label]) for label in own)


def test_a_probing_task_does_not_depend_on_the_order_of_its_files(made_up_files):
    before = probing_task("fruit", 4, 2)
    made_up_files[1].reverse()
    made_up_files[2].reverse()
    assert probing_task("fruit", 4, 2) == before


@pytest.mark.parametrize(
    ("spoilt", "left"), [("claimed by both classes", 7), ("doubled", 8), ("nearly doubled", 8)]
)
def test_a_text_that_stands_twice_is_left_out_of_a_probing_task(made_up_files, spoilt, left):
    text = made_up_files[1][0][0]
    other = "intro " + text + " and more" if spoilt == "nearly doubled" else text
    made_up_files[2 if spoilt == "claimed by both classes" else 1].append((other, 1))
    train, test = probing_task("fruit", left - 2, 2)
    copies = sum(text in t for t in texts_of(train) + texts_of(test))
    assert copies == (0 if spoilt == "claimed by both classes" else 1)
    with pytest.raises(ExperimentError, match=f"has {left} texts of class 'apple'"):
        probing_task("fruit", left - 1, 2)


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
    texts = texts_of({split: t["apple"] for split, t in enumerate(probing_task("fruit", 6, 2))})
    starts = Counter(
        next(start for start in range(0, 800, 100) if words(start, 20) in text) for text in texts
    )
    assert len(starts) == 8 and set(starts.values()) == {1}
    assert {len(text.split()) for text in texts} == {20, 90}, "both orders were there"
    with pytest.raises(ExperimentError, match="has 8 texts of class 'apple'"):
        probing_task("fruit", 7, 2)


def test_a_probing_task_with_too_few_texts_is_refused_with_what_to_lower(made_up_files):
    with pytest.raises(ExperimentError, match=r"'fruit' has 8 .*lower probe_train_set"):
        probing_task("fruit", 6, 3)


def test_training_text_shares_no_run_of_8_words_with_a_probing_text(made_up_files):
    scale = Scale(
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
    found = training_documents(scale)
    assert set(found) == clean
    assert len(found) == len(clean), "no document twice"
    assert found == training_documents(scale), "in a fixed order"


def test_the_documents_are_made_once_for_all_runs_of_the_same_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path))
    made = []

    def training_documents(scale):
        made.append(scale.tasks)
        return ["zwei", "eins", "dr\u00f6i"]

    monkeypatch.setattr(lab.packaged_text, "training_documents", training_documents)
    scale = Scale("tiny", "none", "sae-probes", (0,), 2048, tasks=("news",))
    for again in (scale, replace(scale, target_l0s=(30.0,))):
        assert packaged_documents(again) == ["zwei", "eins", "dr\u00f6i"]
    assert made == [("news",)]
    for other in ({"tasks": ("code",)}, {"probe_test_set_size": 8}, {"probe_train_set_size": 8}):
        packaged_documents(replace(scale, **other))
    assert len(made) == 4, "probing texts are left out of them"
    monkeypatch.setattr(lab.packaged_text, "TASK_CHARACTERS", 77)
    packaged_documents(scale)
    assert len(made) == 5, "and other cuts of them are other texts"


# ── The files inside the sae-probes package ─────────────────────────────────────────────────────

LAPTOP = SCALES["laptop"]


def word_runs(text: str, words: int = 8) -> set[str]:
    w = text.lower().split()
    return {" ".join(w[i : i + words]) for i in range(max(1, len(w) - words + 1))}


@pytest.fixture(scope="module")
def probing_texts() -> dict[str, tuple[dict, dict]]:
    """(train, test) of every laptop task at the laptop's sizes."""
    sizes = LAPTOP.probe_train_set_size // 2, LAPTOP.probe_test_set_size // 2
    return {name: probing_task(name, *sizes) for name in LAPTOP.tasks}


@pytest.mark.parametrize("task", LAPTOP.tasks)
def test_probing_tasks_have_the_sizes_sae_bench_asks_for_and_no_text_twice(probing_texts, task):
    train, test = probing_texts[task]
    assert list(train) == list(test) == list(TASKS[task])
    assert {len(texts) for texts in train.values()} == {LAPTOP.probe_train_set_size // 2}
    assert {len(texts) for texts in test.values()} == {LAPTOP.probe_test_set_size // 2}
    texts = [t for split in (train, test) for found in split.values() for t in found]
    assert max(Counter(" ".join(t.lower().split()) for t in texts).values()) == 1
    assert all(t.strip() and len(t) <= TASK_CHARACTERS for t in texts)


@pytest.mark.parametrize("task", LAPTOP.tasks)
def test_no_two_texts_of_a_probing_task_are_mostly_the_same(probing_texts, task):
    """Of the shorter of any two no more than a third of the runs of 8 words is in the other: a text
    to test probes on is no piece of one they were trained on, nor the other way round."""
    holders: dict[str, list[int]] = defaultdict(list)
    sizes, shared = [], 0
    for text in (t for split in probing_texts[task] for texts in split.values() for t in texts):
        runs = word_runs(text)
        common = Counter(i for run in runs for i in holders[run])
        shared += bool(common)
        for i, count in common.items():
            assert 3 * count <= min(len(runs), sizes[i]), text[:100]
        for run in runs:
            holders[run].append(len(sizes))
        sizes.append(len(runs))
    # The files do hold different cuts of the same pages: the check above is not about nothing.
    assert shared or task in ("sentiment", "news", "headline")


@pytest.mark.parametrize("task", LAPTOP.tasks)
def test_the_texts_of_a_class_come_from_its_file_and_from_no_other_class(probing_texts, task):
    sources = {
        label: {
            (text[150:] if task == "code" else text)[:TASK_CHARACTERS].strip()
            for text, value in sae_probes_rows(number)
            if value == target
        }
        for label, (number, target) in TASKS[task].items()
    }
    for split in probing_texts[task]:
        for label, texts in split.items():
            for text in texts:
                assert [name for name, source in sources.items() if text in source] == [label]


def test_the_text_to_train_on_shares_no_run_of_8_words_with_any_probing_text(probing_texts):
    held = {
        run
        for splits in probing_texts.values()
        for split in splits
        for texts in split.values()
        for text in texts
        for run in word_runs(text)
    }
    documents = training_documents(LAPTOP)
    assert len(documents) > 50_000
    assert len(set(documents)) == len(documents)
    assert not any(held & word_runs(text) for text in documents)
    # The rule has work to do: some documents were left out for it.
    everything = {t for number in PROSE for t, _ in sae_probes_rows(number)}
    assert 0 < len(everything) - len(documents) < 0.2 * len(everything)


TEXTS_OF_ONE_PROCESS = f"""
import dataclasses, hashlib, sys
sys.path.insert(0, {str(tiny.ROOT)!r})
from lab import packaged_text, scales
packaged_text.PROSE = (57, 98)
scale = dataclasses.replace(scales.SCALES["laptop"], tasks=("sentiment",))
texts = packaged_text.training_documents(scale), packaged_text.probing_task("sentiment", 20, 10)
print(hashlib.sha256(repr(texts).encode()).hexdigest())
"""


def test_texts_come_in_the_same_order_in_every_process():
    """Not in a set's order, which changes with the hash seed."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", TEXTS_OF_ONE_PROCESS],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
