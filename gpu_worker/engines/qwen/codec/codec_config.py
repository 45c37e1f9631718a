"""speech_tokenizer/config.json: the fields that the codec reads. This module opens no files."""

import math
from typing import Literal

import msgspec

from shared.pcm import FRAME_SAMPLES


class DecoderShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of the decoder. `sliding_window`: the frames that a frame attends to, itself included."""

    codebook_size: int
    codebook_dim: int
    num_quantizers: int
    latent_dim: int
    decoder_dim: int
    hidden_size: int
    intermediate_size: int
    head_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    sliding_window: int
    rms_norm_eps: float
    rope_theta: float
    upsample_rates: tuple[int, ...]
    upsampling_ratios: tuple[int, ...]
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False

    def __post_init__(self) -> None:
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError("num_key_value_heads differs from num_attention_heads, which no 12 Hz codec does")
        samples = math.prod(self.upsample_rates + self.upsampling_ratios)
        if samples != FRAME_SAMPLES:
            raise ValueError(f"a frame is {samples} samples; only {FRAME_SAMPLES} are known")


class CodecConfig(msgspec.Struct, frozen=True, kw_only=True):
    """speech_tokenizer/config.json. The official package reads the part of the encoder with a class of its own."""

    decoder_config: DecoderShape
    encoder_valid_num_quantizers: int
    input_sample_rate: Literal[24000]
    output_sample_rate: Literal[24000]
    encode_downsample_rate: Literal[1920]
    decode_upsample_rate: Literal[1920]
