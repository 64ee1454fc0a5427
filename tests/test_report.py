"""The report's page: all of the document is there, escaped; bars add up to the cache's bytes; a browser shows it."""

from __future__ import annotations

import base64
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from plans import plan_of_layers, plans
from tiny_model import HANDBOOK

from cocktail import report
from cocktail.mix import SCALE
from cocktail.report import views
from cocktail.report.sizes import parts, total
from runtime.arena import ALIGNMENT, ArenaLayout
from runtime.errors import PlanError, PromptError
from runtime.plan import Plan

HOSTILE = "</span><script>console.error('ran')</script><img src=x onerror=\"console.error('ran')\"> {{ 7 * 7 }} & € "
TEXT = HOSTILE + HANDBOOK[:1500] + HOSTILE
QUESTIONS = ("Who mended the cracked iron pan?", "\"><script>console.error('asked')</script>", "attention?", "kivi?")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Elements as (tag, attributes), the text of every element with an id, and what is out of place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append((tag, dict(attributes).get("id")))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, name in self._open:
            if name is not None:
                self.texts[name] = self.texts.get(name, "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def doc(model):
    return model.read(TEXT)


@pytest.fixture(scope="module")
def asked(doc):
    """An answer, a plan alone, one whose layers differ, one that keeps its last chunks in the tail."""
    first, second, third, fourth = QUESTIONS
    return {first: doc.ask(first, max_tokens=7), second: doc.plan(second, policy="cocktail", max_tokens=4),
            third: doc.plan(third, scorer="attention", max_tokens=4),
            fourth: doc.plan(fourth, policy="kivi", residual=64, max_tokens=100)}


@pytest.fixture(scope="module")
def html(doc, asked):
    return report.render(doc, asked, {QUESTIONS[0]: doc.verify(QUESTIONS[0], asked[QUESTIONS[0]])})


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def plan_of(got) -> Plan:
    return got if isinstance(got, Plan) else got.plan


def test_the_whole_document_is_there_chunk_by_chunk(page, doc, asked):
    for number, got in enumerate(asked.values()):
        n = plan_of(got).layout.n_chunks
        shown = [page.texts[f"q{number}c{chunk}"] for chunk in range(n)]
        assert TEXT.startswith("".join(shown))
        assert f"q{number}c{n}" not in page.texts
        assert TEXT in page.texts[f"q{number}"]


def test_what_verification_found_stands_by_its_answer(page):
    assert page.texts["q0"].count("Verified: ") == 1
    assert "of 6 tokens have the FP16 cache's top token" in page.texts["q0"]
    assert "Verified: " not in page.texts["q2"]


def test_every_chunk_says_its_width_and_its_score(page, asked):
    plan = plan_of(asked[QUESTIONS[0]])
    titles = {a["id"]: a["title"] for a in page.all("span") if "id" in a}
    for chunk, tier in enumerate(plan.assignment[0]):
        about = titles[f"q0c{chunk}"]
        assert str(plan.layout.tiers[tier]) in about
        assert f"{plan.scores[chunk]:.4g}" in about
    assert "bits on average: " in " ".join(title for name, title in titles.items() if name.startswith("q2"))


def test_what_others_wrote_is_text_and_the_page_asks_for_nothing(page, html):
    assert not page.all("script")
    assert not page.all("img")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert {a["href"].split(",")[0].rstrip("c0123456789") for a in page.all("a")} == {
        "#q", "data:application/json;base"}
    assert not [a for _, a in page.elements if "src" in a or "xlink:href" in a]
    assert "url(http" not in html
    assert "49 &amp;" not in html  # a template of its own in the document
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_bars_add_up_to_the_cache(doc, asked):
    for text, got in asked.items():
        nbytes = ArenaLayout(plan_of(got).layout).nbytes
        shown = views.question(text, plan_of(got), None, [""] * (doc.n_chunks + 1))
        assert shown.tiers.sum == nbytes
        assert sum(bar.sum for bar in shown.regions) == nbytes
        assert sum(bar.sum for bar in shown.per_layer) == nbytes


def test_the_bars_are_drawn_as_long_as_they_are(page, asked):
    """Of every question, what the drawn segments say: the glass and the regions are the whole cache each."""
    drawn = sum(int(a["data-value"]) for a in page.all("rect") if "data-value" in a and "." not in a["data-value"])
    arenas = [ArenaLayout(plan_of(got).layout) for got in asked.values()]
    assert drawn == sum(2 * arena.nbytes + sum(layer.nbytes for layer in arena.layers) for arena in arenas)


@settings(max_examples=40, deadline=None)
@given(plans())
def test_the_parts_of_any_plan_are_its_arena(plan):
    found, arena = parts(plan), ArenaLayout(plan.layout)
    assert total(found) == arena.nbytes
    assert all(part.nbytes > 0 for part in found)
    regions = Counter({(layer, region.kind, region.bits): plan.layout.n_kv_heads * region.n * (
        region.codes_bytes + region.meta_bytes) + region.n * region.shared_bytes
        for layer, placed in enumerate(arena.layers) for region in placed.regions})
    stored = Counter()
    for part in found:
        if part.kind and part.tier is not None:
            stored[part.layer, part.kind, part.bits] += part.nbytes
    assert stored == +regions
    pieces = Counter(part.layer for part in found)
    for part in found:
        if part.what == "alignment":
            assert part.nbytes < ALIGNMENT * (2 * pieces[part.layer] + 1)


def test_in_place_too():
    plan = plan_of_layers((0, 0, 1, 2, 0, 2), (2, 2, 2, 2, 2, 2)).without_reordering()
    assert total(parts(plan)) == ArenaLayout(plan.layout).nbytes


def test_the_plan_is_for_download(page, asked):
    links = [a["href"] for a in page.all("a") if "download" in a]
    plans_there = [Plan.from_json(base64.b64decode(link.split(",")[1]).decode()) for link in links]
    assert plans_there == [plan_of(got) for got in asked.values()]


def test_the_timeline_is_the_answers_time(asked):
    stats = asked[QUESTIONS[0]].stats
    shown = views.question("", asked[QUESTIONS[0]].plan, asked[QUESTIONS[0]], [""] * 99)
    times = {name: value for name, _, value in shown.times.segments}
    ttft = times["score"] + times["prefill"] + times["pack"] + times["first token"]
    assert ttft == pytest.approx(stats.ttft_s)
    assert times["decode"] == pytest.approx(stats.tpot_s * 6)


def test_long_documents_share_cells_and_show_their_best():
    long = plan_of_layers((2,) * 1400)
    scores = [0.0] * 1400
    scores[700] = 3.0
    row = views.heat("q", replace(long, scores=tuple(scores)))
    assert len(row.cells) <= views.HEAT_CELLS
    assert [about for value, about in row.cells if value == 1] == ["chunks 699 to 701: 3"]
    assert row.best[0] == (700, 3.0)
    assert views.heat("q", long).cells == ()


@pytest.mark.parametrize("name", views.PAGES)
def test_text_can_be_read_on_every_shade(name):
    """WCAG 2: contrast of at least 4.5."""
    ink = {"light": "#1c2128", "dark": "#e8ebef"}[name]
    assert ink in (Path(report.__file__).parent / "page.css").read_text()
    for shade in views.shades(name):
        assert contrast(ink, shade) >= 4.5
    for step in SCALE:
        assert contrast("#101418", step.colour) >= 4.5  # marks in the terminal


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_misuse_is_refused(model, doc, asked, tmp_path):
    with pytest.raises(PlanError, match="another document"):
        report.render(model.read(TEXT + "more"), asked)
    with pytest.raises(PromptError, match="cannot be written"):
        report.write(tmp_path / "no" / "out.html", doc, asked)


# In a browser.

def browse(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                           f"--user-data-dir={path.parent / 'profile'}", *options, path.as_uri()],
                          capture_output=True, text=True, timeout=90)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (Debian: apt install chromium)")
def test_a_browser_shows_it_without_a_complaint(html, tmp_path):
    page, control = tmp_path / "out.html", tmp_path / "control.html"
    page.write_text(html, encoding="utf-8")
    control.write_text("<script>console.error('ran')</script>")
    assert "CONSOLE" in browse(control, "--dump-dom").stderr  # complaints would be seen
    shown = browse(page, "--dump-dom")
    assert "CONSOLE" not in shown.stderr
    found = Page(shown.stdout.replace("\r\n", "\n"))
    assert not found.all("script")
    assert TEXT in found.texts["q0"]
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}", "--window-size=1000,1600", "--hide-scrollbars")
    assert picture.stat().st_size > 30_000  # an empty page has 6 KB
