"""features.html from the lines of features.jsonl: one file that fetches nothing.

Nothing that came out of a run is ever markup: the data is JSON in which no character can end its
element, the page's script only makes text nodes of it, and the page itself forbids every other
script, and all that comes from elsewhere.
"""

import base64
import hashlib
import json
from pathlib import Path

LAB = Path(__file__).resolve().parent
LIMIT = 8_000_000  # bytes
SHRUNK = {"examples": 4, "middle": 1}  # how many are left of each where the page would be larger


def page(lines: list[dict], limit: int = LIMIT) -> str:
    """The page of a run, under `limit` bytes: where it would be larger, with fewer examples, and
    then with fewer and fewer words of a letter.

    Raises ValueError if it is still larger.
    """
    text, most = _rendered(lines), 64
    while len(text) >= limit and most:
        lines, most = [_shrunk(line, most) for line in lines], most // 2
        text = _rendered(lines)
    if len(text) >= limit:
        raise ValueError(f"features.html would take {len(text)} bytes, and {limit} are allowed")
    return text


def _shrunk(line: dict, most_words: int) -> dict:
    if line["kind"] == "letter":
        return line | {"words": line["words"][:most_words]}
    return line | {name: line[name][:n] for name, n in SHRUNK.items() if name in line}


def _rendered(lines: list[dict]) -> str:
    """In ASCII: bytes are characters."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(LAB), autoescape=True, undefined=StrictUndefined
    )
    script, style = ((LAB / f"features.{kind}").read_text("utf-8") for kind in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template("features.html.j2").render(
        about=lines[0],
        data=Markup(in_script(lines)),
        script=Markup(script),
        style=Markup(style),
        digest=digest,
    )
    return text.encode("ascii", "xmlcharrefreplace").decode()


def in_script(value: object) -> str:
    """JSON that is safe inside a <script>: ASCII, and with no character that begins markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
