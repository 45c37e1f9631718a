"""Checkpoints: found in the documented order, and damage named before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.verification import (
    load_codec_weights,
    load_weights,
    locate,
    read_config,
    read_generation_config,
    verify,
)
from tests.checkpoints import CODEC_EOS, SPEAKERS, Kind, Size, tiny

HF_ID = "Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice"
BASENAME = "Qwen3-TTS-12Hz-0.6B-CustomVoice"


def copy_of(source: Path, target: Path) -> Path:
    """A writable copy whose large files are hard links; replace a file instead of writing into it."""
    return shutil.copytree(source, target, copy_function=lambda a, b: Path(b).hardlink_to(a))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the small CustomVoice checkpoint, to be damaged."""
    return copy_of(tiny("custom_voice"), tmp_path / "checkpoint")


@pytest.mark.parametrize(("kind", "size"), [("custom_voice", "0b6"), ("voice_design", "1b7"), ("base", "1b7")])
def test_whole_checkpoints_of_each_type_pass(kind: Kind, size: Size) -> None:
    """The published layout verifies, and config.json says what it is."""
    verify(tiny(kind, size))

    config = read_config(tiny(kind, size))
    assert (config.tts_model_type, config.tts_model_size) == (kind, size)
    assert config.talker_config.codec_eos_token_id == CODEC_EOS
    assert config.talker_config.spk_id == (SPEAKERS if kind == "custom_voice" else {})
    assert read_generation_config(tiny(kind, size)).repetition_penalty == 1.05


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "model.safetensors",
        "speech_tokenizer/config.json",
        "speech_tokenizer/model.safetensors",
    ],
)
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    """Every file that loading needs is missed by its name."""
    (checkpoint / name).unlink()

    with pytest.raises(JobError, match=f"{name}: missing") as caught:
        verify(checkpoint)
    assert caught.value.code == "model_unavailable"


@pytest.mark.parametrize("name", ["model.safetensors", "speech_tokenizer/model.safetensors"])
def test_a_file_cut_short_is_named(checkpoint: Path, name: str) -> None:
    """An interrupted copy is noticed by its length."""
    raw = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    (checkpoint / name).write_bytes(raw[:-4096])

    with pytest.raises(JobError, match=rf"{name}: has \d+ bytes where its header says \d+"):
        verify(checkpoint)


def changed(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Rewrite a JSON file after `change` has altered its contents."""
    content = json.loads(path.read_text())
    change(content)
    path.unlink()
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda c: c.update(model_type="qwen3"), "describes a 'qwen3' model, not 'qwen3_tts'"),
        ("config.json", lambda c: c.update(tokenizer_type="qwen3_tts_tokenizer_25hz"), "wants speech tokenizer"),
        ("config.json", lambda c: c.update(tts_model_type="song"), "tts_model_type"),
        ("config.json", lambda c: c["talker_config"].pop("rope_theta"), "rope_theta"),
        (
            "config.json",
            lambda c: c["talker_config"]["rope_scaling"].update(rope_type="yarn"),
            "wants rope_type 'yarn'",
        ),
        ("config.json", lambda c: c["talker_config"].update(attention_bias=True), "attention_bias"),
        ("generation_config.json", lambda c: c.update(top_k="many"), "top_k"),
        ("generation_config.json", lambda c: c.update(top_k=-5), "top_k"),
        ("generation_config.json", lambda c: c.update(top_p=0), "top_p"),
        ("generation_config.json", lambda c: c.update(temperature=0), "temperature"),
        ("generation_config.json", lambda c: c.update(repetition_penalty=-1), "repetition_penalty"),
        ("generation_config.json", lambda c: c.update(max_new_tokens=0), "max_new_tokens"),
        ("generation_config.json", lambda c: c.update(subtalker_top_k=0), "subtalker_top_k"),
        (
            "generation_config.json",
            lambda c: c.update(subtalker_top_k=4096),
            "wants subtalker_top_k 4096; there are 2048",
        ),
        ("generation_config.json", lambda c: c.update(subtalker_top_p=0.9), "wants subtalker_top_p 0.9; only 1"),
        ("generation_config.json", lambda c: c.update(subtalker_temperature=0), "subtalker_temperature"),
        ("speech_tokenizer/config.json", lambda c: c.update(model_type="mimi"), "describes a 'mimi' model"),
    ],
)
def test_foreign_and_damaged_configurations_are_named(
    checkpoint: Path, name: str, change: Callable[[dict[str, object]], object], message: str
) -> None:
    """What describes another model, or leaves out what must not be defaulted, is refused with the field."""
    changed(checkpoint / name, change)

    with pytest.raises(JobError, match=rf"{name}: .*{message}"):
        verify(checkpoint)


def test_weights_of_another_size_are_refused(checkpoint: Path) -> None:
    """Tensors that do not fit config.json are named, with both shapes."""
    changed(checkpoint / "config.json", lambda c: c["talker_config"].update(hidden_size=128))  # type: ignore[attr-defined] # JSON

    with pytest.raises(JobError, match=r"model\.safetensors: talker\..* is \[.*\], but config\.json makes it \[.*128"):
        verify(checkpoint)


def test_weights_without_a_speaker_encoder_are_no_base_model(checkpoint: Path) -> None:
    """A Base config over CustomVoice weights is refused."""
    changed(checkpoint / "config.json", lambda c: c.update(tts_model_type="base"))

    with pytest.raises(JobError, match=r"has no tensor speaker_encoder\.fc\.weight"):
        verify(checkpoint)


def test_the_configured_path_comes_first_and_alone(tmp_path: Path) -> None:
    """A configured path is used, or is the error, whatever else there is."""
    models = tmp_path / "models"
    copy_of(tiny("custom_voice"), models / BASENAME)

    there = locate(HF_ID, configured=tiny("custom_voice"), models_dir=models, allow_download=True)
    assert there == tiny("custom_voice")
    with pytest.raises(JobError, match="elsewhere: is not a directory"):
        locate(HF_ID, configured=tmp_path / "elsewhere", models_dir=models, allow_download=True)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache. Looking into it asks no hub."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def test_the_models_directory_comes_before_the_hub_cache(hub_cache: Path, tmp_path: Path) -> None:
    """models_dir/<basename> wins; without it the cache's snapshot is used."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--Qwen--Qwen3-TTS-12Hz-0.6B-CustomVoice"
    snapshot = copy_of(tiny("custom_voice"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    models = tmp_path / "models"

    assert locate(HF_ID, configured=None, models_dir=models, allow_download=False) == snapshot
    ours = copy_of(tiny("custom_voice"), models / BASENAME)
    assert locate(HF_ID, configured=None, models_dir=models, allow_download=False) == ours


@pytest.mark.usefixtures("hub_cache")
def test_a_damaged_directory_is_not_passed_over(tmp_path: Path) -> None:
    """What lies in models_dir is used or named; it is never silently replaced by another place."""
    ours = copy_of(tiny("custom_voice"), tmp_path / BASENAME)
    (ours / "merges.txt").unlink()

    with pytest.raises(JobError, match=r"merges\.txt: missing"):
        locate(HF_ID, configured=None, models_dir=tmp_path, allow_download=False)
    with pytest.raises(JobError, match="out of reach"):
        locate(HF_ID, configured=None, models_dir=tmp_path, allow_download=True)


@pytest.mark.usefixtures("hub_cache")
def test_an_absent_model_says_how_to_get_it(tmp_path: Path) -> None:
    """Without permission to download, the message names the places and the command."""
    with pytest.raises(JobError, match=r"neither at .* TTS_ALLOW_DOWNLOAD is off; .*download Qwen/") as caught:
        locate(HF_ID, configured=None, models_dir=tmp_path, allow_download=False)
    assert caught.value.code == "model_unavailable"


def test_weights_are_loaded_by_prefix() -> None:
    """The model's and the codec's tensors come under their full names, in the dtype asked for."""
    speaker = load_weights(tiny("base"), "speaker_encoder.", dtype=torch.float16)
    codec = load_codec_weights(tiny("base"), "decoder.", dtype=None)

    assert speaker
    assert all(name.startswith("speaker_encoder.") and w.dtype is torch.float16 for name, w in speaker.items())
    assert codec["decoder.pre_conv.conv.bias"].dtype is torch.float32
