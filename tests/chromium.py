"""A real browser to look at pages with: Chromium, spoken to over a pair of pipes.

The DevTools protocol, one JSON object after another with a zero byte between; no socket, no port
and no package beside the browser.
"""

import json
import os
import select
import shutil
import subprocess
import time
from base64 import b64decode
from contextlib import contextmanager
from pathlib import Path

BINARY = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),
    *("--remote-debugging-pipe", "--no-first-run", "--mute-audio", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--autoplay-policy=no-user-gesture-required",
)
# Chromium reads commands from descriptor 3 and writes answers to 4.
START = 'exec 100<&"$1" 101>&"$2"; shift 2; exec "$@" 3<&100 4>&101 100<&- 101>&-'


class Page:
    """One tab. `errors`: what its console called an error, what was thrown, what did not load."""

    def __init__(self, send: int, receive: int):
        self.send, self.receive = send, receive
        self.rest, self.count, self.session = b"", 0, None
        self.errors, self.requests, self.loaded = [], [], False
        target = self("Target.createTarget", url="about:blank")["targetId"]
        found = self("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: object) -> dict:
        """The answer to one command of the protocol."""
        self.count += 1
        number = self.count
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") != number:
                continue
            if "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            return answer["result"]

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Shows a file, all of it loaded, in a window of this size."""
        self.errors, self.requests, self.loaded = [], [], False
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self("Emulation.setDeviceMetricsOverride", mobile=width < 600, **size)
        self("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self._next()

    def run(self, script: str) -> object:
        """What a JavaScript expression gives, once it is there if it is a promise."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        found = self("Runtime.evaluate", expression=script, **options)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def screenshot(self, *, whole: bool = False) -> bytes:
        """The window, or the `whole` page, as a PNG."""
        found = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return b64decode(found["data"])

    def _next(self, seconds=60):
        """The next message; events are noted on the way."""
        end = time.monotonic() + seconds
        while b"\0" not in self.rest:
            if not select.select([self.receive], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError(f"Chromium said nothing for {seconds} s")
            data = os.read(self.receive, 2**20)
            if not data:
                raise RuntimeError("Chromium ended")
            self.rest += data
        one, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(one)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event, found):
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(found["exceptionDetails"]["exception"]["description"])
        elif event == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning"):
            self.errors.append(str([each.get("value") for each in found["args"]]))
        elif event == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.errors.append(found["entry"]["text"])


@contextmanager
def chromium(folder: Path):
    """A `Page` of a browser that keeps its profile in `folder` and ends with the context."""
    commands, answers = os.pipe(), os.pipe()
    mine = (commands[1], answers[0])
    theirs = (commands[0], answers[1])
    start = ["bash", "-c", START, "bash", *map(str, theirs)]
    browser = subprocess.Popen(
        [*start, BINARY, *FLAGS, f"--user-data-dir={folder}"],
        pass_fds=theirs,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for end in theirs:
        os.close(end)
    try:
        yield Page(*mine)
    finally:
        os.close(mine[0])  # which ends it
        try:
            browser.wait(20)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
        os.close(mine[1])
