"""Log lines: one form for our lines and those of libraries, and no text of a request in them."""

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from shared.log import set_up_logging


class _Stderr:
    """The text that went to stderr so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def getvalue(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[_Stderr]:
    """Stderr; the logging set-up is restored after the test."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield _Stderr(capsys)
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def _json_lines(stderr: _Stderr) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stderr.getvalue().splitlines()]


def _fail(text: str) -> None:
    if text:
        raise ValueError("it broke")


class TestJson:
    """The format for programs."""

    def test_one_line_each(self, stderr: _Stderr) -> None:
        """Our line and a library's have event, time, level and process, whatever thread writes them."""
        set_up_logging("info", "json", "gpu_worker")
        log = structlog.get_logger("ours")
        writer = threading.Thread(target=log.info, args=["model_loaded"], kwargs={"model": "m"})
        writer.start()
        writer.join()
        logging.getLogger("library").warning("%d things", 3)
        ours, theirs = _json_lines(stderr)
        assert (ours["event"], ours["level"], ours["process"], ours["model"]) == (
            "model_loaded",
            "info",
            "gpu_worker",
            "m",
        )
        assert (theirs["event"], theirs["level"], theirs["process"]) == ("3 things", "warning", "gpu_worker")
        assert ours["timestamp"].endswith("Z")

    def test_traceback(self, stderr: _Stderr) -> None:
        """An exception is a field of its line."""
        set_up_logging("info", "json", "web")
        try:
            _fail("hello")
        except ValueError:
            structlog.get_logger("ours").exception("failed")
            logging.getLogger("library").exception("failed")
        for line in _json_lines(stderr):
            assert "ValueError: it broke" in line["exception"]

    def test_bound(self, stderr: _Stderr) -> None:
        """A value that is bound to the context, like a request id, is in all its lines."""
        set_up_logging("info", "json", "web")
        with structlog.contextvars.bound_contextvars(request_id="r1"):
            structlog.get_logger("ours").info("a")
            logging.getLogger("library").error("b")
        structlog.get_logger("ours").info("c")
        assert [line.get("request_id") for line in _json_lines(stderr)] == ["r1", "r1", None]


class TestConsole:
    """The format for people."""

    def test_line(self, stderr: _Stderr) -> None:
        """A line has no colours if stderr is not a terminal."""
        set_up_logging("info", "console", "web")
        structlog.get_logger("ours").info("model_loaded", model="m")
        assert "model_loaded" in stderr.getvalue()
        assert "model=m" in stderr.getvalue()
        assert "\x1b" not in stderr.getvalue()

    def test_traceback_without_locals(self, stderr: _Stderr) -> None:
        """A traceback shows the place and no values of local variables."""
        set_up_logging("info", "console", "web")
        secret = str(10**30 + 7)  # computed, so that no line of source has it
        try:
            _fail(secret)
        except ValueError as error:
            structlog.get_logger("ours").error("failed", exc_info=error)
            logging.getLogger("library").exception("failed too")
        assert stderr.getvalue().count("ValueError: it broke") == 2
        assert "_fail" in stderr.getvalue()
        assert secret not in stderr.getvalue()


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_keys_are_left_out(stderr: _Stderr, log_format: str) -> None:
    """Lines of libraries and tracebacks have no key in them, either."""
    set_up_logging("info", log_format, "web")
    structlog.get_logger("ours").info("refused", path="/sk-tts-abc")
    try:
        _fail("x")
    except ValueError:
        logging.getLogger("a.library").exception("failed with %s", "sk-tts-abc")
    assert stderr.getvalue().count("sk-tts-…") == 2
    assert "abc" not in stderr.getvalue()


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_level(stderr: _Stderr, log_format: str) -> None:
    """Lines below the level are not written; a second set-up does not write lines twice."""
    set_up_logging("info", log_format, "web")
    set_up_logging("warning", log_format, "web")
    structlog.get_logger("ours").info("no")
    logging.getLogger("library").info("no")
    structlog.get_logger("ours").warning("yes")
    logging.getLogger("library").warning("yes")
    assert len(stderr.getvalue().splitlines()) == 2
