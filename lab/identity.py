"""What code made this: fingerprints of the experiment, of the laboratory, and of single rooms.

A fingerprint changes when the code does, not when a comment, a docstring or a blank line does.
Whatever is kept for later carries one: a run, a saved SAE, an entry of the cache.
"""

import ast
import hashlib
import sys
from functools import cache
from pathlib import Path

LAB = Path(__file__).resolve().parent
# Rooms that only show what runs wrote: no number of a run depends on them.
SHOWING = (
    "comparison",
    "drawing",
    "features_page",
    "frontier",
    "report",
    "runs",
    "summary",
    "tables",
    "verdict",
)
# These keep things and say things, and make none of them.
PLUMBING = ("process", "devices", "storage", "identity")
TABLES = ("RUNS", "RECIPES", "SCALES")  # their rows are values, and values stand in config.json


def _code(text: str) -> str:
    """Python without comments, docstrings, and the rows of TABLES."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        named = any(isinstance(target, ast.Name) and target.id in TABLES for target in targets)
        if named and isinstance(getattr(node, "value", None), ast.Dict):
            node.value = ast.Dict([], [])
    return ast.unparse(tree)


@cache
def source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


for _room in LAB.glob("*.py"):  # now: somebody may edit them while this process works
    source(_room)


@cache
def fingerprint(*paths: Path) -> str:
    """Of the code in these files, 16 hexadecimal digits."""
    codes = sorted((path.name, _code(source(path))) for path in paths)
    return hashlib.sha256(repr(codes).encode()).hexdigest()[:16]


def experiment_fingerprint(script: str | Path) -> str:
    """Of experiment.py and the files beside it that it imports, or of the copies in a run's folder:
    the same for the same code."""
    return fingerprint(*local_files(Path(script).resolve()))


@cache
def local_files(path: Path) -> tuple[Path, ...]:
    """A file and those that it imports from its own folder, however far; lab/ has its own print."""
    found, waiting = {path}, [path]
    while waiting:
        for node in ast.walk(ast.parse(source(waiting.pop()))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            files = {path.parent / f"{name.split('.')[0]}.py" for name in names}
            new = {file for file in files - found if file.is_file()}
            found |= new
            waiting += new
    return tuple(sorted(found))


def laboratory_fingerprint() -> str:
    """Of every room that a run can use."""
    return fingerprint(*sorted(p for p in LAB.glob("*.py") if p.stem not in SHOWING))


@cache
def imported_rooms(path: Path) -> frozenset[Path]:
    """The rooms that a file imports, anywhere in it, and those that they import."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source(path))):
        if isinstance(node, ast.ImportFrom) and node.module == "lab":
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lab."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names.update(a.name.split(".")[1] for a in node.names if a.name.startswith("lab."))
    rooms = {LAB / f"{name}.py" for name in names}
    return frozenset(rooms.union(*map(imported_rooms, rooms)))


def code_behind(module: str) -> str:
    """Fingerprint of a module and of the rooms it uses: what the module makes depends on it."""
    path = Path(sys.modules[module].__file__).resolve()
    makers = (room for room in imported_rooms(path) if room.stem not in PLUMBING)
    return fingerprint(path, *sorted(makers))
