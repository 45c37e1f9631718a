"""config.json and generation_config.json of a Qwen3-TTS checkpoint: the fields that the engine reads.

A field that all published files state has no default here: a file without the field is damaged.
This module knows nothing of weights.
"""

from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from gpu_worker.engines.qwen.checkpoint.json_files import read_json, require_model_type, unavailable

TOKENIZER_TYPE: Final = "qwen3_tts_tokenizer_12hz"
"""The only speech tokenizer that the engine can decode."""

Positive = Annotated[float, Meta(gt=0)]
ModelType = Literal["custom_voice", "voice_design", "base"]


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of one transformer: of the talker, or of the code predictor."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_code_groups: int
    rms_norm_eps: float
    rope_theta: float
    hidden_act: Literal["silu"] = "silu"
    use_sliding_window: Literal[False] = False
    attention_bias: Literal[False] = False


class TalkerShape(Shape, frozen=True, kw_only=True):
    """Sizes of the talker, its control ids, and the ids of its languages and speakers."""

    code_predictor_config: Shape
    text_hidden_size: int
    codec_eos_token_id: int
    codec_think_id: int
    codec_nothink_id: int
    codec_think_bos_id: int
    codec_think_eos_id: int
    codec_pad_id: int
    codec_bos_id: int
    codec_language_id: dict[str, int]
    spk_id: dict[str, int] = {}
    spk_is_dialect: dict[str, str | bool] = {}

    @property
    def codes(self) -> int:
        """Number of codes of codebook 0. The 1024 ids above them are control ids and speakers."""
        return self.vocab_size - 1024


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """config.json."""

    tts_model_type: ModelType
    tts_model_size: str
    tts_bos_token_id: int
    tts_eos_token_id: int
    tts_pad_token_id: int
    talker_config: TalkerShape

    @property
    def languages(self) -> list[str]:
        """Languages that a request may name besides "auto". A dialect is not one: it belongs to its speakers."""
        return [name for name in self.talker_config.codec_language_id if "dialect" not in name]

    @property
    def follows_instructions(self) -> bool:
        """False for the 0.6B models: they were trained without instructions, and the official package drops them."""
        return self.tts_model_size != "0b6"


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """generation_config.json: the sampling parameters of the checkpoint.

    The defaults are those of the official package (`_merge_generate_kwargs`),
    the ranges those of the logits processors of Transformers. `top_k` 0 means all ids.
    `subtalker_*` are the parameters of the code predictor. Its `top_k` is at least 1,
    because it samples from the same number of candidates in every row of a batch.
    """

    do_sample: bool = True
    top_k: Annotated[int, Meta(ge=0)] = 50
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    temperature: Positive = 0.9
    repetition_penalty: Positive = 1.05
    subtalker_dosample: bool = True
    subtalker_top_k: Annotated[int, Meta(ge=1)] = 50
    subtalker_top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    subtalker_temperature: Positive = 0.9
    max_new_tokens: Annotated[int, Meta(ge=1)] = 2048


class _RopeScaling(msgspec.Struct, frozen=True):
    rope_type: str = "default"


class _Talker(msgspec.Struct, frozen=True):
    rope_scaling: _RopeScaling | None = None


class _Identity(msgspec.Struct, frozen=True):
    tokenizer_type: str
    talker_config: _Talker


def read_config(directory: Path) -> ModelConfig:
    """config.json of the checkpoint in `directory`.

    Raises:
        JobError: `model_unavailable`: the file is missing, damaged, or describes a model that the engine cannot run.
    """
    path = directory / "config.json"
    require_model_type(path, "qwen3_tts")
    config = read_json(path, ModelConfig)
    identity = read_json(path, _Identity)
    if identity.tokenizer_type != TOKENIZER_TYPE:
        raise unavailable(path, f"wants speech tokenizer {identity.tokenizer_type!r}; only {TOKENIZER_TYPE!r} is known")
    rope = identity.talker_config.rope_scaling
    if rope is not None and rope.rope_type != "default":
        raise unavailable(path, f"wants rope_type {rope.rope_type!r}; only 'default' is known")
    return config


def read_generation_config(directory: Path) -> GenerationConfig:
    """generation_config.json of the checkpoint in `directory`. Raises as `read_config` does."""
    return read_json(directory / "generation_config.json", GenerationConfig)
