"""OpenAI's newest SDK for Node: a whole answer in a file, a streamed one in pieces, and errors with our codes."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shared.pcm import SAMPLE_RATE
from tests.audio import decode
from tests.clients.conftest import HERE
from tests.recogniser import SENTENCES, recognise
from tests.system.service import Service

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(shutil.which("npm") is None, reason="Node is not installed (apt install npm)"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and the program that uses it."""
    path = tmp_path_factory.mktemp("node")
    subprocess.run(["npm", "install", "--silent", "openai@latest"], cwd=path, check=True)  # noqa: S607 -- any npm
    shutil.copy(HERE / "openai_client.mjs", path)
    return path


def test_the_sdk_for_node(espeak: Service, folder: Path) -> None:
    """Both answers are the sentence; a voice that is unknown is the SDK's own error."""
    command = ["node", "openai_client.mjs", espeak.url, SENTENCES[0], "said"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    whole, streamed = (folder / "said.mp3").read_bytes(), (folder / "said.pcm").read_bytes()
    assert recognise(decode(whole, "mp3")) == recognise(streamed) == SENTENCES[0]
    assert len(streamed) / 2 / SAMPLE_RATE > 1
    assert found["pieces"] > 1
    assert found["error"] == {"kind": "BadRequestError", "code": "voice_not_found", "param": "voice"}
    assert found["models"] == len(espeak.http.get("/v1/models").json()["data"])
