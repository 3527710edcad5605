"""Headless Chromium over its debugging pipe: one process for all tests, driven by messages, the standard library only.

No name is resolved but this machine's. What a page asks for, and what it complains of, is noted as it happens.
"""

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

_OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-pipe",
    # One process draws all pages: else each load starts one, and another in reserve.
    "--disable-site-isolation-trials",
    "--disable-features=IsolateOrigins,site-per-process,SpareRendererForSitePerProcess,BackForwardCache",
    "--js-flags=--single-threaded --no-opt",  # pages are gone before quicker code for them would pay
]  # fmt: skip


class Browser:
    """Chromium with a profile of its own and one tab.

    Attributes:
        console: what pages complained of, errors and warnings, since `forget`.
        requests: every address that pages asked for since `forget`.
    """

    def __init__(self, program: str, profile: Path) -> None:
        # Chromium reads messages from descriptor 3 and writes its own to 4, each ended by a zero byte.
        to_chromium, self._write = os.pipe()
        self._read, from_chromium = os.pipe()
        command = f'exec "$@" 3<&{to_chromium} 4>&{from_chromium}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_chromium, from_chromium),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_chromium)
        os.close(from_chromium)
        self._number, self._rest, self._session = 0, b"", ""
        self._loaded: set[str] = set()
        self._emulated: dict[str, dict[str, Any]] = {}  # by method
        self.forget()
        pages = [target for target in self._call("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        self._session = self._call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call("Page.setLifecycleEventsEnabled", enabled=True)
        # Every load is a first visit: the theme remembers light or dark.
        self._call("Page.addScriptToEvaluateOnNewDocument", source="try { localStorage.clear() } catch {}")

    def close(self) -> None:
        """End the process."""
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        self._process.wait()

    def forget(self) -> None:
        """Complaints and requests are counted from here on."""
        self.console: list[str] = []
        self.requests: list[str] = []

    def screen(self, width: int, height: int = 900, scheme: str = "light") -> None:
        """The size of the window in CSS pixels, and whether the reader prefers light or dark."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._emulate("Emulation.setDeviceMetricsOverride", **metrics)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self._emulate("Emulation.setEmulatedMedia", features=features)

    def _emulate(self, method: str, **parameters: Any) -> None:
        if self._emulated.get(method) != parameters:  # what is as it was is laid out again, too
            self._call(method, **parameters)
            self._emulated[method] = parameters

    def open(self, url: str) -> None:
        """Load a page anew, until its load event; an empty one lies between, so that the last one has ended."""
        for address in ("about:blank", url):
            loader = self._call("Page.navigate", url=address)["loaderId"]
            while loader not in self._loaded:
                self._note(self._receive())

    def run(self, script: str) -> Any:
        """The value of an expression in the page, awaited if it is a promise; RuntimeError where it throws."""
        done = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description", "the script failed"))
        return done["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 5) -> None:
        """Until an expression in the page is true; TimeoutError where it stays false."""
        script = f"""new Promise((done) => {{
            const end = performance.now() + {1000 * seconds}, late = () => performance.now() > end;
            const look = () => ({condition}) ? done(true) : late() ? done(false) : setTimeout(look, 10);
            look();
        }})"""
        if not self.run(script):
            raise TimeoutError(f"not within {seconds} s: {condition}")

    def type(self, text: str) -> None:
        """Write into whatever has the focus."""
        self._call("Input.insertText", text=text)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """The page as PNG, all of it or what the window shows."""
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("Chromium ended")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        values = event.get("params", {})
        match event.get("method"):
            case "Page.lifecycleEvent" if values["name"] == "load":
                self._loaded.add(values["loaderId"])
            case "Network.requestWillBeSent":
                self.requests.append(values["request"]["url"])
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "warning", "assert"):
                self.console.append(" ".join(str(part.get("value", part)) for part in values["args"]))
            case "Runtime.exceptionThrown":
                self.console.append(values["exceptionDetails"]["exception"].get("description", "exception"))
            case "Log.entryAdded" if values["entry"]["level"] in ("error", "warning"):
                self.console.append(f"{values['entry']['text']} {values['entry'].get('url', '')}".strip())
