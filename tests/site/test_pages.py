"""The site in a browser: the interactive pages show what was computed, complain of nothing, and ask no other host."""

from __future__ import annotations

import html
import json
import re
from urllib.parse import urlencode

import pytest

from bench.instruments.claim import classify
from bench.site.stack_story import STORIES, tell
from tests.site import synthetic
from tests.site.conftest import build

PAGES = [
    "index.html",
    "explore.html",
    "how-bytedmd-works.html",
    "findings/engram-offload-paper-read.html",
    "findings/engram-offload-bytedmd.html",
    "findings/engram-offload-wall-time.html",
    "put-engram-into-your-model.html",
]
GRID = synthetic.grid()
# Points of the grid, all classes among them.
POINTS = [
    dict(padding=0, share=1, hot=0, compute=0),
    dict(padding=1000, share=1, hot=0, compute=0),
    dict(padding=10_000, share=1, hot=0, compute=0),
    dict(padding=100_000, share=1, hot=0.01, compute=0),
    dict(padding=1_000_000, share=1, hot=0, compute=0),
    dict(padding=10_000_000, share=0.3, hot=0.1, compute=8),
    dict(padding=10_000_000, share=1, hot=1, compute=64),
]
FRAMES = [(story, frame) for story in STORIES for frame in (0, 1, 2 * len(story.results))]
WIDTHS = [360, 390, 1280]


# What a reader does: moves a slider, changes a choice, goes on a step. Name -> page, element, script.
ACTS = {
    "slider": (
        "explore.html",
        "explorer",
        "const s = page.getElementById('in-compute'); s.value = 2; send(s, 'input')",
    ),
    "choice": (
        "explore.html",
        "whole-model-panel",
        "const c = page.getElementById('whole-layout'); c.value = 'compacted'; send(c, 'change')",
    ),
    "next": ("how-bytedmd-works.html", "stack-story", "page.querySelector('.steps button:nth-child(2)').click()"),
}


def _states() -> list[tuple[str, str, int, str, str]]:
    """Page, hash, width, the element to look at and what is done first; states of one page one after the other."""
    states = [(page, "", width, "none", "") for page in [*PAGES, "wide.html"] for width in WIDTHS]
    states += [("explore.html", urlencode(point), 1280, "explorer", "") for point in POINTS]
    states += [("explore.html", "whole", 360, "whole-model-panel", "")]
    states += [("how-bytedmd-works.html", f"story={s.name}&frame={f}", 800, "stack-story", "") for s, f in FRAMES]
    states += [(page, "story=sum&frame=0", 500, element, script) for page, element, script in ACTS.values()]
    return sorted(states, key=lambda state: [*PAGES, "wide.html"].index(state[0]))


# Loads each page once, in a frame, puts it into one state after the other, and writes down what became of it.
DRIVER = """<!doctype html><meta charset="utf-8"><body><script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
(async () => {
  const found = [];
  let frame = null, shown = "";
  const send = (element, name) => element.dispatchEvent(new Event(name));
  for (const [url, hash, width, id, act] of %s) {
    if (url !== shown) {
      frame?.remove();
      frame = document.createElement("iframe");
      document.body.append(frame);
      frame.style = `width:${width}px;height:900px`;
      await new Promise((done) => { frame.onload = done; frame.src = url; });
      shown = url;
    }
    frame.style = `width:${width}px;height:900px`;
    frame.contentWindow.location.hash = hash;
    await wait(100);
    const page = frame.contentDocument, scroll = page.scrollingElement, seen = page.getElementById(id);
    if (act) new Function("page", "send", act)(page, send);
    found.push({ data: { ...seen?.dataset }, wide: scroll.scrollWidth - scroll.clientWidth, text: seen?.innerText,
      hash: frame.contentWindow.location.hash });
  }
  document.body.innerHTML = '<pre id="found"></pre>';
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>"""


def price(variant, point):
    level = GRID["prices"][variant]
    for axis, value in point.items():
        level = level[GRID["axes"][axis].index(value)]
    return level


@pytest.fixture(scope="module")
def visited(site, address, browser):
    """The page that drove the others, and what each became by (page, hash, width); one start of the browser for all."""
    (site / "wide.html").write_text('<div style="width:2000px">wide</div>', encoding="utf-8")
    (site / "driver.html").write_text(DRIVER % json.dumps(_states()), encoding="utf-8")
    page = browser.open(f"{address}/driver.html", budget_ms=20_000)
    found = re.search(r'<pre id="found">(.*?)</pre>', page.html, re.DOTALL)
    assert found, page.html[-2000:]
    entries = json.loads(html.unescape(found.group(1)))
    return page, {(*state[:3], state[4]): entry for state, entry in zip(_states(), entries, strict=True)}


def test_the_site_is_built_without_a_warning(site):
    assert (site / "warnings.txt").read_text(encoding="utf-8") == ""


def test_a_link_that_leads_nowhere_would_be_noticed(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text("site_name: small\nvalidation: {links: {not_found: warn}}\n", encoding="utf-8")
    (tmp_path / "docs/index.md").write_text("[nowhere](nowhere.md)", encoding="utf-8")
    assert build(tmp_path, tmp_path / "out").returncode != 0
    (tmp_path / "docs/index.md").write_text("[here](index.md)", encoding="utf-8")
    assert build(tmp_path, tmp_path / "out").returncode == 0


def test_no_page_complains(visited):
    assert visited[0].console == []


def test_no_page_asks_another_host(visited, address):
    assert len(visited[0].requests) > 20
    assert [url for url in visited[0].requests if not url.startswith(address)] == []


@pytest.mark.parametrize("point", POINTS, ids=lambda point: urlencode(point))
def test_ratios_and_class_are_those_of_the_grid(visited, point):
    data = visited[1][("explore.html", urlencode(point), 1280, "")]["data"]
    ratios = {name: price(f"offload_{name}", point) / price("resident", point) for name in ("prefetch", "naive")}
    assert data["ready"] == "yes"
    assert {name: float(data[name]) for name in ratios} == ratios
    assert data["label"] == classify(ratios["prefetch"], wall_overhead=None).label


def test_the_points_cover_every_class():
    labels = {classify(price("offload_prefetch", p) / price("resident", p), None).label for p in POINTS}
    assert labels == {"WIN", "INCONCLUSIVE", "LOSS"}


@pytest.mark.parametrize(("story", "frame"), FRAMES, ids=lambda part: getattr(part, "name", part))
def test_the_stack_page_shows_the_tracers_price(visited, story, frame):
    data = visited[1][("how-bytedmd-works.html", f"story={story.name}&frame={frame}", 800, "")]["data"]
    read = tell(story).steps[: (frame + 1) // 2]
    assert (data["story"], data["frame"]) == (story.name, str(frame))
    assert int(data["total"]) == sum(read.price for step in read for read in step.reads)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_the_screen(visited, page, width):
    assert visited[1][(page, "", width, "")]["wide"] <= 0


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_that_is_too_wide_would_be_noticed(visited, width):
    assert visited[1][("wide.html", "", width, "")]["wide"] > 700


def act_on(visited, name):
    page, _, script = ACTS[name]
    return visited[1][(page, "story=sum&frame=0", 500, script)]


def test_a_moved_slider_changes_ratios_chart_and_address(visited):
    entry, point = act_on(visited, "slider"), dict(padding=1_000_000, share=1, hot=0, compute=8)
    assert float(entry["data"]["prefetch"]) == price("offload_prefetch", point) / price("resident", point)
    assert entry["data"]["axis"] == "compute"
    assert entry["hash"] == f"#{urlencode(point)}&axis=compute"
    assert "the layer, width 8" in entry["text"]


def test_another_layout_draws_other_crossings(visited):
    held = visited[1][("explore.html", "whole", 360, "")]["text"]
    assert act_on(visited, "choice")["text"] != held and "about 30,000" in held


def test_next_goes_on_to_what_the_first_instruction_reads(visited):
    entry = act_on(visited, "next")
    assert (entry["data"]["frame"], entry["data"]["total"], entry["hash"]) == ("1", "3", "#story=sum&frame=1")
    assert "b at depth 2: ⌈√2⌉ = 2" in entry["text"]


def test_the_whole_model_panel_names_the_crossings(visited):
    text = visited[1][("explore.html", "whole", 360, "")]["text"]
    assert "Dense-4B, 100 B parameters: reaches 3 % at about 30,000 tokens per step" in text
    assert "V4.1-Flash, 197 B parameters: stays under 3 % in the range shown" in text


def test_explore_works_from_a_folder_and_without_whole_model_data(site, browser):
    """Opened as a file: scripts only, no fetch; an unknown value in the address falls back, a missing panel hides."""
    assets = site / "assets" / "whole_model.js"
    kept = assets.read_text(encoding="utf-8")
    assets.write_text("window.engramWholeModel = null;\n", encoding="utf-8")
    try:
        page = browser.open(f"{(site / 'explore.html').as_uri()}#padding=10000&share=0.5&axis=share")
    finally:
        assets.write_text(kept, encoding="utf-8")
    point = dict(padding=10_000, share=1, hot=0, compute=0)
    assert page.console == [] and all(url.startswith("file:") for url in page.requests)
    assert float(page.dataset("explorer")["prefetch"]) == price("offload_prefetch", point) / price("resident", point)
    assert page.dataset("explorer")["axis"] == "share"
    assert "ready" not in page.dataset("whole-model-panel")


def test_a_request_to_another_host_and_an_error_would_be_noticed(tmp_path, browser):
    file = tmp_path / "wrong.html"
    file.write_text('<img src="https://example.org/x.png"><script>missing.call()</script>', encoding="utf-8")
    page = browser.open(file.as_uri())
    assert "missing is not defined" in page.console[0]
    assert "https://example.org/x.png" in page.requests


def test_no_page_names_another_host_to_load_from(site):
    loads = re.compile(r"""<(?:script|img|iframe)[^>]*\bsrc=["']?https?://|<link[^>]*\bhref=["']?https?://""")
    allowed = re.compile(r'<link[^>]*rel="canonical"')
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    found = [str(p) for p in pages for m in loads.finditer(p.read_text("utf-8")) if not allowed.match(m.group())]
    assert found == []
