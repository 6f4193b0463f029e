"""What is written for readers: links that lead somewhere, commands that can be pasted, names that
the program has, a picture of the imports as they are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_results

import experiment
import plot
from lab.results import layer_results
from lab.scales import SCALES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """Markdown less its fenced blocks and `spans`, in which a link is none."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^```.*?^```$", "", text))


def links(text: str) -> list[str]:
    """Where markdown's links and images and HTML's images lead, hubs and web pages left out."""
    found = re.findall(r"\]\(([^)\s]+)[^)]*\)", without_code(text))
    found += re.findall(r'(?:src|href)="([^"]+)"', text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(text: str) -> set[str]:
    """Of each heading, as GitHub names it: lower case, words joined by dashes."""
    titles = re.findall(r"(?m)^#+ +(.+?) *$", re.sub(r"(?ms)^```.*?^```$", "", text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path, text: str) -> list[str]:
    found = []
    for link in links(text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and anchor not in anchors(text_of(target) if name else text)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_heading_that_exist(page):
    assert broken(page, text_of(page)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a](LICENSE) and [b](docs/hub.md#sae-benchs-probing-datasets)", []),
        ("[a](nowhere.md)", ["nowhere.md"]),
        ("![a](docs/nowhere.svg 'title')", ["docs/nowhere.svg"]),
        ('<img src="nowhere.png">', ["nowhere.png"]),
        ("[a](docs/hub.md#nowhere)", ["docs/hub.md#nowhere"]),
        ("# Here\n[a](#here) [b](#there)", ["#there"]),
        ("[a](../outside.md)", ["../outside.md"]),
        ("[a](https://example.org/nowhere) `[b](nowhere)`\n```\n[c](nowhere)\n```\n", []),
    ],
)
def test_a_link_that_leads_nowhere_is_found(text, found):
    assert broken(ROOT / "README.md", text) == found


def test_links_are_looked_for_where_there_are_some():
    assert len(links(text_of(ROOT / "README.md"))) > 15


# ── README.md and AGENTS.md ─────────────────────────────────────────────────────────────────────


def test_what_is_read_first_is_short():
    assert text_of(ROOT / "README.md").count("\n") <= 160
    assert text_of(ROOT / "AGENTS.md").count("\n") < 60


def command_below(comment: str) -> str:
    """The fenced block below an HTML comment, cut out as .ci/run cuts out the tests'."""
    (cut,) = re.findall(r"(?m)^command=\$\((sed .*)\)$", text_of(ROOT / ".ci" / "run"))
    assert cut.count("the tests") == 1
    how = ["bash", "-euo", "pipefail", "-c", cut.replace("the tests", comment)]
    return subprocess.run(how, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_each_of_the_two_commands_is_one_line_that_can_be_pasted():
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -q -r requirements.txt"
    install += " && pip uninstall -q -y torchvision && "
    assert command_below("the main job") == install + "python experiment.py --out_dir=run_1"
    tests = "ruff check . && ruff format --check . && python -m pytest -n 2 --dist loadfile"
    assert command_below("the tests") == install + tests


def test_the_readme_has_every_run_once_and_no_other():
    rows = re.findall(r"(?m)^\| (run_\d+) \|", text_of(ROOT / "README.md"))
    assert rows == ["run_0", *experiment.RUNS]


def test_agents_are_told_every_exit_status_and_scale():
    page = text_of(ROOT / "AGENTS.md")
    assert re.findall(r"(?m)^\| (\d+) \|", page) == ["0", "1", "75", "130"]
    assert all(f"`{name}`" in page or f"SCALE={name} " in page for name in SCALES)


def test_every_scale_has_a_page_that_names_it():
    pages = text_of(ROOT / "docs" / "scales.md")
    assert all(name in pages for name in SCALES)


# ── docs/ ───────────────────────────────────────────────────────────────────────────────────────


def described() -> list[str]:
    """Patterns of the metrics that the first column of docs/metrics.md names: `*` is a word, `k` a
    number, and a name that begins with _ an end."""
    names = []
    for row in re.findall(r"(?m)^\| (`[^|]+) \|", text_of(ROOT / "docs" / "metrics.md")):
        names += re.findall(r"`([^`]+)`", row)
    patterns = [re.sub(r"_top_k$", r"_top_\\d+", name.replace("*", "[a-z]+")) for name in names]
    return [f".+{pattern}" if pattern.startswith("_") else pattern for pattern in patterns]


def test_every_metric_is_explained_and_no_other():
    arguments = test_results.made_up()
    known = {*layer_results(**arguments)["means"], *plot.METRICS}
    patterns = described()
    assert {n for n in known if not any(re.fullmatch(p, n) for p in patterns)} == set()
    assert [p for p in patterns if not any(re.fullmatch(p, n) for n in known)] == []


def test_the_picture_of_the_rooms_is_what_is_drawn_from_the_imports_today():
    code = "import draw_architecture as d, sys; sys.stdout.buffer.write(d.picture().encode())"
    drawn = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, check=True
    )
    assert drawn.stdout.decode() == text_of(ROOT / "docs" / "architecture.svg"), (
        "run `python docs/draw_architecture.py`"
    )
