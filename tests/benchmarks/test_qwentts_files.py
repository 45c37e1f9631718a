"""The files for qwentts.cpp: names and values that its library looks up."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.benchmarks.qwentts_files import _CODEC, _TALKER, _codec_tensors, _rename, _talker_fields, gguf_files
from tests.checkpoints import CODEC_EOS, tiny


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("talker.model.layers.3.self_attn.o_proj.weight", "talker.blk.3.attn_output.weight"),
        ("talker.model.layers.3.self_attn.q_norm.weight", "talker.blk.3.attn_q_norm.weight"),
        ("talker.model.text_embedding.weight", "talker.text_embd.weight"),
        ("talker.text_projection.linear_fc1.bias", "talker.text_proj.fc1.bias"),
        ("talker.model.norm.weight", "talker.output_norm.weight"),
        ("talker.code_predictor.model.norm.weight", "code_pred.output_norm.weight"),
        ("talker.code_predictor.model.codec_embedding.14.weight", "code_pred.codec_embd.14.weight"),
        ("talker.code_predictor.lm_head.0.weight", "code_pred.lm_head.0.weight"),
    ],
)
def test_names_of_the_talker(name: str, expected: str) -> None:
    """Those of the code predictor, which is a part of the talker's checkpoint, too."""
    assert _rename(name, _TALKER) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder.pre_conv.conv.weight", "tok_dec.pre_conv.weight"),
        ("decoder.pre_transformer.norm.weight", "tok_dec.pre_tfm.norm.weight"),
        ("decoder.pre_transformer.layers.7.mlp_layer_scale.scale", "tok_dec.pre_tfm.blk.7.ffn_scale"),
        ("decoder.upsample.1.0.conv.bias", "tok_dec.upsample.1.conv.bias"),
        ("decoder.upsample.1.1.dwconv.conv.bias", "tok_dec.upsample.1.dwconv.bias"),
        ("decoder.upsample.1.1.gamma", "tok_dec.upsample.1.gamma"),
        ("decoder.decoder.0.conv.weight", "tok_dec.dec.0.conv.weight"),
        ("decoder.decoder.4.block.0.beta", "tok_dec.dec.4.snake.beta"),
        ("decoder.decoder.4.block.1.conv.weight", "tok_dec.dec.4.conv_t.weight"),
        ("decoder.decoder.4.block.2.act1.alpha", "tok_dec.dec.4.res.0.act1.alpha"),
        ("decoder.decoder.4.block.4.conv2.conv.weight", "tok_dec.dec.4.res.2.conv2.weight"),
        ("decoder.decoder.5.alpha", "tok_dec.dec.5.snake.alpha"),
    ],
)
def test_names_of_the_codec(name: str, expected: str) -> None:
    """The position of a module in its list becomes a name."""
    assert _rename(name, _CODEC) == expected


def test_codebooks_are_divided_by_their_usage() -> None:
    """The library reads the vectors themselves, of the decoder alone."""
    directory = tiny("custom_voice") / "speech_tokenizer"
    found = dict(_codec_tensors(directory))
    assert {name.split(".")[0] for name in found} == {"tok_dec"}
    prefix = "decoder.quantizer.rvq_rest.vq.layers.14._codebook."
    weights = load_file(directory / "model.safetensors")
    expected = weights[f"{prefix}embedding_sum"] / weights[f"{prefix}cluster_usage"].clip(1e-5)[:, None]
    np.testing.assert_array_equal(found["tok_dec.vq_rest.14.codebook"], expected)
    assert sum(name.endswith(".codebook") for name in found) == 16


def test_the_text_tokenizer_has_every_number() -> None:
    """A token stands at its number; the library takes the list's length for the size of the vocabulary."""
    fields = dict(_talker_fields(tiny("custom_voice")))
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[fields["qwen3-tts.text.im_start_id"]] == "<|im_start|>"
    assert len(set(tokens)) == len(tokens)
    assert fields["qwen3-tts.codec.eos_id"] == CODEC_EOS
    assert len(fields["qwen3-tts.codec.speaker_names"]) == len(fields["qwen3-tts.codec.speaker_dialects"])


def test_files_stand_beside_the_checkpoint() -> None:
    """One a part and quantization, so that a benchmark finds them again."""
    assert gguf_files(Path("checkpoints/0.6B-CustomVoice"), "q8_0") == (
        Path("checkpoints/0.6B-CustomVoice.talker.q8_0.gguf"),
        Path("checkpoints/0.6B-CustomVoice.codec.q8_0.gguf"),
    )
