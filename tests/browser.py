"""A headless Chromium that tests drive: it opens a page, is asked for values, presses keys, and tells what went wrong.

Over a pair of pipes (--remote-debugging-pipe): JSON messages that end in a zero byte. It needs Chromium alone.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip

# Chromium reads descriptor 3 and writes 4, which something else of ours may be: by way of two high ones.
_AS_3_AND_4 = """
import fcntl, os, sys
high = [fcntl.fcntl(int(given), fcntl.F_DUPFD, 10) for given in sys.argv[1:3]]
os.dup2(high[0], 3), os.dup2(high[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """errors: what the console and failed requests said since the page was opened."""

    def __init__(self, to, source):
        self._to, self._from, self._last = to, source, 0
        self.errors, self.requests, self._session = [], [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _read(self):
        message = b""
        while not message.endswith(b"\0"):
            byte = self._from.read(1)
            if not byte:
                raise RuntimeError("Chromium is gone")
            message += byte
        message = json.loads(message[:-1])
        method, given = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(given["exceptionDetails"].get("exception", given["exceptionDetails"])))
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            self.errors.append(str(given["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        return message

    def call(self, method, **given):
        """One command of the DevTools protocol, and its result."""
        self._last += 1
        message = dict(id=self._last, method=method, params=given)
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, address, width=1200, height=900):
        self.errors.clear()
        self.requests.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=address)
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def ask(self, expression):
        """The value of an expression of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, *keys):
        """Keys by name, such as Tab and ArrowRight, one after the other."""
        for key in keys:
            code = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[
                key
            ]
            for kind in ("rawKeyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


@contextlib.contextmanager
def browser(profile):
    """A Browser; profile: an empty folder. Ends, at the latest, with the block."""
    to_child, to = os.pipe()
    source, from_child = os.pipe()
    process = subprocess.Popen(
        [
            sys.executable, "-c", _AS_3_AND_4, str(to_child), str(from_child), CHROMIUM, *OPTIONS,
            f"--user-data-dir={profile}", "--remote-debugging-pipe",
        ],
        pass_fds=(to_child, from_child), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_child)
    os.close(from_child)
    try:
        with os.fdopen(to, "wb") as writing, os.fdopen(source, "rb") as reading:
            yield Browser(writing, reading)
    finally:
        process.kill()
        process.wait()
