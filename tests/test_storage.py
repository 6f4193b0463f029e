"""Files and cache entries survive interruptions and damage; what is finished is remembered."""

import importlib.util
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from lab.identity import code_behind
from lab.storage import (
    cache_root,
    cached,
    disjoint,
    json_text,
    remembered,
    save_tensors,
    write_atomically,
)

# ── Files ───────────────────────────────────────────────────────────────────────────────────────


def test_a_number_that_is_not_finite_is_never_written():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            json_text({"loss": value})


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "final_info.json"
    write_atomically(path, "old")
    write_atomically(path, "nëw")
    assert path.read_text(encoding="utf-8") == "nëw"
    assert [p.name for p in tmp_path.iterdir()] == ["final_info.json"], "nothing is left beside it"


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "final_info.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "x" * 100_000 + "\ud800")
    assert path.read_text() == "old"

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def in_a_child(action) -> int:
    """Do something in a forked process; returns how it ended: an exit status, or minus a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_me(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_write_that_is_killed_leaves_the_old_file_and_the_next_one_succeeds(tmp_path):
    path = tmp_path / "final_info.json"
    write_atomically(path, "old")

    def killed_while_writing():
        os.fsync = kill_me
        write_atomically(path, "new")

    assert in_a_child(killed_while_writing) == -signal.SIGKILL
    assert path.read_text() == "old"
    write_atomically(path, "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["final_info.json"]
    assert path.read_text() == "newer"


# ── Cache ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Build:
    """Writes two files and counts how often it was asked to."""

    def __init__(self, text: str = "content", fail: BaseException | None = None):
        self.text, self.fail, self.calls = text, fail, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "deep").mkdir()
        (folder / "a.txt").write_text(self.text)
        (folder / "deep" / "b.bin").write_bytes(bytes(range(256)))
        if self.fail:
            raise self.fail


def is_good(entry: Path) -> bool:
    return (entry / "a.txt").read_text() == "content" and (
        entry / "deep" / "b.bin"
    ).read_bytes() == bytes(range(256))


def kept_in(folder: Path) -> list[str]:
    """What stands in a folder of the cache, but for locks."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def test_an_entry_is_built_once_and_stands_where_the_environment_says(cache):
    build = Build()
    entry = cached("kind", {"a": 1, "b": [2]}, build)
    assert entry.parent == cache / "kind"
    assert is_good(entry)
    assert cached("kind", {"b": [2], "a": 1}, build) == entry
    assert build.calls == 1
    code = code_behind(__name__)  # of this file, where Build stands
    key = json.loads((entry / "manifest.json").read_text())["key"]
    assert key == {"a": 1, "b": [2], "code": code}


def test_without_the_environment_the_cache_is_in_the_users_home(monkeypatch, tmp_path):
    monkeypatch.delenv("COSINE_SAE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "cosine-sae"


def test_every_key_and_kind_has_an_entry_of_its_own(cache):
    keys = [("kind", {"a": 1}), ("kind", {"a": 2}), ("kind", {"b": 1}), ("other", {"a": 1})]
    assert len({cached(kind, key, Build()) for kind, key in keys}) == 4


def maker_in(folder: Path, code: str, name: str = "maker"):
    """The function make() of a module of this code, and how often it was called."""
    (folder / f"{name}.py").write_text(code)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = """
from lab import seeds

calls = []

def make(folder):
    calls.append(seeds.seed_for("made"))
    (folder / "content").write_text("one")
"""


@pytest.mark.parametrize(
    ("edit", "made_again"),
    [
        (("one", "two"), True),
        (("\ndef make", "\n# A remark.\ndef make"), False),
        (("\n    calls.", '\n    """What it does."""\n\n    calls.'), False),
        (("from lab import seeds", "from lab import metrics, seeds"), True),
    ],
    ids=["other content", "a comment", "a docstring", "another room"],
)
def test_an_entry_belongs_to_the_code_that_made_it(cache, tmp_path, monkeypatch, edit, made_again):
    """Whoever edits a room gets what the edited room makes; an entry of other code stays."""
    monkeypatch.setitem(sys.modules, "maker", None)
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old = maker_in(tmp_path / "old", MAKER)
    before = cached("kind", {"a": 1}, old.make)
    assert MAKER.count(edit[0]) == 1
    new = maker_in(tmp_path / "new", MAKER.replace(*edit))
    after = cached("kind", {"a": 1}, new.make)
    assert (len(old.calls), len(new.calls)) == (1, int(made_again))
    assert (after != before) == made_again
    assert (before / "content").read_text() == "one"


def test_an_entry_of_the_same_name_made_by_another_room_is_another(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "maker", None)
    monkeypatch.setitem(sys.modules, "other_maker", None)
    first = cached("kind", {"a": 1}, maker_in(tmp_path, MAKER).make)
    assert cached("kind", {"a": 1}, maker_in(tmp_path, MAKER, "other_maker").make) != first


def test_a_key_that_names_code_itself_is_refused(cache):
    with pytest.raises(ValueError, match="code"):
        cached("kind", {"code": "mine"}, Build())


def test_parts_of_a_key_that_share_a_name_are_refused_and_named():
    assert disjoint({"a": 1}, {"b": 2}, c=3) == {"a": 1, "b": 2, "c": 3}
    assert disjoint() == {}
    parts = {"a": 1}, {"b": 2}
    assert disjoint(*parts) and parts == ({"a": 1}, {"b": 2}), "they stay as they were"
    for shared in (({"a": 1, "b": 2}, {"b": 3, "a": 1}), ({"a": 1, "b": 2}, {"c": 0}, {"a": 1})):
        with pytest.raises(ValueError, match=r"lose one of two values of a"):
            disjoint(*shared)
    with pytest.raises(ValueError, match="of a, b"):
        disjoint({"a": 1, "b": 2}, b=3, a=4)


def test_tensors_that_cannot_be_written_are_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "nowhere" / "x.safetensors"
    with pytest.raises(OSError) as error:
        save_tensors({"x": torch.zeros(2)}, path)
    assert error.value.filename == str(path)


def flip_a_byte(entry: Path) -> None:
    data = bytearray((entry / "deep" / "b.bin").read_bytes())
    data[100] ^= 1
    (entry / "deep" / "b.bin").write_bytes(data)


DAMAGES = {
    "a byte flipped": flip_a_byte,
    "a file truncated": lambda entry: (entry / "a.txt").write_text("cont"),
    "a file emptied": lambda entry: (entry / "deep" / "b.bin").write_bytes(b""),
    "a file missing": lambda entry: (entry / "a.txt").unlink(),
    "a file is a folder": lambda entry: ((entry / "a.txt").unlink(), (entry / "a.txt").mkdir()),
    "manifest missing": lambda entry: (entry / "manifest.json").unlink(),
    "manifest truncated": lambda entry: (entry / "manifest.json").write_text('{"key": {"a'),
    "manifest empty": lambda entry: (entry / "manifest.json").write_bytes(b""),
    "manifest of zero bytes": lambda entry: (entry / "manifest.json").write_bytes(bytes(300)),
    "manifest not text": lambda entry: (entry / "manifest.json").write_bytes(b"\xff\xfe\x80"),
    "manifest of another program": lambda entry: (entry / "manifest.json").write_text('{"v": 1}'),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_entry_is_noticed_reported_and_made_again(cache, damage, capsys):
    build = Build()
    entry = cached("kind", {"a": 1}, build)
    DAMAGES[damage](entry)
    assert cached("kind", {"a": 1}, build) == entry
    assert build.calls == 2
    assert is_good(entry)
    assert f"kind/{entry.name} is damaged" in capsys.readouterr().out
    cached("kind", {"a": 1}, build)
    assert (build.calls, capsys.readouterr().out) == (2, ""), "and is whole again"


@pytest.mark.parametrize("error", [ValueError("half way"), KeyboardInterrupt()])
def test_a_build_that_raises_leaves_nothing_behind(cache, error):
    with pytest.raises(type(error)):
        cached("kind", {"a": 1}, Build(fail=error))
    assert kept_in(cache / "kind") == []
    assert is_good(cached("kind", {"a": 1}, Build())), "the lock was given back"


def test_a_killed_build_is_no_entry_and_what_it_left_is_removed(cache):
    def killed_while_building():
        cached("kind", {"a": 1}, lambda folder: (Build()(folder), kill_me()))

    assert in_a_child(killed_while_building) == -signal.SIGKILL
    (left,) = kept_in(cache / "kind")
    entry = cached("kind", {"a": 1}, Build())
    assert is_good(entry)
    assert left != entry.name, "an entry appears under its name only when it is whole"
    assert kept_in(cache / "kind") == [entry.name]


def test_leftovers_of_another_key_are_left_alone(cache):
    """Its process may still be at work: the lock that says so is the other key's."""
    other = cache / "kind" / "0123456789abcdef.partial-xyz"
    other.mkdir(parents=True)
    cached("kind", {"a": 1}, Build())
    assert other.exists()


def test_two_threads_build_an_entry_once(cache):
    calls, found, ready = [], [], threading.Barrier(2)

    def slow(folder: Path) -> None:
        calls.append(threading.get_ident())
        threading.Event().wait(0.1)
        Build()(folder)

    def ask() -> None:
        ready.wait()
        found.append(cached("kind", {"a": 1}, slow))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(calls) == 1
    assert len(found) == 2 and found[0] == found[1] and is_good(found[0])


def test_two_processes_build_an_entry_once(cache):
    reading, writing = os.pipe()
    mine = Build("of the second process")

    def slow(folder: Path) -> None:
        os.write(writing, b"!")  # it is building
        threading.Event().wait(0.2)
        Build()(folder)

    pid = os.fork()
    if pid == 0:
        try:
            cached("kind", {"a": 1}, slow)
        finally:
            os._exit(0)
    assert os.read(reading, 1) == b"!"
    entry = cached("kind", {"a": 1}, mine)
    os.waitpid(pid, 0)
    os.close(reading)
    os.close(writing)
    assert mine.calls == 0
    assert is_good(entry)


# ── Parts of the evaluation ─────────────────────────────────────────────────────────────────────


class Computed:
    def __init__(self, value: object):
        self.value, self.times = value, 0

    def __call__(self) -> object:
        self.times += 1
        return self.value


def test_a_finished_part_is_remembered_as_json_has_it(tmp_path):
    compute = Computed({"fvu": 0.1 + 0.2, "letters": ("a", "ä"), "missing": None})
    path = tmp_path / "evaluated" / "fidelity.json"
    first = remembered(path, compute)
    assert first == {"fvu": 0.1 + 0.2, "letters": ["a", "ä"], "missing": None}
    assert remembered(path, compute) == first, "to the last bit, and in the same types"
    assert compute.times == 1
    assert remembered(tmp_path / "by_layer.json", Computed({5: 1})) == {"5": 1}
    assert [p.name for p in path.parent.iterdir()] == ["fidelity.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("0.25", "0.26"),
        lambda text: text[:-3],
        lambda text: "",
        lambda text: "[1]",
        lambda text: json.dumps(json.loads(text)["value"]),
    ],
    ids=["a number", "truncated", "empty", "another file", "no checksum"],
)
def test_a_damaged_part_is_computed_again(tmp_path, damage):
    compute, path = Computed({"fvu": 0.25}), tmp_path / "fidelity.json"
    remembered(path, compute)
    path.write_text(damage(path.read_text()))
    assert remembered(path, compute) == {"fvu": 0.25}
    assert compute.times == 2
    remembered(path, compute)
    assert compute.times == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda beside: (beside / "a.json").write_text("other"),
        lambda beside: (beside / "a.json").unlink(),
        lambda beside: (beside / "a.json").write_bytes(b""),
    ],
    ids=["changed", "missing", "emptied"],
)
def test_a_part_is_computed_again_where_what_was_written_with_it_is_not_as_it_was(tmp_path, damage):
    beside, times = tmp_path / "eval", []

    def compute() -> int:
        times.append(1)
        beside.mkdir(exist_ok=True)
        (beside / "a.json").write_text("its own")
        return 7

    for _ in range(2):
        assert remembered(tmp_path / "part.json", compute, beside) == 7
    assert len(times) == 1
    (beside / "more.json").write_text("of a later part")
    remembered(tmp_path / "part.json", compute, beside)
    assert len(times) == 1
    damage(beside)
    assert remembered(tmp_path / "part.json", compute, beside) == 7
    assert len(times) == 2 and (beside / "a.json").read_text() == "its own"


def test_a_part_that_fails_is_not_remembered(tmp_path):
    path = tmp_path / "fidelity.json"
    with pytest.raises(ZeroDivisionError):
        remembered(path, lambda: 1 / 0)
    assert remembered(path, Computed(3)) == 3
