"""What config.json and generation_config.json of a Qwen3-TTS checkpoint say, as far as the engine asks.

Nothing is defaulted that the published files state: a missing field is a damaged checkpoint (msgspec.ValidationError).
It opens no files and knows nothing of weights.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[float, Meta(gt=0)]
ModelType = Literal["custom_voice", "voice_design", "base"]


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of one transformer stack; the talker's and the code predictor's differ in numbers only."""

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
    """The talker's sizes, control ids and names."""

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
        """How many values a codebook-0 id may have; the 1024 ids above are control ids and speakers."""
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
        """Languages a request may name, "auto" aside; dialects come with their speakers."""
        return [name for name in self.talker_config.codec_language_id if "dialect" not in name]

    @property
    def follows_instructions(self) -> bool:
        """The small models were not trained with instructions; the official package drops them silently."""
        return self.tts_model_size != "0b6"


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """generation_config.json, with the official package's defaults (`_merge_generate_kwargs`) for what it omits.

    The ranges are those of Transformers' processors; `top_k` 0 looks at every id.
    The code predictor samples from the same number of candidates in every row, so that one is at least 1.
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
