"""Fetching from a hub: everything arrives, nothing twice, and trouble is said plainly."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.download import download, fetch
from gpu_worker.engines.qwen.checkpoint.verification import verify
from shared.catalog import load_catalog
from tests.checkpoints import tiny
from tests.fake_hub import FakeHub

HF_ID = "Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub that has the small CustomVoice checkpoint."""
    with FakeHub(HF_ID, tiny("custom_voice")) as hub:
        yield hub


def test_a_model_named_by_size_and_task_is_fetched_whole(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`download 0.6B-CustomVoice` brings a checkpoint that passes verification, and says where it is."""
    assert download(["0.6b-customvoice"], load_catalog(), tmp_path, endpoint=hub.endpoint) == 0

    target = tmp_path / "Qwen3-TTS-12Hz-0.6B-CustomVoice"
    verify(target)
    assert f"{HF_ID}: complete at {target}" in capsys.readouterr().err


def test_what_is_there_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    """After a refusal half-way, the next run fetches only what is missing."""
    hub.refuse = {"model.safetensors"}
    with pytest.raises(JobError, match="the Hugging Face hub refuses"):
        fetch(HF_ID, tmp_path / "model", endpoint=hub.endpoint)
    hub.refuse = set()
    hub.fetched.clear()

    said: list[str] = []
    fetch(HF_ID, tmp_path / "model", endpoint=hub.endpoint, progress=said.append)

    assert hub.fetched == ["model.safetensors"]
    # It is the largest, and comes last.
    assert said[-1].startswith("fetching model.safetensors")
    assert said[-1].endswith(f"file {len(said)} of {len(said)}")
    verify(tmp_path / "model")


def test_a_file_of_another_size_than_the_hub_says_is_an_error(hub: FakeHub, tmp_path: Path) -> None:
    """Sizes are compared with the hub's listing after everything has arrived."""
    hub.sizes = {"config.json": 1}

    with pytest.raises(JobError, match=r"config\.json has \d+ bytes where the hub says 1"):
        fetch(HF_ID, tmp_path / "model", endpoint=hub.endpoint)


def test_a_hub_out_of_reach_is_said_plainly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and a sentence that says what to do; no directory is left behind."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert download(["0.6B-Base"], load_catalog(), tmp_path, endpoint=endpoint) == 1

    message = capsys.readouterr().err
    assert "out of reach" in message
    assert "HF_ENDPOINT" in message
    assert not list(tmp_path.iterdir())


def test_a_disk_too_small_is_noticed_before_the_download(hub: FakeHub, tmp_path: Path) -> None:
    """Nothing is fetched when the files cannot fit."""
    hub.sizes = {"model.safetensors": 1 << 60}

    with pytest.raises(JobError, match="GB free"):
        fetch(HF_ID, tmp_path / "model", endpoint=hub.endpoint)
    assert hub.fetched == []


def test_unknown_names_are_refused_before_anything_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    """One wrong name among several stops the command; models without weights are no names here."""
    for wrong in ("0.6B-VoiceDesign", "espeak-ng"):
        with pytest.raises(LookupError, match=r"no weights .* there are .*1\.7b-base"):
            download(["0.6B-CustomVoice", wrong], load_catalog(), tmp_path, endpoint=hub.endpoint)
    assert hub.fetched == []
