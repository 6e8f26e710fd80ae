"""Drives headless Chromium over the DevTools protocol: JSON messages on two pipes, so that no port is opened."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--hide-scrollbars",
    "--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
PROBE = Path(__file__).with_name("probe.js").read_text(encoding="utf-8")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "Space": 32, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "End": 35}


def find():
    """The path of Chromium, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """One tab. `events` are its events since the last `open`."""

    def __init__(self, profile, seconds=60.0):
        """Args: profile: an empty folder; seconds: timeout of one answer."""
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        self.seconds, self.out, self.inward, self.numbers = seconds, ours_out, ours_in, itertools.count(1)
        self.held, self.events = b"", []
        # Chromium expects descriptors 3 and 4, which may be in use here: bash moves them.
        run = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", find(), *FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            run, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        """Ends the browser."""
        self.session = None
        self.call("Browser.close")
        self.process.wait(self.seconds)
        os.close(self.out)
        os.close(self.inward)

    def call(self, method, **parameters):
        """Sends one command and returns its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        os.write(self.out, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _next(self):
        until = time.monotonic() + self.seconds
        while b"\0" not in self.held:
            ready, _, _ = select.select([self.inward], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"Chromium said nothing for {self.seconds} s"
            new = os.read(self.inward, 1 << 20)
            assert new, "Chromium has ended"
            self.held += new
        message, _, self.held = self.held.partition(b"\0")
        return json.loads(message)

    def open(self, path, width=1024, height=800, dark=False, script=True, media=""):
        """Loads a file at a size of the window, in CSS pixels."""
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 600)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        self.evaluate(PROBE)

    def evaluate(self, expression):
        """The value of a JavaScript expression, even if the page's own scripts are disabled."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def probe(self, name):
        """The result of a function of probe.js on the page."""
        return self.evaluate(f"probe.{name}()")

    def press(self, key):
        """Presses and releases one key."""
        text = {"Enter": {"text": "\r"}, "Space": {"text": " "}}.get(key, {})
        own = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **own, **(text if kind == "keyDown" else {}))

    def screenshot(self, path, whole=True):
        """Writes a PNG of the whole page, or of the window."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self):
        """The page printed on A4."""
        return base64.b64decode(self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
