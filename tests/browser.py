"""A real headless Chromium, driven over its debugging pipe: NUL-terminated JSON, no package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import time
import zlib
from pathlib import Path
from typing import Any, Dict, List, Tuple

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PATIENCE = 30.0  # seconds for any one answer; nothing here waits without an end
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--remote-debugging-pipe", "--no-first-run", "--disable-background-networking",
    "--force-device-scale-factor=1", "--hide-scrollbars",
)  # fmt: skip


class Browser:
    """One tab.  `complaints` are the exceptions and console entries of the page it shows."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM
        self.complaints: List[str] = []
        self._events: List[Dict[str, Any]] = []
        self._count, self._buffer, self._session = 0, b"", ""
        folder.mkdir(exist_ok=True)
        their_input, self._input = os.pipe()
        self._output, their_output = os.pipe()
        # The browser reads from 3 and writes to 4; a shell puts them there in every Python.
        words = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        redirect = f'exec "$@" 3<&{their_input} 4>&{their_output}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", redirect, "browser", *words],
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
            pass_fds=(their_input, their_output),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(their_input)
        os.close(their_output)

    def __enter__(self) -> Browser:
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Audits"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        os.close(self._input)
        os.close(self._output)

    def call(self, method: str, **params: Any) -> Dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._count += 1
        message: Dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._input, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: Dict[str, Any] = answer["result"]
                return result

    def _read(self, deadline: float) -> Dict[str, Any]:
        while b"\0" not in self._buffer:
            ready = select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))
            if not ready[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._output, 1 << 20)
            if not part:
                raise EOFError("the browser has ended")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: Dict[str, Any] = json.loads(line)
        method, params = message.get("method", ""), message.get("params", {})
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(params))
        if method == "Audits.issueAdded" and "ContentSecurity" in params["issue"]["code"]:
            self.complaints.append(json.dumps(params))
        if method:
            self._events.append(message)
        return message

    def open(self, place: object) -> None:
        """Load a file or an address and wait until it has loaded."""
        self._events.clear()
        self.complaints.clear()
        self.call("Page.navigate", url=f"file://{place}" if isinstance(place, Path) else str(place))
        deadline = time.monotonic() + PATIENCE
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read(deadline)

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int, scheme: str = "light", media: str = "") -> None:
        """Set the size of the window, the colour scheme, and the medium ('print')."""
        metrics = {"deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", media=media, features=[feature])

    def screenshot(self) -> bytes:
        """Return the window as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


def read_png(data: bytes, height: int = 1 << 30) -> Tuple[int, List[bytes]]:
    """Return the bytes of a pixel, and the topmost rows of an image of 8 bits a channel."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, rows, depth, colour, *rest = struct.unpack(">2I5B", data[16:29])
    assert (depth, *rest) == (8, 0, 0, 0)
    packed, place = b"", 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 8] == b"IDAT":
            packed += data[place + 8 : place + 8 + size]
        place += size + 12
    lines, step = zlib.decompress(packed), {2: 3, 6: 4}[colour]
    size = width * step
    above, image = bytes(size + step), []
    for start in range(0, min(rows, height) * (size + 1), size + 1):
        kind, row = lines[start], bytearray(step) + lines[start + 1 : start + 1 + size]
        for i in range(step, size + step) if kind else ():
            left, up, corner = row[i - step], above[i], above[i - step]
            if kind == 4:
                guess = left + up - corner
                near = [abs(guess - value) for value in (left, up, corner)]
                row[i] = row[i] + (left, up, corner)[near.index(min(near))] & 255
            else:
                row[i] = row[i] + (left, up, (left + up) // 2)[kind - 1] & 255
        above = bytes(row)
        image.append(above[step:])
    return step, image


def shrink_png(data: bytes) -> bytes:
    """Return the same image, better packed: of a page, unfiltered rows pack best."""
    step, image = read_png(data)
    size = struct.pack(">2I5B", len(image[0]) // step, len(image), 8, {3: 2, 4: 6}[step], 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in image), 9)
    parts = ((b"IHDR", size), (b"IDAT", pixels), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )
    return data[:8] + b"".join(chunks)
