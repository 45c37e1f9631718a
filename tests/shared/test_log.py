"""Log lines: one form for ours and the libraries', and nothing in them of what was said."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from shared.log import MAX_REQUEST_ID, sane_request_id, set_up_logging


class _Stderr:
    """What has gone to stderr so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def getvalue(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[_Stderr]:
    """Logging is put back as it was afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield _Stderr(capsys)
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def _json_lines(stderr: _Stderr) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stderr.getvalue().splitlines()]


def _fail(said: str) -> None:
    if said:
        raise ValueError("it broke")


class TestJson:
    """For machines."""

    def test_one_line_each(self, stderr: _Stderr) -> None:
        """Ours and a library's line alike: what, when, how bad, which process."""
        set_up_logging("info", "json", "gpu_worker")
        structlog.get_logger("ours").info("model moved", model="m")
        logging.getLogger("library").warning("%d things", 3)
        ours, theirs = _json_lines(stderr)
        assert (ours["event"], ours["level"], ours["process"], ours["model"]) == (
            "model moved",
            "info",
            "gpu_worker",
            "m",
        )
        assert (theirs["event"], theirs["level"], theirs["process"]) == ("3 things", "warning", "gpu_worker")
        assert ours["timestamp"].endswith("Z")

    def test_traceback(self, stderr: _Stderr) -> None:
        """An exception is part of its line."""
        set_up_logging("info", "json", "web")
        try:
            _fail("hello")
        except ValueError:
            structlog.get_logger("ours").exception("failed")
            logging.getLogger("library").exception("failed")
        for line in _json_lines(stderr):
            assert "ValueError: it broke" in line["exception"]

    def test_bound(self, stderr: _Stderr) -> None:
        """What is bound to a context, a request's id, is in all its lines."""
        set_up_logging("info", "json", "web")
        with structlog.contextvars.bound_contextvars(request_id="r1"):
            structlog.get_logger("ours").info("a")
            logging.getLogger("library").error("b")
        structlog.get_logger("ours").info("c")
        assert [line.get("request_id") for line in _json_lines(stderr)] == ["r1", "r1", None]


class TestConsole:
    """For people."""

    def test_line(self, stderr: _Stderr) -> None:
        """A line without colours where nobody sees them."""
        set_up_logging("info", "console", "web")
        structlog.get_logger("ours").info("model moved", model="m")
        assert "model moved" in stderr.getvalue()
        assert "model=m" in stderr.getvalue()
        assert "\x1b" not in stderr.getvalue()

    def test_traceback_without_locals(self, stderr: _Stderr) -> None:
        """A traceback shows where it happened, and no value of what was said."""
        set_up_logging("info", "console", "web")
        secret = str(10**30 + 7)  # made here, so that no line of source holds it
        try:
            _fail(secret)
        except ValueError as error:
            structlog.get_logger("ours").error("failed", exc_info=error)
            logging.getLogger("library").exception("failed too")
        assert stderr.getvalue().count("ValueError: it broke") == 2
        assert "_fail" in stderr.getvalue()
        assert secret not in stderr.getvalue()


@pytest.mark.parametrize("form", ["json", "console"])
def test_level(stderr: _Stderr, form: str) -> None:
    """What is below the level is not written, ours or theirs; set up again, nothing is written twice."""
    set_up_logging("info", form, "web")
    set_up_logging("warning", form, "web")
    structlog.get_logger("ours").info("no")
    logging.getLogger("library").info("no")
    structlog.get_logger("ours").warning("yes")
    logging.getLogger("library").warning("yes")
    assert len(stderr.getvalue().splitlines()) == 2


class TestRequestId:
    """A client's own id of its request."""

    @pytest.mark.parametrize("given", ["r", "req_01:a.b-C", "0" * MAX_REQUEST_ID])
    def test_sane(self, given: str) -> None:
        """It is taken over."""
        assert sane_request_id(given) == given

    @pytest.mark.parametrize(
        "given", [None, "", "0" * (MAX_REQUEST_ID + 1), "a b", "a\nb", "ä", "٣", "a\x1b[31m", "<b>", 'a"b', "a/b"]
    )
    def test_not(self, given: str | None) -> None:
        """What would forge a line or a header is not."""
        assert sane_request_id(given) is None
