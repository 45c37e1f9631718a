"""Whether a directory holds a whole Qwen3-TTS checkpoint that the engine can load.

A checkpoint is a directory in the published layout:
config.json, generation_config.json, the text tokenizer's files, model.safetensors (or shards with an index),
and speech_tokenizer/ with the codec's config.json and model.safetensors.
This module reads JSON and headers only. It needs neither weights in memory, nor torch, nor the official package.
"""

from pathlib import Path

from gpu_worker.engines.qwen.checkpoint.json_files import require_model_type, unavailable
from gpu_worker.engines.qwen.checkpoint.model_config import (
    TOKENIZER_TYPE,
    GenerationConfig,
    ModelConfig,
    Shape,
    read_config,
    read_generation_config,
)
from gpu_worker.engines.qwen.checkpoint.tensor_files import find_tensor_files, read_headers, require_tensors
from gpu_worker.engines.qwen.checkpoint.weights import SPEECH_TOKENIZER


def verify(directory: Path) -> None:
    """Check that `directory` holds a whole Qwen3-TTS checkpoint. Takes milliseconds: no weights are read.

    Raises:
        JobError: `model_unavailable`, naming the file that is missing, damaged, cut short or of another model.
    """
    if not directory.is_dir():
        raise unavailable(directory, "is not a directory")
    config = read_config(directory)
    _require_sampling(directory / "generation_config.json", read_generation_config(directory), config)
    _require_files(directory, ["tokenizer_config.json"])
    if not (directory / "tokenizer.json").is_file():
        _require_files(directory, ["vocab.json", "merges.txt"])
    files = find_tensor_files(directory)
    require_tensors(read_headers(files), _expected_shapes(config), files[0])

    codec = directory / SPEECH_TOKENIZER
    require_model_type(codec / "config.json", TOKENIZER_TYPE)
    files = find_tensor_files(codec)
    names = read_headers(files)
    for part in ("encoder.", "decoder."):
        if not any(name.startswith(part) for name in names):
            raise unavailable(files[0], f"has no tensors {part}*")


def _require_sampling(path: Path, generation: GenerationConfig, config: ModelConfig) -> None:
    """The code predictor is captured with one kind of sampling: top_p 1, and top_k within the codebook."""
    codes = config.talker_config.code_predictor_config.vocab_size
    if generation.subtalker_top_k > codes:
        raise unavailable(path, f"wants subtalker_top_k {generation.subtalker_top_k}; there are {codes} codes")
    if generation.subtalker_top_p != 1:
        raise unavailable(path, f"wants subtalker_top_p {generation.subtalker_top_p}; only 1 is supported")


def _require_files(directory: Path, names: list[str]) -> None:
    for name in names:
        path = directory / name
        if not path.is_file() or path.stat().st_size == 0:
            raise unavailable(path, "missing")


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the engine reads, by name, as config.json implies it; -1 is any size."""
    talker = config.talker_config
    predictor = talker.code_predictor_config
    text = talker.text_hidden_size
    expected: dict[str, tuple[int, ...]] = {
        "talker.model.text_embedding.weight": (-1, text),
        "talker.model.codec_embedding.weight": (talker.vocab_size, talker.hidden_size),
        "talker.codec_head.weight": (talker.vocab_size, talker.hidden_size),
        "talker.text_projection.linear_fc1.weight": (text, text),
        "talker.text_projection.linear_fc1.bias": (text,),
        "talker.text_projection.linear_fc2.weight": (talker.hidden_size, text),
        "talker.text_projection.linear_fc2.bias": (talker.hidden_size,),
        **_transformer_shapes("talker.model.", talker),
        **_transformer_shapes("talker.code_predictor.model.", predictor),
    }
    for index in range(predictor.num_code_groups - 1):
        embedding = (predictor.vocab_size, talker.hidden_size)
        expected[f"talker.code_predictor.model.codec_embedding.{index}.weight"] = embedding
        expected[f"talker.code_predictor.lm_head.{index}.weight"] = (predictor.vocab_size, predictor.hidden_size)
    if talker.hidden_size != predictor.hidden_size:
        projection = "talker.code_predictor.small_to_mtp_projection"
        expected[f"{projection}.weight"] = (predictor.hidden_size, talker.hidden_size)
        expected[f"{projection}.bias"] = (predictor.hidden_size,)
    if config.tts_model_type == "base":
        expected["speaker_encoder.fc.weight"] = (talker.hidden_size, -1, 1)
    return expected


def _transformer_shapes(prefix: str, shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    queries, keys = (heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads))
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (shape.head_dim,),
        "self_attn.k_norm": (shape.head_dim,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    expected: dict[str, tuple[int, ...]] = {f"{prefix}norm.weight": (hidden,)}
    for index in range(shape.num_hidden_layers):
        expected |= {f"{prefix}layers.{index}.{name}.weight": size for name, size in layer.items()}
    return expected
