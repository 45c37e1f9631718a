"""`models` as a table and as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.__main__ import main
from tests.server.commands.conftest import CannedService

MODELS = {
    "object": "list",
    "data": [
        {"id": "espeak-ng", "state": "resident", "task": "CustomVoice", "languages": ["a", "b"], "voices": ["v"] * 38}
        | {"loaded_bytes": 3 * 2**30, "aliases": ["tts-1"]},
        {"id": "qwen3", "state": "unavailable", "task": "Base", "languages": [], "voices": [], "loaded_bytes": 0}
        | {"detail": "no weights [yet]"},
        {"id": "other", "state": "unavailable", "detail": "broken"},
    ],
}


def test_models(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """The table has a line for each model: state, task, counts, size and aliases. Why some are unavailable follows."""
    service.answers["/v1/models"] = (200, MODELS)
    assert main(["models"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].split() == ["espeak-ng", "resident", "CustomVoice", "2", "38", "3,072", "MB", "tts-1"]
    assert lines[2].split() == ["qwen3", "unavailable", "Base", "0", "0"]
    assert lines[4:] == ["", "qwen3: no weights [yet]", "other: broken"]


def test_json(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """--json prints the service's own answer, for other programs."""
    service.answers["/v1/models"] = (200, MODELS)
    assert main(["models", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == MODELS


def test_a_client_loads_no_service() -> None:
    """A command starts within a few hundred milliseconds: it imports neither the web framework nor the web server."""
    program = """
import sys
from server.__main__ import main
try:
    main(["models", "--help"])
except SystemExit:
    print({"litestar", "granian", "av"} & sys.modules.keys())
"""
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    ).stdout
    assert said.endswith("set()\n")
