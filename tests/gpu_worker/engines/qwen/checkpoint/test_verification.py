"""Verification of a checkpoint: every damage is named before anything is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.model_config import read_config, read_generation_config
from gpu_worker.engines.qwen.checkpoint.verification import verify
from tests.checkpoints import CODEC_EOS, SPEAKERS, Kind, Size, hard_linked_copy, tiny


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the small CustomVoice checkpoint that a test may damage."""
    return hard_linked_copy(tiny("custom_voice"), tmp_path / "checkpoint")


@pytest.mark.parametrize(("kind", "size"), [("custom_voice", "0b6"), ("voice_design", "1b7"), ("base", "1b7")])
def test_whole_checkpoints_of_each_type_pass(kind: Kind, size: Size) -> None:
    """A checkpoint of the published layout passes, and its configurations are read."""
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
    """The error names each file that loading needs."""
    (checkpoint / name).unlink()

    with pytest.raises(JobError, match=f"{name}: missing") as caught:
        verify(checkpoint)
    assert caught.value.code == "model_unavailable"


@pytest.mark.parametrize("name", ["model.safetensors", "speech_tokenizer/model.safetensors"])
def test_a_file_cut_short_is_named(checkpoint: Path, name: str) -> None:
    """The length of the file shows that a copy was interrupted."""
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
    """The error names the field that is missing or does not describe a supported model."""
    changed(checkpoint / name, change)

    with pytest.raises(JobError, match=rf"{name}: .*{message}"):
        verify(checkpoint)


def test_weights_of_another_size_are_refused(checkpoint: Path) -> None:
    """The error names the tensor that does not fit config.json, and both shapes."""
    changed(checkpoint / "config.json", lambda c: c["talker_config"].update(hidden_size=128))  # type: ignore[attr-defined] # JSON

    with pytest.raises(JobError, match=r"model\.safetensors: talker\..* is \[.*\], but config\.json makes it \[.*128"):
        verify(checkpoint)


def test_a_base_model_without_a_speaker_encoder_is_refused(checkpoint: Path) -> None:
    """CustomVoice weights with the config of a Base model do not pass."""
    changed(checkpoint / "config.json", lambda c: c.update(tts_model_type="base"))

    with pytest.raises(JobError, match=r"has no tensor speaker_encoder\.fc\.weight"):
        verify(checkpoint)
