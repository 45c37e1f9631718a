"""`voices` as a table and as JSON."""

import json

import pytest

from server.__main__ import main
from tests.server.commands.conftest import CannedService

VOICES = {
    "voices": [
        {"id": "en-us", "name": "Emma", "model": "espeak-ng", "language": "english", "kind": "preset"},
        {"id": "v1", "name": "Mine", "model": "qwen3", "language": "auto", "kind": "clone", "description": "my own"},
    ],
    "uploaded_voices": [
        {"id": "v1", "name": "Mine", "type": "audio_sample", "owner": "alice", "shared": False},
        {"id": "v2", "name": "Ours", "type": "prompt", "description": "of all", "shared": True},
    ],
}


def test_voices(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """The table has preset and saved voices, each once: also those that no model speaks with now."""
    service.answers["/v1/audio/voices"] = (200, VOICES)
    assert main(["voices"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["en-us", "v1", "v2"]
    assert "my own" in lines[2]


def test_owner(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """A saved voice has its owner, where the service names it, and whether every key may use it."""
    service.answers["/v1/audio/voices"] = (200, VOICES)
    assert main(["voices"]) == 0
    header, preset, mine, ours = (line.split() for line in capfd.readouterr().out.splitlines())
    assert header[-3:] == ["owner", "shared", "description"]
    assert preset == ["en-us", "Emma", "espeak-ng", "english", "preset"]
    assert mine == ["v1", "Mine", "qwen3", "auto", "clone", "alice", "no", "my", "own"]
    assert ours == ["v2", "Ours", "design", "yes", "of", "all"]


@pytest.mark.parametrize("name", ["[/b]", "[red]x", ":smile:"])
def test_a_name_that_looks_like_markup(service: CannedService, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """It stands in the table as it is: any client can give a voice such a name."""
    service.answers["/v1/audio/voices"] = (200, {"voices": [{"id": "v1", "name": name, "description": name}]})
    assert main(["voices"]) == 0
    assert capfd.readouterr().out.splitlines()[1].split() == ["v1", name, name]


def test_voices_of_one_model(service: CannedService) -> None:
    """The name of a model is quoted in the query, its slash too."""
    service.answers["/v1/audio/voices?model=Qwen%2FX"] = (200, VOICES)
    assert main(["voices", "--model", "Qwen/X"]) == 0


def test_json(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """--json prints the service's own answer, for other programs."""
    service.answers["/v1/audio/voices"] = (200, VOICES)
    assert main(["voices", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == VOICES


def test_a_service_that_tells_of_no_saved_voices(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """One of another make: its voices are listed."""
    service.answers["/v1/audio/voices"] = (200, {"voices": [{"id": "af_heart", "name": "Heart"}]})
    assert main(["voices"]) == 0
    assert "af_heart" in capfd.readouterr().out
