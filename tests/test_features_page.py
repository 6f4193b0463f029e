"""features.html: nothing of a run becomes markup, nothing is fetched, and its links lead on.

Those marked `browser` open it in Chromium, which must be installed: `python -m pytest -m browser`.
"""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from browser import chromium
from made_up_runs import LAPTOP, draw, records, usual_entry, write_run

from lab.features_page import LAB, LIMIT, in_script, page

HOSTILE = (
    "</script><script>document.title = 'taken'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title = 'taken'\">",
    "'\"&amp;`${document.title = 'taken'}",
    "\u2028\u2029\n\r\t\0\u007f",
    "\ud800 alone, \udc00 too",  # half of a pair of surrogates
    "\u202e\u2066 right to left \u05d0",
    "{{ about.run }}{% raw %}\\u003c",
)


FATES = ("fires", "absorbed", "lost")


def text(tokens: list[str], at: int, peak: float) -> dict:
    acts = [peak if i == at else None if i == 0 else 0.0 for i in range(len(tokens))]
    return {"tokens": tokens, "acts": acts, "at": at, "context": 3}


def latent(number: int, says: str, layer: int = 8, **changes) -> dict:
    line = {
        "kind": "latent", "layer": layer, "latent": number, "roles": [{"role": "random"}],
        "fires": 40, "density": 0.004, "mean": 3.0, "max": 9.0, "histogram": [20, 12, 6, 2],
        "examples": [text(["<s>", " a", says, " b"], 2, 9.0)],
        "middle": [text(["<s>", says, "!"], 1, 4.5)],
        "words": [[" swift", 5.0]], "letters": {"s": 0.6, "t": 0.1},
        "promoted": [[" up" + str(number), 3.0]], "suppressed": [[" down", -3.0]],
        "nearest": [[7, 0.5], [2000, 0.1]], "seeds": [[11, 0.9]],
    }  # fmt: skip
    return line | changes


def word(name: str, fate: str, taker: int = 31) -> dict:
    main = 2.0 if fate == "fires" else 0.0
    return {
        "word": name, "fate": fate, "fraction": 0.5, "projection": main + 3.5, "main": main,
        "carried": [[taker, 10.0, 3.0], [2000, 1.0, 0.25]], "rest": 0.5, "bias": -0.5,
        "error": 0.25,
    }  # fmt: skip


def letter(name: str, words: list[dict], layer: int = 8) -> dict:
    fates = [w["fate"] for w in words]
    takers = sorted({w["carried"][0][0] for w in words if w["fate"] == "absorbed"})
    rates = {"cos": 0.3, "on": 0.1, "off": 0.02}
    return {
        "kind": "letter", "layer": layer, "letter": name, "f1": 0.8, "fraction": 0.5,
        "main": [{"latent": 30, "cos": 0.4, "on": 0.7, "off": 0.1}],
        "absorbers": [{"latent": i, "words": 1} | rates for i in takers],
        "counts": {"words": len(words)} | {f: fates.count(f) for f in FATES},
        "words": words,
    }  # fmt: skip


def made_up(says: str = " squirrel") -> list[dict]:
    """The lines of a run of two layers: two letters, a task, a few latents."""
    about = {"kind": "about", "run": "run_1", "title": "a title", "scale": "tiny", "model": "m"}
    task = {"kind": "task", "layer": 8, "task": "news", "class": says, "latent": 32, "texts": 9}
    s = [word(" snake", "fires"), word(says, "absorbed"), word(" sold", "lost", 2000)]
    t = [word(" tea", "fires"), word(" ten", "absorbed", 33)]
    lines = [about | {"n_seeds": 2, "heldout": [4, 8], "tasks": ["news"], "absorption_words": None}]
    for layer in (8, 9):
        lines += [
            {
                "kind": "sae", "layer": layer, "sae": f"run_1_layer_{layer}_seed_0", "d_sae": 96,
                "others": [f"run_1_layer_{layer}_seed_1"], "target_l0": 8.0, "l0": 8.1,
                "tokens": 900, "dead": 0.1,
            },
            letter("s", s, layer), letter("t", t, layer),
            task | {"layer": layer, "mean": 2.0, "mean_others": 0.1, "auc": 0.9},
            latent(7, " dead", layer, fires=0, density=0.0, mean=None, max=None, histogram=None,
                   examples=[], middle=[]),
            *(latent(i, says if i == 31 else f" says{i}", layer) for i in (30, 31, 32, 33)),
        ]  # fmt: skip
    return lines


class Parts(HTMLParser):
    """The elements of a page, its attributes that could name another file, and its scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.named, self.scripts, self.policy = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.named += [found[name] for name in ("src", "href", "action", "data") if name in found]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data


@pytest.mark.parametrize("says", HOSTILE)
def test_what_a_run_says_is_data_and_never_markup(says):
    plain, lines = page(made_up()), made_up(says)
    lines[0] |= {"run": f"run {says}", "title": says}
    hostile = page(lines)
    assert hostile.isascii()
    found = Parts(hostile)
    assert found.tags == Parts(plain).tags, "the same elements, whatever the run says"
    assert json.loads(found.scripts[0]) == lines, "and not a character is lost"
    assert found.scripts[1] == Parts(plain).scripts[1]


def test_json_in_a_script_has_no_character_that_ends_it():
    for says in HOSTILE:
        found = in_script({"word": says})
        assert json.loads(found)["word"] == says
        assert found.isascii() and not set("<>&\u2028\n") & set(found)
    with pytest.raises(ValueError):
        in_script({"mean": float("inf")})


def test_the_page_fetches_nothing_and_forbids_to():
    found = Parts(page(made_up()))
    assert all(name.startswith("#") for name in found.named), found.named
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} - {"form"} & {
        *found.tags
    }
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    expected = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    assert found.policy == expected
    style = (LAB / "features.css").read_text("utf-8")
    assert "url(" not in style and "@import" not in style


def test_the_pages_script_makes_text_and_no_markup():
    script = (LAB / "features.js").read_text("utf-8")
    assert script.isascii() and (LAB / "features.css").read_text("utf-8").isascii()
    forbidden = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                 "Function(", "fetch(", "XMLHttpRequest", "import(", "WebSocket", "DOMParser",
                 "createContextualFragment")  # fmt: skip
    assert not [name for name in forbidden if name in script]
    urls = set(re.findall(r"https?://[^\"'\s]+", script))
    assert urls == {"http://www.w3.org/2000/svg"}, "the name of a namespace, not an address"


def test_a_page_that_would_be_too_large_has_fewer_examples_and_words_and_all_counts():
    many = [word(f" s{i}" + "x" * 200, "fires") for i in range(400)]
    lines = [*made_up(), letter("u", many)]
    whole, shell = len(page(lines)), len(page(lines[:1]))
    assert whole > 100_000 + shell
    small = page(lines, limit=shell + 60_000)
    assert len(small) < shell + 60_000
    found = json.loads(Parts(small).scripts[0])
    assert found[-1]["counts"]["words"] == 400 and 0 < len(found[-1]["words"]) <= 64
    assert found[1] == lines[1]
    with pytest.raises(ValueError, match="are allowed"):
        page(lines, limit=shell)
    assert LIMIT == 8_000_000


def test_a_page_of_the_largest_run_is_small_enough():
    """Three layers, every list as long as it may be, tokens longer than most."""
    lines, tokens = made_up()[:1], [" tokenly"] * 23
    for layer in (5, 12, 19):
        sae = made_up()[1] | {"layer": layer}
        words = [word(" wordlyword", "fires") for _ in range(120)]
        for w in words:
            w["carried"] = [[2000, 12.34, 1.234]] * 4
        full = latent(1000, "", layer, words=[[" wordly", 12.34]] * 10, histogram=[1234] * 24,
                      examples=[text(tokens, 14, 12.34)] * 8, middle=[text(tokens, 14, 6.17)] * 3,
                      letters=dict.fromkeys("abcdefghijklmnopqrstuvwxyz", 0.1234),
                      promoted=[[" tokenly", 12.3]] * 10, suppressed=[[" tokenly", -12.3]] * 10,
                      nearest=[[2000, 0.1234]] * 5, seeds=[[2000, 0.1234]] * 9)  # fmt: skip
        full["examples"] = [t | {"acts": [12.34] * 23} for t in full["examples"]]
        lines += [sae, *(letter(name, words, layer) for name in "abcdefghijklmnopqrstuvwxyz")]
        lines += [full | {"latent": i} for i in range(300)]
    text_ = page(lines)
    assert len(text_) < LIMIT
    assert json.loads(Parts(text_).scripts[0]) == lines, "with nothing left out"


def test_the_report_links_the_pages_that_lie_beside_the_runs(tmp_path):
    for name in ("run_1", "run_7", "run_8"):
        write_run(tmp_path, name, {LAPTOP: usual_entry()}, records(8))
    for name in ("run_1", "run_8"):
        (tmp_path / name / "features.html").write_text("<!doctype html>")
    assert draw(tmp_path).returncode == 0
    report = (tmp_path / "report.html").read_text("utf-8")
    assert re.findall(r'href="(.*?)">(.*?)</a>', report) == [
        ("run_1/features.html", "run_1"), ("run_8/features.html", "run_8")
    ]  # fmt: skip
    for name in ("run_1", "run_8"):
        (tmp_path / name / "features.html").unlink()
    assert draw(tmp_path).returncode == 0
    assert "features.html" not in (tmp_path / "report.html").read_text("utf-8")


# ── In a browser ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def opened(tmp_path, request):
    """The page of made_up(), or of what a test gives, opened as a file."""
    lines = made_up(getattr(request, "param", " squirrel"))
    path = tmp_path / "features.html"
    path.write_text(page(lines), encoding="utf-8")
    with chromium(tmp_path / "profile") as browser:
        browser.size(1200, 900)
        browser.open(path.as_uri())
        browser.wait("document.querySelector('h1')")
        yield browser
        assert browser.errors == []
        assert browser.requests == [path.as_uri()], "the page itself, and nothing else"


def heading(browser) -> str:
    return browser.value("document.querySelector('h1').textContent")


@pytest.mark.browser
def test_in_a_browser_words_lead_to_their_latents_and_back(opened):
    assert opened.value("document.querySelectorAll('#letters tbody tr').length") == 2
    taken = "[...document.querySelectorAll('#taken strong')].map(e => e.textContent)"
    assert opened.value(taken) == ["0", "0", "2"]
    opened.click("#letters a[href='#/8/letter/s']")
    opened.wait("document.querySelector('#explained')")
    assert heading(opened) == "S: 3 words, 1 with a main latent, 1 absorbed, 1 lost"
    said = opened.value("document.querySelector('#explained').textContent")
    assert "How \u2423squirrel is absorbed" in said
    assert "A latent of something else took it." in said and "86% of the projection" in said
    assert opened.value("document.querySelectorAll('#picture .w').length") == 3
    opened.click("#absorbers .chip")
    opened.click("#explained .verdict a")
    opened.wait("document.querySelector('h1').textContent.startsWith('Latent 31')")
    assert opened.value("document.querySelector('.chip.a').textContent") == "\u2423squirrel"
    opened.click(".chip.a")
    opened.wait("document.querySelector('#explained')")
    opened.value("history.back()")
    opened.wait("document.querySelector('h1').textContent.startsWith('Latent 31')")
    opened.click("#layers a[href='#/9']")
    opened.wait("location.hash === '#/9' && document.querySelector('#letters')")


@pytest.mark.browser
def test_in_a_browser_the_sums_of_a_word_are_drawn_to_scale(opened):
    opened.value("location.hash = '#/8/letter/s/0'")
    opened.wait("document.querySelector('#explained')")
    rows = opened.value(
        "[...document.querySelectorAll('#explained table.sum tr')].map(r => "
        "[parseFloat(r.cells[1].textContent.replace('\\u2212', '-')),"
        " r.querySelector('.track i').getBoundingClientRect().width])"
    )
    values = [value for value, _ in rows]
    assert values == [2.0, 3.0, 0.25, 0.5, -0.5, 0.25, 5.5]
    assert sum(values[:-1]) == values[-1]
    unit = rows[-1][1] / 5.5
    assert all(width == pytest.approx(abs(value) * unit, abs=0.2) for value, width in rows)


@pytest.mark.browser
def test_in_a_browser_every_fate_of_a_word_is_told(opened):
    told = {
        "s/0": "The main latent #30 carries 2.0 of it (36%).",
        "s/1": "The main latent #30 fires on 1 of 3 S-words and carries 2.0 there on average; "
        "here it is silent. Instead #31 is active at 10.0. Its decoder row has cosine 0.30 with "
        "the probe, so by itself it writes 3.0 of the letter, 86% of the projection",
        "s/2": "here it is silent, and no other latent carries 40%: #2000 comes first with 86%.",
    }
    for place, sentence in told.items():
        opened.value(f"location.hash = '#/8/letter/{place}'")
        opened.wait(f"location.hash.endsWith({place!r}) && document.querySelector('#explained')")
        said = opened.value("document.querySelector('#explained').textContent")
        assert sentence in said
        assert not [bad for bad in ("file:", "[object", "undefined", "NaN") if bad in said], said


@pytest.mark.browser
def test_in_a_browser_search_finds_by_number_token_and_word(opened):
    def hits(query: str) -> list[str]:
        opened.value(
            f"(s => {{ s.focus(); s.value = {query!r}; s.dispatchEvent(new Event('input')) }})"
            "(document.getElementById('search'))"
        )
        return opened.value("[...document.querySelectorAll('#found li')].map(e => e.textContent)")

    assert hits("31")[0].startswith("#31") and hits("#7")[0].startswith("#7")
    assert "#33 fires on" in hits("SAYS33")[0]
    assert "#32 promotes" in hits("up32")[0]
    assert hits("ten")[0].startswith("word \u2423ten absorbed")
    assert hits("no such token") == ["nothing among what is shown"]
    assert hits("") == []
    opened.press("Escape")
    opened.press("/")
    for key in "says30":
        opened.press(key)
    opened.press("ArrowDown")
    opened.press("ArrowUp")
    opened.press("Enter")
    opened.wait("document.querySelector('h1').textContent.startsWith('Latent 30')")


@pytest.mark.browser
def test_in_a_browser_keys_lead_on_and_turn_the_light(opened):
    opened.press("ArrowRight")
    opened.wait("location.hash === '#/8/letter/s'")
    before = opened.value("document.querySelector('#explained h2').textContent")
    opened.press("ArrowRight")
    opened.wait(f"document.querySelector('#explained h2').textContent !== {before!r}")
    opened.press("u")
    opened.wait("document.querySelector('#letters')")
    opened.value("location.hash = '#/8/latent/33'")
    opened.wait("document.querySelector('h1').textContent.startsWith('Latent 33')")
    opened.press("ArrowRight")
    opened.wait("document.querySelector('h1').textContent.startsWith('Latent 7')")
    assert "fires on none" in opened.value("document.body.textContent")
    colours = []
    for _ in range(2):
        opened.press("t")
        colours.append(opened.value("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colours)) == 2
    opened.press("?")
    opened.wait("document.getElementById('keys').open")


@pytest.mark.browser
def test_in_a_browser_a_phone_needs_no_scrolling_sideways(opened):
    opened.size(360, 740, mobile=True)
    for place in ("#/8", "#/8/letter/s", "#/8/latent/31", "#/8/latent/7"):
        opened.value(f"location.hash = {place!r}")
        opened.wait(f"location.hash === {place!r} && document.querySelector('h1')")
        assert opened.value("document.documentElement.scrollWidth") <= 360, place


@pytest.mark.browser
@pytest.mark.parametrize("opened", HOSTILE, indirect=True)
def test_in_a_browser_hostile_tokens_are_text(opened):
    for place in ("#/8", "#/8/letter/s/1", "#/8/latent/31"):
        opened.value(f"location.hash = {place!r}")
        opened.wait(f"location.hash === {place!r} && document.querySelector('h1')")
        assert opened.value("document.title") != "taken"
        assert opened.value("document.querySelectorAll('main script, main img').length") == 0
    said = opened.value("document.querySelector('h1').textContent")
    assert not {"\u202e", "\u2066", "\0", "\u2028", "\ud800"} & set(said), "they are written out"
