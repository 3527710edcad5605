"""The site in a browser: the interactive pages show what was computed, complain of nothing, and ask no other host."""

import re
from pathlib import Path
from urllib.parse import urlencode

import axe_core_python
import pytest

from bench.instruments.claim import classify
from bench.site.stack_story import STORIES, tell
from tests.site import synthetic
from tests.site.conftest import ROOT, build

pytestmark = pytest.mark.slow

PAGES = [f"{name}.html" for name in re.findall(r": ([\w/-]+)\.md\b", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)]
AXE = Path(axe_core_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
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
WIDTHS = [360, 1280]


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
    states = [("explore.html", urlencode(point), 1280, "explorer", "") for point in POINTS]
    states += [("explore.html", "whole", 360, "whole-model-panel", "")]
    states += [("how-bytedmd-works.html", f"story={s.name}&frame={f}", 800, "stack-story", "") for s, f in FRAMES]
    states += [(page, "story=sum&frame=0", 500, element, script) for page, element, script in ACTS.values()]
    return sorted(states, key=lambda state: PAGES.index(state[0]))


def price(variant, point):
    level = GRID["prices"][variant]
    for axis, value in point.items():
        level = level[GRID["axes"][axis].index(value)]
    return level


class Seen:
    """What a page looks like, by width where that matters, and all that it complained of and asked for meanwhile.

    A page is loaded once for everything that is asked about it: that takes most of the time. To look for what axe
    complains of comes last, because it takes away parts of the page.
    """

    def __init__(self, browser, address, page):
        browser.forget()
        browser.screen(360)
        browser.open(f"{address}/{page}")
        self.page, self.wide, self.figures = page, {}, {}
        for width in WIDTHS:
            browser.screen(width)
            browser.run(DRAWN)
            self.wide[width] = browser.run(TOO_WIDE)
            self.figures[width] = browser.run(f"Promise.all({PICTURES})")
        browser.screen(360)
        browser.run(DRAWN)
        part = PARTS[page]
        if page != PAGES[0]:  # menus are the same on all pages, and axe walks through all of them
            browser.run("document.querySelectorAll('.md-sidebar, .md-footer').forEach((part) => part.remove())")
        if part != "html":
            browser.run(ALONE % (part, "" if part == "header" else "part"))
        browser.run(PRUNE)
        self.complaints = complaints(browser, part)
        browser.run("document.body.dataset.mdColorScheme = 'slate'")
        self.complaints += complaints(browser, part, "runOnly: ['color-contrast']")
        self.console, self.requests = browser.console, browser.requests


class Visited:
    """What the interactive pages became by (page, hash, width, act), and what they complained of."""

    def __init__(self, browser, address):
        browser.forget()
        self.states, shown = {}, None
        for page, place, width, element, act in _states():
            browser.screen(width)
            if page != shown:
                browser.open(f"{address}/{page}")
                shown = page
            browser.run(f"location.hash = {place!r}, {DRAWN}")
            browser.run(SEND % act)
            self.states[page, place, width, act] = browser.run(LOOK % element)
        self.console = browser.console


DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
SEND = "(() => { const page = document, send = (element, name) => element.dispatchEvent(new Event(name)); %s })()"
LOOK = """(() => {
    const seen = document.getElementById("%s");
    return { data: { ...seen.dataset }, text: seen.innerText, hash: location.hash };
})()"""
TOO_WIDE = "document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"


@pytest.fixture(scope="module", params=PAGES)
def seen(request, address, browser):
    """All tests of a page come one after the other."""
    return Seen(browser, address, request.param)


@pytest.fixture(scope="module")
def visited(address, browser):
    return Visited(browser, address)


def test_the_site_is_built_without_a_warning(site):
    assert (site / "warnings.txt").read_text(encoding="utf-8") == ""


def test_a_link_that_leads_nowhere_would_be_noticed(project, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text("site_name: small\nvalidation: {links: {not_found: warn}}\n", encoding="utf-8")
    (tmp_path / "docs/index.md").write_text("[nowhere](nowhere.md)", encoding="utf-8")
    assert build(tmp_path).returncode != 0
    (tmp_path / "docs/index.md").write_text("[here](index.md)", encoding="utf-8")
    assert build(tmp_path).returncode == 0


def test_no_page_complains(seen):
    assert seen.console == []


def test_no_page_asks_another_host(seen, address):
    assert len(seen.requests) > 5
    assert [url for url in seen.requests if not url.startswith((address, "about:", "data:", "blob:"))] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_the_screen(seen, width):
    assert seen.wide[width] <= 0


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_that_is_too_wide_would_be_noticed(width, tmp_path, browser):
    (tmp_path / "wide.html").write_text('<div style="width:2000px">wide</div>', encoding="utf-8")
    browser.screen(width)
    browser.open((tmp_path / "wide.html").as_uri())
    assert browser.run(TOO_WIDE) > 700


def test_interactive_pages_complain_of_nothing_whatever_a_reader_does(visited):
    assert visited.console == []


@pytest.mark.parametrize("point", POINTS, ids=lambda point: urlencode(point))
def test_ratios_and_class_are_those_of_the_grid(visited, point):
    data = visited.states[("explore.html", urlencode(point), 1280, "")]["data"]
    ratios = {name: price(f"offload_{name}", point) / price("resident", point) for name in ("prefetch", "naive")}
    assert data["ready"] == "yes"
    assert {name: float(data[name]) for name in ratios} == ratios
    assert data["label"] == classify(ratios["prefetch"], wall_overhead=None).label


def test_the_points_cover_every_class():
    labels = {classify(price("offload_prefetch", p) / price("resident", p), None).label for p in POINTS}
    assert labels == {"WIN", "INCONCLUSIVE", "LOSS"}


@pytest.mark.parametrize(("story", "frame"), FRAMES, ids=lambda part: getattr(part, "name", part))
def test_the_stack_page_shows_the_tracers_price(visited, story, frame):
    data = visited.states[("how-bytedmd-works.html", f"story={story.name}&frame={frame}", 800, "")]["data"]
    read = tell(story).steps[: (frame + 1) // 2]
    assert (data["story"], data["frame"]) == (story.name, str(frame))
    assert int(data["total"]) == sum(read.price for step in read for read in step.reads)


def act_on(visited, name):
    page, _, script = ACTS[name]
    return visited.states[(page, "story=sum&frame=0", 500, script)]


def test_a_moved_slider_changes_ratios_chart_and_address(visited):
    entry, point = act_on(visited, "slider"), dict(padding=1_000_000, share=1, hot=0, compute=8)
    assert float(entry["data"]["prefetch"]) == price("offload_prefetch", point) / price("resident", point)
    assert entry["data"]["axis"] == "compute"
    assert entry["hash"] == f"#{urlencode(point)}&axis=compute"
    assert "the layer, width 8" in entry["text"]


def test_another_layout_draws_other_crossings(visited):
    held = visited.states[("explore.html", "whole", 360, "")]["text"]
    assert act_on(visited, "choice")["text"] != held and "about 30,000" in held


def test_next_goes_on_to_what_the_first_instruction_reads(visited):
    entry = act_on(visited, "next")
    assert (entry["data"]["frame"], entry["data"]["total"], entry["hash"]) == ("1", "3", "#story=sum&frame=1")
    assert "b at depth 2: ⌈√2⌉ = 2" in entry["text"]


def test_the_whole_model_panel_names_the_crossings(visited):
    text = visited.states[("explore.html", "whole", 360, "")]["text"]
    assert "Dense-4B, 100 B parameters: reaches 3 % at about 30,000 tokens per step" in text
    assert "V4.1-Flash, 197 B parameters: stays under 3 % in the range shown" in text


def test_explore_works_from_a_folder_and_without_whole_model_data(site, browser):
    """Opened as a file: scripts only, no fetch; an unknown value in the address falls back, a missing panel hides."""
    assets = site / "assets" / "whole_model.js"
    kept = assets.read_text(encoding="utf-8")
    assets.write_text("window.engramWholeModel = null;\n", encoding="utf-8")
    browser.forget()
    try:
        browser.open(f"{(site / 'explore.html').as_uri()}#padding=10000&share=0.5&axis=share")
    finally:
        assets.write_text(kept, encoding="utf-8")
    data = browser.run("({ ...document.getElementById('explorer').dataset })")
    assert browser.console == [] and all(url.startswith(("file:", "about:", "data:")) for url in browser.requests)
    point = dict(padding=10_000, share=1, hot=0, compute=0)
    assert float(data["prefetch"]) == price("offload_prefetch", point) / price("resident", point)
    assert data["axis"] == "share"
    assert not browser.run("'ready' in document.getElementById('whole-model-panel').dataset")


def test_a_request_to_another_host_and_an_error_would_be_noticed(tmp_path, browser):
    file = tmp_path / "wrong.html"
    file.write_text('<img src="https://example.org/x.png"><script>missing.call()</script>', encoding="utf-8")
    browser.forget()
    browser.open(file.as_uri())
    assert any("missing is not defined" in line for line in browser.console)
    assert "https://example.org/x.png" in browser.requests


RESULTS = "[...document.querySelectorAll('*')].find((e) => e.shadowRoot)?.shadowRoot.querySelectorAll('ol a')"


@pytest.mark.parametrize("served", [True, False], ids=["served", "from a folder"])
@pytest.mark.parametrize("page", ["index.html", "findings/engram-offload-wall-time.html"])
def test_search_finds_a_page_by_a_word_of_it(served, page, site, searched, browser):
    """Also without a server, where browsers start no worker, and without asking anybody for anything."""
    browser.screen(1280)
    browser.forget()
    browser.open(f"{searched}/{page}" if served else (site / page).as_uri())
    browser.run("document.querySelector('.md-search__button').click()")
    browser.wait_for("document.activeElement?.shadowRoot?.activeElement?.matches('input')")
    browser.type("torchrun")
    browser.wait_for(f"{RESULTS}?.length")
    found = browser.run(f"[...{RESULTS}].map((a) => a.href)")
    assert any("more-than-one-machine.html" in url for url in found)
    assert all(url.startswith(searched if served else site.as_uri()) for url in found)
    assert browser.console == []
    assert [url for url in browser.requests if url.startswith("http") and not url.startswith(searched)] == []


# Long pages are made of the same few things a thousand times: of rows and coloured words that only their text tells
# apart, three of each kind stay; axe walks through all that there is, whatever it is asked about.
PRUNE = """(() => {
    const seen = {}, told = ({ tagName, className, style }) => `${tagName} ${className} ${style.cssText}`;
    const isPlain = ({ attributes }) => [...attributes].every(({ name }) => name === 'class' || name === 'style');
    for (const one of document.querySelectorAll('tbody tr, pre span')) {
        const parts = [one, ...one.querySelectorAll('*')];
        const kind = [one.parentElement.parentElement, one.parentElement, ...parts].map(told).join();
        if (parts.every(isPlain) && (seen[kind] = (seen[kind] ?? 0) + 1) > 3) one.remove();
    }
})()"""
ALONE = "{ const part = document.querySelector(%r); document.querySelector('article').replaceChildren(%s); }"


def complaints(browser, where="html", rules=""):
    """What axe has against a part of the page as it stands: rule, how many elements, the first of them."""
    browser.run(f"if (!window.axe) {{ {AXE} }}")
    # Of what it has nothing against, it need not say where that is.
    look = f"axe.run(document.querySelector({where!r}), {{ resultTypes: ['violations'], {rules} }})"
    return browser.run(f"{look}.then((r) => r.violations.map((v) => [v.id, v.nodes.length, v.nodes[0].html]))")


# Of the longest pages one of each thing is looked at.
PARTS = dict.fromkeys(PAGES, "html") | {
    "log.html": "header",
    "developing.html": "header",
    "reference/results.html": ".md-typeset__scrollwrap",
    "reference/offload-prices.html": ".ruled",
    "reference/offload-times.html": ".ruled",
    "reference/api.html": ".doc-class",
    "reference/api-price.html": ".doc-class",
    "findings/engram-offload-bytedmd.html": ".ruled",
    "findings/engram-offload-wall-time.html": "details",
}


def test_everybody_can_read_the_page(seen):
    """All rules of axe on a phone, then contrast again in the dark."""
    assert seen.complaints == []


def test_what_cannot_be_read_would_be_noticed(tmp_path, browser):
    file = tmp_path / "wrong.html"
    file.write_text(
        '<html lang="en"><title>t</title><main><h1 style="color:#999">pale</h1><img src="x.png"><table>'
        + "<tr><td>read" * 9
        + '<tr><td style="color:#999">pale</table><pre><code><span class="k">for</span></code></pre></main>'
    )
    browser.open(file.as_uri())
    browser.run(PRUNE)
    found = {rule: nodes for rule, nodes, _ in complaints(browser)}
    assert found["color-contrast"] == 2 and "image-alt" in found
    assert browser.run("document.querySelectorAll('td').length") == 4


def test_dark_is_dark(address, site, browser):
    lightness = []
    for scheme, name in (("light", "default"), ("dark", "slate")):
        browser.open("about:blank")  # the page before would see the change, and remember it for this one
        browser.screen(1280, scheme=scheme)
        browser.open(f"{address}/index.html")
        browser.wait_for(f"document.body.dataset.mdColorScheme === '{name}'")  # the theme looks after the load
        colour = browser.run("getComputedStyle(document.body).backgroundColor")
        lightness.append(sum(map(int, re.findall(r"\d+", colour)[:3])))
    assert lightness[0] > 700 and lightness[1] < 150


TABLE = """[...document.querySelectorAll('.ruled table')].map((table) => {
    const box = table.closest('.md-typeset__scrollwrap'), first = table.querySelector('tbody td');
    const before = first.getBoundingClientRect().left;
    box.scrollLeft = 200;
    const found = { hidden: box.scrollWidth - box.clientWidth, moved: before - first.getBoundingClientRect().left,
        scrolled: box.scrollLeft };
    box.scrollLeft = 0;
    return found;
})"""


@pytest.mark.parametrize("width", [360, 1280])
def test_the_verdict_fits_a_screen_and_keeps_its_names_on_a_phone(width, address, site, browser):
    browser.screen(width)
    browser.open(f"{address}/index.html")
    found = browser.run(TABLE)
    assert len(found) == 1
    if width == 1280:
        assert found[0]["hidden"] <= 0
    else:
        assert found[0]["scrolled"] > 100 and abs(found[0]["moved"]) <= 1


PICTURES = """[...document.querySelectorAll('.md-typeset img')].map((image) => {
    image.closest('details')?.setAttribute('open', '');
    return image.decode().then(() => ({ share: image.width / image.naturalWidth, alt: image.alt,
        shown: image.currentSrc, hidden: image.closest('p').scrollWidth - image.closest('p').clientWidth }));
})"""


def test_figures_fit_a_phone_with_letters_that_can_be_read(seen):
    """In findings a phone gets a drawing of its own, its smallest letters of 7 points, whole; elsewhere one scrolls."""
    phone, wide = seen.figures[360], seen.figures[1280]
    if seen.page == "index.html" or seen.page.startswith("findings/"):
        assert all(figure["shown"].endswith(".narrow.svg") and figure["alt"] for figure in phone)
        assert all(7 * 4 / 3 * figure["share"] >= 8 and figure["hidden"] <= 0 for figure in phone)
        assert len(wide) == len(phone) and not any(figure["shown"].endswith(".narrow.svg") for figure in wide)
        assert len(wide) >= (0 if "paper" in seen.page else 1)
    if seen.page == "hardware.html":
        assert phone and all(figure["share"] > 0.5 and figure["hidden"] > 100 for figure in phone)


def test_code_is_highlighted(site):
    page = (site / "how-it-works.html").read_text(encoding="utf-8")
    assert '<span class="kn">import</span>' in page


def local_links(page: Path, text: str):
    """Files and anchors that a built page leads to, this site's only."""
    for link in re.findall(r"""(?:href|src|srcset)=["']?([^"'\s>]+)""", text):
        target, _, anchor = link.partition("#")
        if not re.match(r"[a-z]+:|//", link):
            yield (page.parent / target).resolve() if target else page, anchor


def test_every_link_leads_somewhere(site):
    """Pages, pictures and anchors, of the built pages themselves: the builder does not miss a picture."""
    texts = {page.resolve(): page.read_text("utf-8") for page in site.rglob("*.html") if page.name != "404.html"}
    names = {page: set(re.findall(r"""\b(?:id|name)=["']?([^"'\s>]+)""", text)) for page, text in texts.items()}
    missing = []
    for page, text in texts.items():
        for target, anchor in local_links(page, text):
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (anchor and target in names and anchor not in names[target]):
                missing.append(f"{page.name}: {target.name}#{anchor}")
    assert missing == []


def test_every_page_is_in_the_menu_and_the_menu_has_pages_only():
    pages = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(PAGES) == sorted(pages)


def test_no_page_names_another_host_to_load_from(site):
    loads = re.compile(r"""<(?:script|img|iframe)[^>]*\bsrc=["']?https?://|<link[^>]*\bhref=["']?https?://""")
    allowed = re.compile(r'<link[^>]*rel="canonical"')
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    found = [str(p) for p in pages for m in loads.finditer(p.read_text("utf-8")) if not allowed.match(m.group())]
    assert found == []
