"""A headless Chromium for tests of pages, driven over its DevTools pipe."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_COMMANDS_FD, _EVENTS_FD = 3, 4
"""The file descriptors that Chromium reads and writes with --remote-debugging-pipe."""


class Browser:
    """One page of one browser; `evaluate` runs scripts in it."""

    def __init__(self, commands: int, events: int) -> None:
        self._commands = commands
        self._events = events
        self._unread = b""
        self._last_id = 0
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")

    def open(self, url: str) -> None:
        """Show the page at `url`, and wait until all that it names itself has come."""
        failure = self._call("Page.navigate", url=url).get("errorText")
        assert failure is None, failure
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; a promise's value is waited for."""
        answer = self._call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, timeout_s: float = 30) -> Any:
        """The value of an expression in the page once it is true."""
        poll = f"""new Promise((resolve, reject) => {{
            const end = Date.now() + {timeout_s * 1000};
            const look = () => {{
                const value = {script};
                if (value) resolve(value instanceof Node ? true : value);
                else if (Date.now() > end) reject(new Error("not in time"));
                else setTimeout(look, 50);
            }};
            look();
        }})"""
        return self.evaluate(poll)

    def save_downloads(self, directory: Path) -> None:
        """From now on, a file that the page offers and a click takes is saved in `directory`."""
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(directory))

    def _call(self, method: str, **parameters: Any) -> Any:
        self._last_id += 1
        command = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while (answer := self._message()).get("id") != self._last_id:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _message(self) -> Any:
        while b"\0" not in self._unread:
            received = os.read(self._events, 1 << 16)
            assert received, "the browser has ended"
            self._unread += received
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def running_browser(directory: Path, *options: str) -> Iterator[Browser]:
    """A browser with a profile of its own below `directory`."""
    assert CHROMIUM is not None
    commands_out, commands = os.pipe()
    events, events_in = os.pipe()

    def place() -> None:
        # Copies above both numbers first: a pipe's own number may be 3 or 4.
        copies = os.dup(commands_out), os.dup(events_in)
        os.dup2(copies[0], _COMMANDS_FD)
        os.dup2(copies[1], _EVENTS_FD)

    process = subprocess.Popen(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"),
            *("--remote-debugging-pipe", f"--user-data-dir={directory / 'profile'}", "--no-first-run", *options),
        ],
        preexec_fn=place,  # noqa: PLW1509 - only duplicates file descriptors
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_out)
    os.close(events_in)
    try:
        yield Browser(commands, events)
    finally:
        # Chromium ends when its pipe does.
        os.close(commands)
        os.close(events)
        process.terminate()
        process.wait(30)
