"""Draws docs/architecture.svg: which room of lab/ asks which, read from their imports.

    python docs/draw_architecture.py

A panel is a subject, and asks only panels below it or beside it on the right.  The import rules
are read as tests/test_rooms.py reads them; tests/test_documents.py holds that the committed picture
is what is drawn today.  Raises SystemExit where a room has no panel, or asks one above.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from test_rooms import KNOWS, ROOMS

# A new room goes into one of these, in the order in which they may ask each other.
PANELS = {
    "Keeping a run, and looking inside": "preflight features features_page word_by_word folders "
    "work checkpoints state training_log summary",
    "Comparing runs": "report verdict tables drawing frontier runs comparison",
    "Saved SAEs and their scores": "evaluation absorption probing fidelity online_absorption "
    "ground_truth results saved_sae bench metrics quick_absorption quick_k_sparse quick_probing "
    "adam",
    "From text to activations": "activations text packaged_text language_model synthetic compiled "
    "smollm2 hub",
    "Foundations": "scales seeds devices storage identity process",
}
LEFT = 660  # of the first panel, which has the second beside it
WIDTH, MARGIN, PAD = 1000, 20, 14
CHIP, CHARACTER, STEP = 26, 7.9, 62  # height of a room, width of a letter, from row to row
COLOURS = ("#E8F0FA", "#FBEFE3", "#EAF5EA", "#F5F0FA", "#F1F1F1")

Box = tuple[float, float, float]  # left, top, width


def asks(room: str) -> set[str]:
    """The rooms that a module imports itself."""
    return {name.removeprefix("lab.") for name in KNOWS[room] if name.startswith("lab.")}


def panel_of() -> dict[str, int]:
    """{room: number of its panel}."""
    found = {room: i for i, rooms in enumerate(PANELS.values()) for room in rooms.split()}
    if odd := set(ROOMS) ^ set(found):
        raise SystemExit(f"error: PANELS and lab/ differ in {', '.join(sorted(odd))}")
    for room, i in found.items():
        if above := {other for other in asks(f"lab.{room}") if found[other] < i}:
            raise SystemExit(f"error: {room} asks {', '.join(sorted(above))}, in a panel above")
    return found


def direct(rooms: list[str]) -> dict[str, set[str]]:
    """Whom each asks among the rooms of its panel, less what follows through another of them."""
    inside = {room: asks(f"lab.{room}") & set(rooms) for room in rooms}

    def reached(room: str) -> set[str]:
        return inside[room].union(*(reached(other) for other in inside[room]))

    return {
        room: others - set().union(*(reached(other) for other in others))
        for room, others in inside.items()
    }


def rows_of(edges: dict[str, set[str]]) -> list[list[str]]:
    """Rooms in rows, each below all that ask it, and near them from left to right."""

    def depth(room: str) -> int:
        return max((depth(other) + 1 for other in edges if room in edges[other]), default=0)

    rows: list[list[str]] = []
    for room in sorted(edges, key=depth):
        rows += [[]] if depth(room) == len(rows) else []
        rows[depth(room)].append(room)
    place: dict[str, float] = {}

    def middle(room: str) -> float:
        above = [place[other] for other in place if room in edges[other]]
        return sum(above) / len(above) if above else 0.5

    for row in rows:
        row.sort(key=middle)
        place |= {room: (i + 0.5) / len(row) for i, room in enumerate(row)}
    return rows


def chip(room: str, x: float, y: float) -> list[str]:
    """A room; its border is bold where experiment.py or plot.py asks it itself."""
    width = CHARACTER * len(room) + 16
    bold = room in asks("experiment") | asks("plot")
    look = 'stroke="#222" stroke-width="2"' if bold else 'stroke="#999" stroke-width="1"'
    return [
        f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{CHIP}" rx="5" '
        f'fill="white" {look}/>',
        f'<text x="{x:.1f}" y="{y + 17:.1f}" class="room" text-anchor="middle">{room}</text>',
    ]


def arrow(x: float, y: float, to_x: float, to_y: float, look: str) -> str:
    bend = (to_y - y) / 2
    path = f"M{x:.1f},{y:.1f} C{x:.1f},{y + bend:.1f} {to_x:.1f},{to_y - bend:.1f} "
    return f'<path d="{path}{to_x:.1f},{to_y:.1f}" class="{look}" marker-end="url(#{look})"/>'


def height(title: str) -> float:
    return 54 + STEP * (len(rows_of(direct(PANELS[title].split()))) - 1) + CHIP + PAD


def panel(number: int, box: Box, panels: dict[str, int]) -> list[str]:
    title, rooms = list(PANELS.items())[number]
    left, top, width = box
    edges, places, drawn = direct(rooms.split()), {}, []
    for i, row in enumerate(rows_of(edges)):
        widths = [CHARACTER * len(room) + 16 for room in row]
        gap = (width - 2 * PAD - sum(widths)) / (len(row) + 1)
        x = left + PAD
        for room, own in zip(row, widths, strict=True):
            x += gap + own / 2
            places[room] = x, top + 54 + STEP * i
            x += own / 2
    for room, others in edges.items():
        x, y = places[room]
        for other in sorted(others):
            to_x, to_y = places[other]
            drawn.append(arrow(x, y + CHIP, to_x, to_y - 1, "inside"))
    for room, (x, y) in places.items():
        drawn += chip(room, x, y)
    others = [panels[other] for room in edges for other in asks(f"lab.{room}")]
    titles = [f"{list(PANELS)[i]} ({others.count(i)})" for i in range(len(PANELS)) if i != number]
    asked = [text for text in titles if not text.endswith("(0)")]
    note = f"asks {', '.join(asked)}" if asked else "asks no other panel"
    return [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height(title)}" rx="8" '
        f'fill="{COLOURS[number]}"/>',
        f'<text x="{left + PAD}" y="{top + 22}" class="title">{title}</text>',
        f'<text x="{left + PAD}" y="{top + 39}" class="note">{note}</text>',
        *drawn,
    ]


def file_box(name: str, note: str, left: float, width: float) -> list[str]:
    return [
        f'<rect x="{left}" y="{MARGIN}" width="{width}" height="52" rx="8" fill="#333"/>',
        f'<text x="{left + PAD}" y="{MARGIN + 22}" class="file">{name}</text>',
        f'<text x="{left + PAD}" y="{MARGIN + 40}" class="note" style="fill:#ddd">{note}</text>',
    ]


def picture() -> str:
    """The SVG."""
    panels, gap = panel_of(), 34
    right = MARGIN + LEFT + 20
    narrow = WIDTH - MARGIN - right
    top = MARGIN + 52 + gap
    drawn = file_box("experiment.py", "edited: runs, schedules, the SAE, training", MARGIN, LEFT)
    drawn += file_box("plot.py", "figures and tables of runs", right, narrow)
    drawn.append(arrow(MARGIN + LEFT, top + 60, right - 2, top + 60, "between"))
    tall = max(height(title) for title in list(PANELS)[:2])
    middle = MARGIN + LEFT / 2
    drawn += panel(0, (MARGIN, top, LEFT), panels) + panel(1, (right, top, narrow), panels)
    drawn += [arrow(middle, top - gap, middle, top - 2, "between")]
    drawn += [arrow(right + narrow / 2, top - gap, right + narrow / 2, top - 2, "between")]
    first = next(iter(PANELS))
    top, bottom = top + tall + gap, top + height(first)
    for number, title in list(enumerate(PANELS))[2:]:
        drawn += panel(number, (MARGIN, top, WIDTH - 2 * MARGIN), panels)
        drawn += [arrow(middle, bottom, middle, top - 2, "between")]
        bottom, top = top + height(title), top + height(title) + gap
    legend = (
        "→ imports; one that follows from others is left out.  (n): so many imports.  Bold border: "
    )
    legend += "experiment.py or plot.py asks the room itself."
    drawn.append(f'<text x="{MARGIN}" y="{top}" class="note">{legend}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + MARGIN:.0f}">'
    style = (
        "<style>text{font-family:Helvetica,Arial,sans-serif;fill:#222}"
        ".room{font:13px Menlo,Consolas,'DejaVu Sans Mono',monospace}.title{font-size:15px;"
        "font-weight:bold}.file{font:bold 15px Menlo,Consolas,'DejaVu Sans Mono',monospace;"
        "fill:white}.note{font-size:12px;fill:#555}path.inside{fill:none;stroke:#888}"
        "path.between{fill:none;stroke:#333;stroke-width:2.5}</style>"
    )
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="{size}" '
        f'markerHeight="{size}" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
        for name, size, colour in (("inside", 7, "#888"), ("between", 4, "#333"))
    )
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, style, f"<defs>{heads}</defs>", ground, *drawn, "</svg>"]) + "\n"


if __name__ == "__main__":
    (HERE / "architecture.svg").write_text(picture(), encoding="utf-8")
