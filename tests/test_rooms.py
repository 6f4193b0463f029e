"""The rooms of lab/: whom each may know, what it says it promises, and how large a file may be."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(path.stem for path in (ROOT / "lab").glob("*.py") if path.stem != "__init__")
# Every module of the program by its name; below lab/ there are no folders.
FILES = {
    "experiment": ROOT / "experiment.py",
    "plot": ROOT / "plot.py",
    "lab": ROOT / "lab" / "__init__.py",
    **{f"lab.{room}": ROOT / "lab" / f"{room}.py" for room in ROOMS},
}


def imported(source: str) -> set[str]:
    """The modules that a file imports, inside functions too, and by import_module("a name")."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                found |= {name.name for name in names}
            case ast.ImportFrom(module, names, level):
                assert level == 0, "a relative import: write out `from lab.room import name`"
                # `from lab import text` is a room, `from lab.text import pack` a name in one.
                found |= {f"lab.{name.name}" for name in names} if module == "lab" else {module}
            case ast.Call(
                ast.Name("import_module" | "__import__") | ast.Attribute(attr="import_module"),
                [ast.Constant(str(name)), *_],
            ):
                found.add(name)
    # lab/__init__.py runs before any room does.
    return found | {"lab" for name in found if name.startswith("lab.")}


KNOWS = {name: imported(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def reached(name: str) -> set[str]:
    """All that a module imports, itself or through modules of the program."""
    found, waiting = set(), [name]
    while waiting:
        new = KNOWS[waiting.pop()] - found
        found |= new
        waiting += new & FILES.keys()
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import a, b.c as d", {"a", "b.c"}),
        ("from lab.text import pack", {"lab", "lab.text"}),
        ("from lab import text, scales as s", {"lab", "lab.text", "lab.scales"}),
        ("def f():\n    if True:\n        import experiment", {"experiment"}),
        ("class A:\n    def f(self):\n        from plot import load", {"plot"}),
        ("importlib.import_module('experiment')", {"experiment"}),
        ("__import__('plot')", {"plot"}),
        ("'import experiment'  # import plot", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source, found):
    assert imported(source) == found


def test_no_room_knows_the_experiment_or_the_figures():
    assert len(ROOMS) >= 15
    for name in FILES.keys() - {"experiment", "plot"}:
        outside = {other.split(".")[0] for other in KNOWS[name]} & {"experiment", "plot"}
        assert not outside, f"{name} imports {outside}: hand it what it needs"


def test_what_is_imported_from_the_laboratory_is_there():
    for name in FILES:
        asked = {other for other in KNOWS[name] if other.split(".")[0] == "lab"}
        assert asked <= FILES.keys(), name


def test_rooms_do_not_import_one_another_in_a_circle():
    """Inside functions neither; and lab/__init__.py, which every room imports, imports none."""
    rooms = {name: KNOWS[name] & FILES.keys() for name in FILES if name.startswith("lab")}
    try:
        TopologicalSorter(rooms).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_figures_are_drawn_without_torch():
    """By reading, for imports inside functions; and by importing, for what packages import."""
    assert not {name for name in reached("plot") if name.split(".")[0] in ("torch", "experiment")}
    code = "import plot, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_room_says_first_what_it_promises():
    said = {}
    for room in ROOMS:
        text = ast.get_docstring(ast.parse(FILES[f"lab.{room}"].read_text(encoding="utf-8")))
        assert text, f"lab/{room}.py has no docstring"
        said[room] = text.splitlines()[0]
        sentence = len(said[room].split()) >= 4 and said[room].endswith(".")
        assert sentence, f"lab/{room}.py begins with no sentence of its own: {said[room]!r}"
    assert len(set(said.values())) == len(ROOMS), "two rooms promise the same"


@pytest.mark.parametrize(
    ("name", "lines", "size"),
    [
        ("experiment", 1_000, 45_000),  # an agent's loop sends it, and plot.py, at every turn
        ("plot", 450, 20_000),
        *((name, 400, None) for name in FILES if name.startswith("lab")),
    ],
)
def test_a_file_is_no_longer_than_its_limit(name, lines, size):
    held = FILES[name].read_bytes()
    found = held.count(b"\n"), len(held)  # else the message of a failure holds the whole file
    assert found[0] <= lines
    assert size is None or found[1] <= size


def test_the_readme_says_how_large_the_edited_file_is():
    size = len((ROOT / "experiment.py").read_bytes())
    assert f"{size:,} bytes" in (ROOT / "README.md").read_text(encoding="utf-8")
