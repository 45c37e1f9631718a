"""The directory of a model's checkpoint: the documented order, and no silent replacement."""

import sys
from pathlib import Path

import pytest

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.location import locate
from tests.checkpoints import hard_linked_copy, tiny

HF_ID = "Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice"
BASENAME = "Qwen3-TTS-12Hz-0.6B-CustomVoice"


def test_a_configured_path_is_the_only_one_tried(tmp_path: Path) -> None:
    """The checkpoint at a configured path is used or named in the error, whatever other copies exist."""
    models = tmp_path / "models"
    hard_linked_copy(tiny("custom_voice"), models / BASENAME)

    found = locate(HF_ID, configured=tiny("custom_voice"), models_dir=models, allow_download=True)
    assert found == tiny("custom_voice")
    with pytest.raises(JobError, match="elsewhere: is not a directory"):
        locate(HF_ID, configured=tmp_path / "elsewhere", models_dir=models, allow_download=True)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def test_the_models_directory_comes_before_the_hub_cache(hub_cache: Path, tmp_path: Path) -> None:
    """`models_dir/<basename>` is used if it exists, else the snapshot in the cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--Qwen--Qwen3-TTS-12Hz-0.6B-CustomVoice"
    snapshot = hard_linked_copy(tiny("custom_voice"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    models = tmp_path / "models"

    assert locate(HF_ID, configured=None, models_dir=models, allow_download=False) == snapshot
    ours = hard_linked_copy(tiny("custom_voice"), models / BASENAME)
    assert locate(HF_ID, configured=None, models_dir=models, allow_download=False) == ours


@pytest.mark.usefixtures("hub_cache")
def test_a_damaged_directory_is_not_passed_over(tmp_path: Path) -> None:
    """A damaged checkpoint in `models_dir` is an error or downloaded again, never replaced by another copy."""
    ours = hard_linked_copy(tiny("custom_voice"), tmp_path / BASENAME)
    (ours / "merges.txt").unlink()

    with pytest.raises(JobError, match=r"merges\.txt: missing"):
        locate(HF_ID, configured=None, models_dir=tmp_path, allow_download=False)
    with pytest.raises(JobError, match="out of reach"):
        locate(HF_ID, configured=None, models_dir=tmp_path, allow_download=True)


@pytest.mark.usefixtures("hub_cache")
def test_a_cache_without_the_model_costs_no_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every start asks for every model, and the Hub's library takes 0.3 s of CPU time to import."""
    monkeypatch.setitem(sys.modules, "huggingface_hub._snapshot_download", None)
    with pytest.raises(JobError, match="nor in the Hugging Face cache"):
        locate(HF_ID, configured=None, models_dir=tmp_path, allow_download=False)


@pytest.mark.usefixtures("hub_cache")
def test_the_error_for_a_missing_model_says_how_to_download_it(tmp_path: Path) -> None:
    """If downloads are not allowed, the message names the directories tried and the command."""
    with pytest.raises(JobError, match=r"neither at .* TTS_ALLOW_DOWNLOAD is off; .*download Qwen/") as caught:
        locate(HF_ID, configured=None, models_dir=tmp_path, allow_download=False)
    assert caught.value.code == "model_unavailable"
