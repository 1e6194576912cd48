"""A headless Chromium that is asked over a pipe (DevTools protocol): what a page loads, says and shows."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
# Natural width of every picture, whether an element sticks out of the window, and what would be loaded.
LOOK = """({
  widths: [...document.images].map(i => i.complete ? i.naturalWidth : 0),
  width: innerWidth, scroll: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
  text: document.body.innerText, scripts: document.scripts.length,
  empty: [...document.images].filter(i => i.getBoundingClientRect().width < 8).length,
  outside: [...document.querySelectorAll('[src],[href]')].map(e => e.getAttribute('src') || e.getAttribute('href'))
    .filter(a => !a.startsWith('data:') && !a.startsWith('#')),
})"""


def find_browser() -> str | None:
    """The browser's program; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Seen:
    """What a page did and shows at one width of the window."""

    facts: dict[str, Any]
    requests: list[str]
    messages: list[str]


class Browser:
    """One browser for several pages; a context manager. `profile` is an empty folder."""

    def __init__(self, program: str, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()  # commands, answers
        pipes = f"3<&{ours[0]} 4>&{theirs[1]}"
        script = f'exec "$@" {pipes}'
        command = ["bash", "-c", script, "bash", program, *QUIET, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._out, self._in = ours[1], theirs[0]
        self._rest, self._number, self._events = b"", 0, []
        target = self._ask("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        attached = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True}, session=None)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def look_at(self, page: Path, *, width: int = 1250, picture: Path | None = None) -> Seen:
        """Open a page in a window of that width; `picture`: a PNG of the whole page is written there."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._ask("Emulation.setDeviceMetricsOverride", size)
        self._events.clear()
        self._ask("Page.navigate", {"url": page.resolve().as_uri()})
        self._wait("Page.loadEventFired")
        found = self._ask("Runtime.evaluate", {"expression": LOOK, "returnByValue": True})["result"]["value"]
        if picture:
            shot = self._ask("Page.captureScreenshot", {"captureBeyondViewport": True})
            picture.write_bytes(base64.b64decode(shot["data"]))
        requests, messages = [], []
        for event in self._events:
            name, about = event["method"], event.get("params", {})
            if name == "Network.requestWillBeSent":
                requests.append(about["request"]["url"])
            elif name in {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}:
                messages.append(json.dumps(about)[:500])
        return Seen(found, [r for r in requests if not r.startswith(("data:", page.resolve().as_uri()))], messages)

    def _ask(self, method: str, params: dict[str, Any] | None = None, *, session: str | None = "own") -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params or {}}
        if session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def _wait(self, name: str) -> None:
        while not any(event.get("method") == name for event in self._events):
            self._events.append(self._next())

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + 30
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], max(0, end - time.monotonic()))[0], "the browser says nothing"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        self._process.wait(timeout=20)
