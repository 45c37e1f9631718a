"""`cluster`: wrong arguments; tests/cluster runs it, and tests/server/cluster/test_config.py reads what it prints."""

import signal
import threading
from typing import Any

import pytest

from server.__main__ import main
from server.commands.cluster import _stopped_by_signals


@pytest.mark.parametrize(
    ("option", "number", "smallest"), [("--gpus", "-3", 0), ("--gpus", "two", 0), ("--nodes", "0", 1)]
)
def test_wrong_numbers(option: str, number: str, smallest: int, capfd: pytest.CaptureFixture[str]) -> None:
    """A number that no cluster has is not printed into a config."""
    with pytest.raises(SystemExit):
        main(["cluster", "--print-config", option, number])
    out, problem = capfd.readouterr()
    assert out == ""
    assert f"{option}: must be a whole number, {smallest} or more, not {number!r}" in problem


@pytest.mark.parametrize("arguments", [["--gpus", "2"], ["--address", "auto", "--nodes", "1"]])
def test_numbers_are_for_the_config(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Without --print-config, the numbers would have no effect."""
    assert main(["cluster", *arguments]) == 2
    assert "--gpus and --nodes are for --print-config; TTS_REPLICAS is" in capfd.readouterr().err


def test_a_second_ctrl_c_is_in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first signal stops the service, whichever it is; further SIGTERMs say nothing new."""
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    hurry = threading.Event()
    stopping = _stopped_by_signals(hurry)
    for number, is_hurried in ((signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGINT, True)):
        handlers[number](number, None)
        assert (stopping.is_set(), hurry.is_set()) == (True, is_hurried)
