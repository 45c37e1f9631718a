"""`cluster`: wrong arguments; tests/cluster runs it, and tests/server/cluster/test_config.py reads what it prints."""

import pytest

from server.__main__ import main


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
