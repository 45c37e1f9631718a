"""`models` and `voices` as tables and as JSON."""

import json

import pytest

from server.__main__ import main
from tests.server.commands.conftest import CannedService

MODELS = {
    "object": "list",
    "data": [
        {"id": "espeak-ng", "state": "resident", "task": "CustomVoice", "languages": ["a", "b"], "voices": ["v"] * 38}
        | {"loaded_bytes": 3 * 2**30, "aliases": ["tts-1"]},
        {"id": "qwen3", "state": "unavailable", "task": "Base", "languages": [], "voices": [], "loaded_bytes": 0},
    ],
}
VOICES = {
    "voices": [
        {"id": "en-us", "name": "Emma", "model": "espeak-ng", "language": "english", "kind": "preset"},
        {"id": "v1", "name": "Mine", "model": "qwen3", "language": "auto", "kind": "clone", "description": "my own"},
    ],
    "uploaded_voices": [{"id": "v1", "name": "Mine", "type": "clone", "description": "my own"}],
}


def test_models(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """One line a model: state, task, counts, size and aliases."""
    service.answers["/v1/models"] = (200, MODELS)
    assert main(["models"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].split() == ["espeak-ng", "resident", "CustomVoice", "2", "38", "3,072", "MB", "tts-1"]
    assert lines[2].split() == ["qwen3", "unavailable", "Base", "0", "0"]


def test_voices(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """Presets and saved voices together, each once."""
    service.answers["/v1/audio/voices"] = (200, VOICES)
    assert main(["voices"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["en-us", "v1"]
    assert "my own" in lines[2]


def test_voices_of_one_model(service: CannedService) -> None:
    """A model's name is quoted, slash and all."""
    service.answers["/v1/audio/voices?model=Qwen%2FX"] = (200, VOICES)
    assert main(["voices", "--model", "Qwen/X"]) == 0


@pytest.mark.parametrize(
    ("command", "path", "answer"), [("models", "/v1/models", MODELS), ("voices", "/v1/audio/voices", VOICES)]
)
def test_json(
    service: CannedService, capfd: pytest.CaptureFixture[str], command: str, path: str, answer: dict[str, object]
) -> None:
    """--json is the service's own answer, for other programs."""
    service.answers[path] = (200, answer)
    assert main([command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == answer
