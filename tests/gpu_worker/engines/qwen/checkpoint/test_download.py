"""Downloads from a hub: complete, resumable, and with errors that say what to do."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.download import download_checkpoint, download_models
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


def test_a_model_named_by_size_and_task_is_downloaded_whole(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`download 0.6B-CustomVoice` downloads a checkpoint that passes verification, and reports its directory."""
    assert download_models(["0.6b-customvoice"], load_catalog(), tmp_path, endpoint=hub.endpoint) == 0

    target = tmp_path / "Qwen3-TTS-12Hz-0.6B-CustomVoice"
    verify(target)
    assert f"{HF_ID}: complete at {target}" in capsys.readouterr().err


def test_complete_files_are_not_downloaded_again(hub: FakeHub, tmp_path: Path) -> None:
    """After a download that failed half-way, the next one downloads only the missing files."""
    hub.refuse = {"model.safetensors"}
    with pytest.raises(JobError, match="the Hugging Face hub refuses"):
        download_checkpoint(HF_ID, tmp_path / "model", endpoint=hub.endpoint)
    hub.refuse = set()
    hub.fetched.clear()

    reports: list[str] = []
    download_checkpoint(HF_ID, tmp_path / "model", endpoint=hub.endpoint, progress=reports.append)

    assert hub.fetched == ["model.safetensors"]
    # The largest file comes last.
    assert reports[-1].startswith("downloading model.safetensors")
    assert reports[-1].endswith(f"file {len(reports)} of {len(reports)}")
    verify(tmp_path / "model")


def test_a_file_of_another_size_than_the_hub_says_is_an_error(hub: FakeHub, tmp_path: Path) -> None:
    """Sizes are compared with the hub's listing after the download."""
    hub.sizes = {"config.json": 1}

    with pytest.raises(JobError, match=r"config\.json has \d+ bytes where the hub says 1"):
        download_checkpoint(HF_ID, tmp_path / "model", endpoint=hub.endpoint)


def test_the_error_for_an_unreachable_hub_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is 1. The message names HF_ENDPOINT and the folder for a copy. No directory is left behind."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert download_models(["0.6B-Base"], load_catalog(), tmp_path, endpoint=endpoint) == 1

    message = capsys.readouterr().err
    assert "out of reach" in message
    assert "HF_ENDPOINT" in message
    assert f"copy its files into {tmp_path / 'Qwen3-TTS-12Hz-0.6B-Base'}" in message
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before_the_download(hub: FakeHub, tmp_path: Path) -> None:
    """Nothing is downloaded when the files do not fit on the disk."""
    hub.sizes = {"model.safetensors": 1 << 60}

    with pytest.raises(JobError, match="GB free"):
        download_checkpoint(HF_ID, tmp_path / "model", endpoint=hub.endpoint)
    assert hub.fetched == []


def test_unknown_names_are_refused_before_any_download(hub: FakeHub, tmp_path: Path) -> None:
    """One unknown name among several stops the command; a model without weights counts as unknown."""
    for wrong in ("0.6B-VoiceDesign", "espeak-ng"):
        with pytest.raises(LookupError, match=r"no weights .* there are .*1\.7b-base"):
            download_models(["0.6B-CustomVoice", wrong], load_catalog(), tmp_path, endpoint=hub.endpoint)
    assert hub.fetched == []
