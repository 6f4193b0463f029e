"""Text shipped inside the sae-probes package: the laptop's prose and probing tasks."""

import importlib.metadata
import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

from lab.process import require
from lab.scales import Scale
from lab.seeds import seed_for
from lab.storage import cached, json_text, versions, write_atomically

# Prose among the data files inside the sae-probes package, by number: fiction and news passages,
# moral stories, web pages about people, web sentences, Wikipedia questions, news articles, reviews.
PROSE = (45, 48, 49, 56, 57, 58, *range(65, 86), 90, 98, 100, 101, 111)


# Probing tasks from the same package: class -> (file number, target value).  A text claimed by two
# classes of a task is left out.
TASKS: dict[str, dict[str, tuple[int, object]]] = {
    "occupation": {
        "journalist": (59, 1),
        "athlete": (60, 1),
        "actor": (61, 1),
        "politician": (62, 1),
        "singer": (63, 1),
        "researcher": (64, 1),
    },
    "news": {c: (97, c) for c in ("Politics", "Technology", "Entertainment", "Sport")},
    "code": {"C": (158, 1), "Python": (159, 1), "HTML": (160, 1)},
    "sentiment": {"1 star": (157, 0), "5 stars": (157, 1)},
    "ticket": {c: (103, c) for c in ("HR Support", "Hardware", "Access")},
    "headline": {c: (105, c) for c in ("factual", "clickbait")},
    "spam": {"message": (96, 0), "spam": (96, 1)},
}


TASK_CHARACTERS = 200  # about 45 tokens of prose: what a first run has time for


def sae_probes_file(number: int) -> Path:
    """One of the data files shipped inside the sae-probes package (found without importing it)."""
    spec = importlib.util.find_spec("sae_probes")
    require(spec is not None, "sae-probes is not installed: run `pip install -r requirements.txt`")
    folder = Path(spec.origin).parent / "data" / "cleaned_data"
    found = list(folder.glob(f"{number}_*.csv.zst"))
    require(len(found) == 1, f"sae-probes has no data file {number}: reinstall sae-probes==0.4.2")
    return found[0]


def sae_probes_rows(number: int) -> list[tuple[str, object]]:
    """(text, target) of every row of one data file."""
    import pandas

    table = pandas.read_csv(sae_probes_file(number), usecols=["prompt", "target"])
    return list(zip(table["prompt"].astype(str), table["target"].tolist(), strict=True))


def shingles(text: str, words: int = 8) -> set[int]:
    """Hashes of every run of 8 words (or of all of a shorter text); case and spacing ignored."""
    w = text.lower().split()
    return {hash(tuple(w[i : i + words])) for i in range(max(1, len(w) - words + 1))}


class DistinctTexts:
    """Texts of which no two are, for the most part, the same."""

    def __init__(self):
        self._holders: dict[int, list[int]] = {}  # shingle -> the texts that have it
        self._sizes: list[int] = []

    def take(self, text: str) -> bool:
        """Take a text in, unless it shares more than a third of the shingles of the SHORTER of the
        two with one taken before: the data files hold different cuts of the same pages, in any
        order.  Returns whether it was taken."""
        mine = shingles(text)
        shared = Counter(other for s in mine for other in self._holders.get(s, ()))
        if any(3 * n > min(len(mine), self._sizes[other]) for other, n in shared.items()):
            return False
        for s in mine:
            self._holders.setdefault(s, []).append(len(self._sizes))
        self._sizes.append(len(mine))
        return True


def probing_task(name: str, train_size: int, test_size: int) -> tuple[dict, dict]:
    """Texts for training and testing probes: {class: [train_size]}, {class: [test_size]}.

    Of texts that are nearly the same only one is taken, whatever their classes.
    """
    require(name in TASKS, f"task {name!r} is not one of {', '.join(TASKS)}")
    classes = TASKS[name]
    owners: dict[str, set[str]] = {}
    for label, (number, target) in classes.items():
        for text, value in sae_probes_rows(number):
            if value == target:
                # Code files open with licences that name the language: SAE-Bench skips those too.
                cut = text[150:] if name == "code" else text
                owners.setdefault(cut[:TASK_CHARACTERS].strip(), set()).add(label)
    texts = [(text, labels) for text, labels in sorted(owners.items(), key=lambda i: i[0]) if text]
    random.Random(seed_for("probing task", name)).shuffle(texts)
    chosen: dict[str, list[str]] = {label: [] for label in classes}
    distinct = DistinctTexts()
    for text, labels in texts:
        label = min(labels)
        wanted = len(labels) == 1 and len(chosen[label]) < train_size + test_size
        if wanted and distinct.take(text):
            chosen[label].append(text)
    for label, found in chosen.items():
        require(
            len(found) == train_size + test_size,
            f"task {name!r} has {len(found)} texts of class {label!r}: {train_size + test_size} "
            "are needed; lower probe_train_set_size or probe_test_set_size",
        )
    train = {label: found[:train_size] for label, found in chosen.items()}
    test = {label: found[train_size:] for label, found in chosen.items()}
    return train, test


def task_of_pairs(name: str, train_size: int, test_size: int, _seed: int = 0) -> tuple[dict, dict]:
    """probing_task() as SAE-Bench asks for it: its sizes are of a class and its opposite."""
    return probing_task(name, train_size // 2, test_size // 2)


def training_documents(scale: Scale) -> list[str]:
    """Prose to train on, in a fixed order, sharing no run of 8 words with a probing text."""
    held: set[int] = set()
    for name in scale.tasks:
        for split in task_of_pairs(name, scale.probe_train_set_size, scale.probe_test_set_size):
            for texts in split.values():
                held.update(*map(shingles, texts))
    # A dict, not a set: it keeps the order.
    documents = {text: None for number in PROSE for text, _ in sae_probes_rows(number)}
    texts = [text for text in documents if not held & shingles(text)]
    random.Random(seed_for("documents")).shuffle(texts)
    return texts


def packaged_documents(scale: Scale) -> list[str]:
    """training_documents(), made once."""

    def build(folder: Path) -> None:
        write_atomically(folder / "documents.json", json_text(training_documents(scale)))

    key = {
        "files": PROSE,
        "tasks": [TASK_CHARACTERS, {name: TASKS.get(name) for name in scale.tasks}],
        "sizes": [scale.probe_train_set_size, scale.probe_test_set_size],
        **versions("sae-probes"),
    }
    return json.loads((cached("documents", key, build) / "documents.json").read_text("utf-8"))
