"""The site, built once, served locally, read by headless Chromium; skipped with a reason where either is missing."""

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench.site import data
from tests.site import synthetic
from tests.site.browser import Browser

ROOT = Path(__file__).parents[2]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Requests are not worth a line each."""


class _FewFound(_Quiet):
    """The site with a search that knows one part of one page: each load makes its index anew, a fifth of a second."""

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.replace("/search.json", "/search_few.json"))


def build(project: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a project, below it, as the Makefile does."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    arguments = set(re.findall(r"python -m (zensical build .*?)(?: #.*)?$", makefile, re.MULTILINE))
    assert len(arguments) == 1, arguments
    command = [sys.executable, "-m", *arguments.pop().split()]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder of which a site can be built without a trace in the repository."""
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("zensical is not installed (Python 3.11 or newer): pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("project")
    for name in ("engram_ref", "engram_toy", "bench"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="session")
def site(project, tmp_path_factory):
    """Folder of the site as `make check` builds it, with made-up data in the interactive pages."""
    shutil.copytree(ROOT / "docs", project / "docs")
    shutil.copy(ROOT / "mkdocs.yml", project)
    done = build(project)
    folder = project / "site"
    # Warnings end a strict build only when all is written: `test_the_site_is_built_without_a_warning` looks at them.
    (folder / "warnings.txt").write_text("" if done.returncode == 0 else done.stdout + done.stderr, encoding="utf-8")
    results = tmp_path_factory.mktemp("results")
    (results / "bytedmd_grid.json").write_text(json.dumps(synthetic.grid()), encoding="utf-8")
    (results / "production.json").write_text(json.dumps(synthetic.production()), encoding="utf-8")
    (folder / "assets" / "grid.js").write_text(data.grid_script(results), encoding="utf-8")
    (folder / "assets" / "whole_model.js").write_text(data.whole_model_script(results), encoding="utf-8")
    search = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    (folder / "search_few.json").write_text(json.dumps({**search, "items": search["items"][:1]}), encoding="utf-8")
    return folder


@contextlib.contextmanager
def _served(handler, folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def address(site):
    """Where the site is served, on this machine, but for its search."""
    with _served(_FewFound, site) as where:
        yield where


@pytest.fixture(scope="session")
def searched(site):
    """Where it is served with all of its search."""
    with _served(_Quiet, site) as where:
        yield where


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium that can reach this machine only."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
