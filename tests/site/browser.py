"""One call to headless Chromium: the page's final DOM, what it complained of, and whom it asked for anything.

No name is resolved but this machine's. What was asked is read from Chromium's own network log; its entries name the
page that caused them, which tells them from what the browser wants for itself.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path


@dataclass(frozen=True)
class Page:
    """What a page became: its HTML, the console's lines (none is expected), and every address that it asked for."""

    html: str
    console: list[str]
    requests: list[str]

    def dataset(self, element_id: str) -> dict[str, str]:
        """The data-* attributes of an element; ValueError where there is none of this id."""
        finder = _Finder(element_id)
        finder.feed(self.html)
        if finder.found is None:
            raise ValueError(f"no element with id {element_id!r} on the page")
        return finder.found


class _Finder(HTMLParser):
    def __init__(self, element_id: str) -> None:
        super().__init__()
        self.element_id = element_id
        self.found: dict[str, str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if attributes.get("id") == self.element_id:
            self.found = {k.removeprefix("data-"): v or "" for k, v in attributes.items() if k.startswith("data-")}


class Browser:
    """Chromium with a profile of its own."""

    def __init__(self, program: str, profile: Path) -> None:
        self.log = profile / "net.json"
        self.command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--enable-logging=stderr",
            "--force-prefers-reduced-motion", f"--user-data-dir={profile}", "--window-size=1280,900",
        ]  # fmt: skip

    def open(self, url: str, budget_ms: int = 2000) -> Page:
        """Load a page, let it run for so many virtual milliseconds, and take what it has become."""
        options = [f"--virtual-time-budget={budget_ms}", f"--log-net-log={self.log}"]
        command = [*self.command, *options, "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return Page(done.stdout, re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr), self._requests())

    def _requests(self) -> list[str]:
        log = json.loads(self.log.read_text(encoding="utf-8"))
        started = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        events = [event.get("params", {}) for event in log["events"] if event["type"] == started]
        return [event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"]
