"""Code has a fingerprint: it changes with what the code does and with nothing else."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import experiment
from lab import identity
from lab.identity import (
    code_behind,
    experiment_fingerprint,
    fingerprint,
    imported_rooms,
    laboratory_fingerprint,
)

SCRIPT = Path(experiment.__file__)


class Copies:
    """Copies of the program in folders of their own, edited as text."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.monkeypatch, self.n = folder, monkeypatch, 0

    def _new(self) -> Path:
        self.n += 1
        folder = self.folder / f"copy_{self.n}"
        folder.mkdir()
        return folder

    def of_script(self, *pairs: tuple[str, str]) -> str:
        """Fingerprint of experiment.py with each old text, found once, in place of the new one."""
        path = self._new() / "experiment.py"
        path.write_text(edited(SCRIPT.read_text(encoding="utf-8"), pairs), encoding="utf-8")
        return experiment_fingerprint(path)

    def of_lab(self, room: str | None = None, *pairs: tuple[str, str]) -> Path:
        """A copy of lab/, one room edited; from here on it is the laboratory."""
        lab = self._new() / "lab"
        shutil.copytree(SCRIPT.parent / "lab", lab, ignore=shutil.ignore_patterns("__pycache__"))
        if room:
            path = lab / f"{room}.py"
            path.write_text(edited(path.read_text(encoding="utf-8"), pairs), encoding="utf-8")
        self.monkeypatch.setattr(identity, "LAB", lab)
        return lab

    def code_behind(self, module: str, room: str | None = None, *pairs: tuple[str, str]) -> str:
        """code_behind() of a room of such a copy."""
        lab = self.of_lab(room, *pairs)
        stands = SimpleNamespace(__file__=str(lab / f"{module}.py"))
        self.monkeypatch.setitem(sys.modules, f"copy.of.{module}", stands)
        return code_behind(f"copy.of.{module}")


def edited(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    ast.parse(text)
    return text


@pytest.fixture
def copies(tmp_path, monkeypatch) -> Copies:
    return Copies(tmp_path, monkeypatch)


# ── The experiment ──────────────────────────────────────────────────────────────────────────────

STARTS = "    def schedule_at(self, step: int) -> tuple[list[float], list[float]]:\n"
LINEAR = "def linear(progress: float) -> float:"
AFTER = 'CONTROL = "run_7"'  # stands behind the last row
SAME = {
    "nothing": [],
    "a comment on a line of its own": [("\n\ndef linear(", "\n\n# Straight.\ndef linear(")],
    "a comment behind code": [("    return progress\n", "    return progress  # as it is\n")],
    "a docstring more": [
        (f"{LINEAR}\n", f'{LINEAR}\n    """As it is."""\n')
    ],
    "a docstring less": [('    """Slow, fast, slow: half a cosine period."""\n', "")],
    "another docstring": [("Slow, fast, slow: half a cosine period.", "Other words.\n\n    More.")],
    "another docstring of the module": [("Do sparse autoencoders get", "Do SAEs get")],
    "another docstring of a class": [("One row of the plan: what a run tries.", "A row.")],
    "blank lines": [(STARTS, f"\n\n\n{STARTS}")],
    "a statement on two lines": [
        ("    return run.alpha_start + way * (run.alpha_end - run.alpha_start)\n",
         "    return run.alpha_start + way * (\n        run.alpha_end - run.alpha_start\n    )\n")
    ],
    "another row": [(f"}}\n{AFTER}", f'    "run_11": Run("x", alpha_start=0.3),\n}}\n{AFTER}')],
    "a row less": [('    "run_9": Run("ablation: run_1 without the EMA", ema=False),\n', "")],
    "a row's values": [('Run("ablation: run_1 without the EMA", ema=False)', 'Run("x", ema=True)')],
    "a row of the recipes": [('"synthetic": Recipe(),', '"synthetic": Recipe(gate_init=0.7),')],
}  # fmt: skip
OTHER = {
    "a number": [("return min(1.0, 2.0 * progress)", "return min(1.0, 3.0 * progress)")],
    "a default of every run": [("alpha_start: float = 0.1", "alpha_start: float = 0.2")],
    "a default of every recipe": [("gate_init: float = 0.2", "gate_init: float = 0.3")],
    "an order that must not move": [
        ("        self.optimizer.step()\n        sae.normalize_()\n",
         "        sae.normalize_()\n        self.optimizer.step()\n")
    ],
    "what rows are made with": [('"alpha_start": alpha,', '"alpha_start": 0.5,')],
    "a row of another table": [('"fast": fast,', '"fast": linear,')],
    "which run is the control": [(AFTER, 'CONTROL = "run_9"')],
    "a text that is no docstring": [("it must map [0, 1]", "it should map [0, 1]")],
    "an import": [("import math\n", "import math\nimport cmath\n")],
    "a decorator": [("    @torch.no_grad()\n    def normalize_", "    def normalize_")],
}  # fmt: skip


@pytest.mark.parametrize("edit", SAME)
def test_what_does_nothing_does_not_change_the_experiments_fingerprint(edit, copies):
    assert copies.of_script(*SAME[edit]) == experiment_fingerprint(SCRIPT)


@pytest.mark.parametrize("edit", OTHER)
def test_what_does_something_changes_the_experiments_fingerprint(edit, copies):
    assert copies.of_script(*OTHER[edit]) != experiment_fingerprint(SCRIPT)


def test_no_two_edits_have_one_fingerprint(copies):
    found = [copies.of_script(*pairs) for pairs in OTHER.values()]
    assert len(set(found)) == len(found)
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in found)


def test_a_path_may_be_given_as_text_relative_or_by_a_link(tmp_path, monkeypatch):
    expected = experiment_fingerprint(SCRIPT)
    (tmp_path / "link").symlink_to(SCRIPT.parent)
    monkeypatch.chdir(SCRIPT.parent)
    for path in ("experiment.py", str(SCRIPT), tmp_path / "link" / "experiment.py"):
        assert experiment_fingerprint(path) == expected


def test_a_function_with_a_docstring_alone_is_one_that_does_nothing(tmp_path):
    texts = 'def f():\n    """Later."""\n', "def f():\n    pass\n", "def f():\n    return 1\n"
    found = []
    for i, text in enumerate(texts):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "x.py").write_text(text)
        found.append(fingerprint(tmp_path / str(i) / "x.py"))
    assert found[0] == found[1] != found[2]


def test_an_edit_while_a_process_works_does_not_change_what_it_takes_itself_for(tmp_path):
    (tmp_path / "experiment.py").write_text("x = 1\n")
    before = experiment_fingerprint(tmp_path / "experiment.py")
    (tmp_path / "experiment.py").write_text("x = 2\n")
    assert experiment_fingerprint(tmp_path / "experiment.py") == before


# ── The laboratory and its rooms ────────────────────────────────────────────────────────────────


def test_a_copy_of_the_laboratory_is_the_same_and_an_edited_one_is_not(copies):
    own = laboratory_fingerprint()
    copies.of_lab()
    assert laboratory_fingerprint() == own
    (copies.of_lab() / "seeds.py").write_text(
        (SCRIPT.parent / "lab/seeds.py").read_text() + "# x\n"
    )
    assert laboratory_fingerprint() == own
    copies.of_lab("seeds", (".digest()[:6]", ".digest()[:5]"))
    assert laboratory_fingerprint() != own


@pytest.mark.parametrize("room", identity.SHOWING)
def test_rooms_that_only_show_what_runs_wrote_are_no_part_of_the_laboratory(room, copies):
    own = laboratory_fingerprint()
    lab = copies.of_lab()
    (lab / f"{room}.py").write_text((lab / f"{room}.py").read_text() + "\nmore = 1\n")
    assert laboratory_fingerprint() == own


def test_every_other_room_is_a_part_of_the_laboratory_and_so_is_a_new_one(copies):
    shown = {
        "comparison",
        "drawing",
        "features_page",
        "frontier",
        "report",
        "runs",
        "summary",
        "tables",
        "verdict",
    }
    own = laboratory_fingerprint()
    for room in sorted(path.stem for path in identity.LAB.glob("*.py")):
        lab = copies.of_lab()
        (lab / f"{room}.py").write_text((lab / f"{room}.py").read_text() + "\nmore = 1\n")
        assert (laboratory_fingerprint() == own) == (room in shown), room
    lab = copies.of_lab()
    (lab / "new_room.py").write_text('"""A new room."""\n\nx = 1\n')
    assert laboratory_fingerprint() != own


def test_the_rows_of_the_scales_are_values_and_what_is_made_of_them_is_code(copies):
    own = laboratory_fingerprint()
    copies.of_lab("scales", ("training_tokens=614_400", "training_tokens=300_000"))
    assert laboratory_fingerprint() == own, "they stand in config.json"
    copies.of_lab("scales", ("batch_tokens: int = 2048", "batch_tokens: int = 4096"))
    assert laboratory_fingerprint() != own


ROOMS = {
    "a": '"""A."""\nfrom lab.b import x\n',
    "b": "from lab import c, d as other\n",
    "c": "def f():\n    import lab.e as e\n    return e\n",
    "d": "import os\nimport torch\n",
    "e": "class A:\n    def f(self):\n        from lab.g import y\n        return y\n",
    "f": "x = 1\n",
    "g": "y = 'from lab.f import x'  # import lab.f\n",
}


@pytest.fixture
def made_up(tmp_path, monkeypatch) -> Path:
    lab = tmp_path / "lab"
    lab.mkdir()
    for name, text in ROOMS.items():
        (lab / f"{name}.py").write_text(text)
    monkeypatch.setattr(identity, "LAB", lab)
    return lab


@pytest.mark.parametrize(
    ("room", "found"),
    [("a", "bcdeg"), ("b", "cdeg"), ("c", "eg"), ("d", ""), ("e", "g"), ("g", "")],
)
def test_rooms_are_found_however_they_are_imported_and_through_one_another(room, found, made_up):
    assert {path.stem for path in imported_rooms(made_up / f"{room}.py")} == set(found)
    assert all(path.parent == made_up for path in imported_rooms(made_up / f"{room}.py"))


def test_the_rooms_of_the_program_are_found_as_an_import_finds_them():
    """What importing a room imports is among its rooms; some are imported only when asked for."""
    code = "import sys, {}; print(*(m for m in sys.modules if m.startswith('lab.')))"
    for room in ("activations", "evaluation", "work"):
        name = f"lab.{room}"
        asked = [sys.executable, "-c", code.format(name)]
        out = subprocess.run(asked, cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
        found = {f"lab.{path.stem}" for path in imported_rooms(SCRIPT.parent / f"lab/{room}.py")}
        assert set(out.stdout.split()) - {name} <= found
    assert imported_rooms(SCRIPT.parent / "lab/seeds.py") == frozenset()


def test_code_behind_a_room_sees_an_edit_of_it_and_of_a_room_it_uses_however_far(copies):
    own = copies.code_behind("activations")
    assert own == code_behind("lab.activations"), "a copy has the same"
    hook = (
        "            return None\n        new = self",
        "            return output\n        new = self",
    )
    edits = {
        "activations": ("times_median: float = 3.0", "times_median: float = 4.0"),
        "language_model": hook,  # an edited hook
        "seeds": (".digest()[:6]", ".digest()[:5]"),
    }
    for room, pair in edits.items():
        assert copies.code_behind("activations", room, pair) != own, room


def test_code_behind_a_room_does_not_see_rooms_that_it_does_not_use(copies):
    own = copies.code_behind("activations")
    for room in ("metrics", "results", "probing", "fidelity", "work", "folders"):
        lab = copies.of_lab()
        path = lab / f"{room}.py"
        path.write_text(path.read_text() + "\nmore = 1\n")
        stands = SimpleNamespace(__file__=str(lab / "activations.py"))
        copies.monkeypatch.setitem(sys.modules, "copy.of.activations", stands)
        assert code_behind("copy.of.activations") == own, room


@pytest.mark.parametrize("room", ["process", "devices", "storage", "identity"])
def test_rooms_that_keep_and_say_things_make_none_of_them(room, copies):
    """An entry of the cache is not made again because a message has another wording."""
    own = copies.code_behind("activations")
    lab = copies.of_lab()
    (lab / f"{room}.py").write_text((lab / f"{room}.py").read_text() + "\nmore = 1\n")
    stands = SimpleNamespace(__file__=str(lab / "activations.py"))
    copies.monkeypatch.setitem(sys.modules, "copy.of.activations", stands)
    assert code_behind("copy.of.activations") == own
