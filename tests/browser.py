"""A Chromium without a window, driven through the pipe that its own developer tools speak."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless --no-sandbox --no-first-run --disable-gpu --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
)


class Page:
    """One page: its errors and its requests are kept from the first on."""

    def __init__(self, out: int, into, session: str = ""):
        self.out, self.into, self.session = out, into, session
        self.number, self.buffer = 0, b""
        self.errors: list[str] = []
        self.requests: list[str] = []

    def ask(self, method: str, **parameters) -> dict:
        self.number += 1
        call = {"id": self.number, "method": method, "params": parameters}
        call |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(call).encode() + b"\0")
        while (found := self._next()).get("id") != self.number:
            pass
        assert "error" not in found, (method, found["error"])
        return found["result"]

    def _next(self) -> dict:
        while b"\0" not in self.buffer:
            more = os.read(self.into, 1 << 20)
            assert more, "Chromium has ended"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        found = json.loads(message)
        parameters = found.get("params", {})
        match found.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" | "Log.entryAdded":
                self.errors.append(json.dumps(parameters))
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
        return found

    def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def value(self, expression: str):
        """What a JavaScript expression is, as JSON has it."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> None:
        """Until an expression is true; an AssertionError if it does not become so."""
        end = time.monotonic() + seconds
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent", type=kind, key=key, **(text if kind == "keyDown" else {})
            )

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the first element that a selector finds."""
        self.value(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        x, y = self.value(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
            f"(document.querySelector({selector!r}).getClientRects()[0])"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A page that nothing is opened in yet; `folder` holds the browser's profile."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    assert program, f"none of {', '.join(NAMES)} is installed: apt-get install chromium"
    (to_it, out), (into, from_it) = os.pipe(), os.pipe()
    command = f'exec "$0" "$@" 3<&{to_it} 4>&{from_it}'  # the pipes' numbers are Chromium's own
    process = subprocess.Popen(
        ["bash", "-c", command, program, *OPTIONS.split(), f"--user-data-dir={folder}"],
        pass_fds=(to_it, from_it),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_it)
    os.close(from_it)
    try:
        browser = Page(out, into)
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        found = browser.ask("Target.attachToTarget", targetId=target, flatten=True)
        yield Page(out, into, found["sessionId"])
    finally:
        process.kill()
        process.wait()
        os.close(out)
        os.close(into)
