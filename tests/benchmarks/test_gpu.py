"""The runner of the stages that need a GPU, with stages that need none."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.benchmarks import gpu, moves
from tests.benchmarks.gpu import FULL, SHORT, Stage
from tests.system.service import eventually, is_running


def python(code: str, limit_s: float = 100.0) -> Stage:
    """A stage named by its code."""
    return Stage(code, [sys.executable, "-c", code], limit_s)


def test_no_stage_stops_the_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that fails, dies or hangs is named in the table; what hangs is killed with its children."""
    pid = tmp_path / "pid"
    hangs = (
        "import pathlib, subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid));"
        "time.sleep(600)"
    )
    stages = [
        python("print('first table')"),
        python("raise SystemExit(3)"),
        python("import os; os.kill(os.getpid(), 9)"),
        python(hangs, limit_s=4.0),
        python("print('last table')"),
    ]
    monkeypatch.setattr(gpu, "SHORT", stages)
    assert gpu.main([]) == 1
    printed = capfd.readouterr().out
    assert "first table\n=== ok after" in printed
    assert "last table\n=== ok after" in printed
    results = [line.split(" | ")[1] for line in printed.splitlines() if line.startswith("| ")][1:]
    assert results == ["ok", "exit code 3", "exit code -9", "over its limit of 4 s", "ok"]
    eventually(lambda: not is_running(int(pid.read_text())), 10, "the child of the stage that hung gone")


def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is 0 if every stage is."""
    monkeypatch.setattr(gpu, "FULL", [python("pass")])
    assert gpu.main(["--full"]) == 0


def test_the_short_run_takes_eight_minutes_at_most() -> None:
    """All limits together."""
    assert sum(stage.limit_s for stage in SHORT) <= 480


@pytest.mark.parametrize("stage", [*SHORT, *FULL], ids=lambda stage: stage.name)
def test_stages_name_what_exists(stage: Stage) -> None:
    """Modules and files of tests."""
    assert importlib.util.find_spec(stage.command[2])
    for argument in stage.command:
        if argument.startswith("tests/"):
            assert (Path(__file__).parents[2] / argument).exists()


def test_moves_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    """Every move has a row; on a CPU nothing is captured."""
    moves.main(["--device", "cpu", "--slots", "1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows][1:3] == ["load", "warm-up of the synthesis thread"]
    assert len(rows) == 12
    assert all(float(row[1]) >= 0 for row in rows[1:])
    assert {row[4] for row in rows[1:]} == {"0 (0)"}
