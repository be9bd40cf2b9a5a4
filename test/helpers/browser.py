"""A headless Chromium for tests, spoken to by its DevTools protocol over a pipe: no other package.

with Browser.start() as browser:
    browser.open(path)
    assert browser.evaluate("document.title") == "..."
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
# WebGL in software; a page from file:// may read nothing but what any user's browser lets it.
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-sandbox",  # root has none
)
_TIMEOUT_S = 180.0  # WebGL in software, on a machine that others use too


def find() -> str | None:
    """The browser's command, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of one browser.

    Attributes:
        errors: What went wrong since ``open``: exceptions, errors on the console, failed requests.
        requests: URLs that were asked for since ``open``.
    """

    def __init__(self, write: BinaryIO, read: BinaryIO) -> None:
        self._write, self._read, self._rest = write, read, b""
        self._number, self._session = 0, None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    @classmethod
    @contextlib.contextmanager
    def start(cls) -> Iterator[Browser]:
        """A browser with a profile of its own, ended with the block."""
        command = find()
        assert command is not None, f"none of {', '.join(NAMES)} is installed"
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            to_child, from_child = os.pipe(), os.pipe()
            # out of the way of 3 and 4, where the browser looks for them
            ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_child[0], from_child[1])]

            def place() -> None:
                os.dup2(ends[0], 3)
                os.dup2(ends[1], 4)

            process = subprocess.Popen(
                [command, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
                preexec_fn=place,
                pass_fds=(3, 4),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for fd in (*ends, to_child[0], from_child[1]):
                os.close(fd)
            try:
                with (
                    os.fdopen(to_child[1], "wb", 0) as write,
                    os.fdopen(from_child[0], "rb", 0) as read,
                ):
                    browser = cls(write, read)
                    yield browser
                    with contextlib.suppress(OSError, AssertionError):
                        browser._session = None
                        browser.call("Browser.close")
            finally:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; its result."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page from ``file://`` in a window of this size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 700)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.errors, self.requests = [], []
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                          awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = _TIMEOUT_S) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never: {expression}; errors: {self.errors}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """A key down and up."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def pixels(self, selector: str) -> npt.NDArray[np.uint8]:
        """What is seen of an element, ``(row, column, 3)``."""
        box = self.evaluate(
            f"(r => [r.x, r.y, r.width, r.height])(document.querySelector({selector!r})"
            ".getBoundingClientRect())"
        )
        found = self.call("Page.captureScreenshot", format="png")
        png = io.BytesIO(base64.b64decode(found["data"]))
        picture = np.asarray(Image.open(png).convert("RGB"))
        x, y, width, height = (round(value) for value in box)
        part: npt.NDArray[np.uint8] = picture[max(0, y) : y + height, max(0, x) : x + width]
        return part

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next message; events are taken note of."""
        while b"\0" not in self._rest:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self._read], [], [], left)[0], "no answer"
            piece = self._read.read(1 << 16)
            assert piece, "the browser ended"
            self._rest += piece
        raw, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(raw)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, event: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
            self.errors.append(
                " ".join(str(a.get("value", a.get("description"))) for a in event["args"])
            )
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.errors.append(event["entry"]["text"] + " " + event["entry"].get("url", ""))
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Network.loadingFailed" and not event.get("canceled"):
            self.errors.append(f"request failed: {event['errorText']}")
