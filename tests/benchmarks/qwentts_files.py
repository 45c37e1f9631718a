"""GGUF files of a checkpoint, as qwentts.cpp reads nothing else: `python -m tests.benchmarks.qwentts_files DIR q8_0`.

The names of tensors and fields are those that libqwen of realtimetts-qwen-native-cpu 0.4.2 looks up to speak with a
preset voice. The types are those of qwentts.cpp's program `quantize`: vectors, codebooks and their projections stay
float32, convolutions become float16. Its Q4_K_M has Q6_K for embeddings and Q4_K for all other matrices: its rule for
further Q6_K asks for names that no tensor has.
"""

import argparse
import ctypes
import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

QUANTIZATIONS: Final = {"q4_k_m": ("Q4_K", "Q6_K"), "q8_0": ("Q8_0", "Q8_0")}
"""The types of matrices and of embeddings."""

# Patterns in the names of a checkpoint's tensors, and what stands for them in a GGUF file.
_TALKER: Final = {
    r"^talker\.code_predictor\.(model\.)?": "code_pred.",
    r"^talker\.model\.": "talker.",
    r"^(talker|code_pred)\.norm": r"\1.output_norm",
    r"_embedding": "_embd",
    r"text_projection\.linear_": "text_proj.",
    r"small_to_mtp_projection": "mtp_proj",
}
_CODEC: Final = {
    r"^decoder\.decoder\.": "tok_dec.dec.",
    r"^decoder\.": "tok_dec.",
    r"pre_transformer": "pre_tfm",
    r"quantizer\.rvq_": "vq_",
    r"vq\.layers\.(\d+)\._codebook": r"\1",
    r"(upsample\.\d)\.\d": r"\1",
    r"block\.0": "snake",
    r"dec\.5": "dec.5.snake",
    r"block\.1\.conv": "conv_t",
    **{rf"block\.{number + 2}": f"res.{number}" for number in range(3)},
    r"(pre_conv|dwconv|conv1|conv2)\.conv": r"\1",
}
_LAYER: Final = {
    r"\.layers\.": ".blk.",
    r"input_layernorm": "attn_norm",
    r"post_attention_layernorm": "ffn_norm",
    r"self_attn\.o_proj": "attn_output",
    r"self_attn\.(q|k|v)(_proj)?": r"attn_\1",
    r"mlp\.(gate|up|down)_proj": r"ffn_\1",
    r"self_attn_layer_scale\.scale": "attn_scale",
    r"mlp_layer_scale\.scale": "ffn_scale",
}
_SIZES: Final = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_KINDS: Final = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
_USAGE_EPSILON: Final = 1e-5  # as in the official codec


def gguf_files(directory: Path, quantization: str) -> tuple[Path, Path]:
    """Where the talker and the codec of the checkpoint in `directory` are kept."""
    talker, codec = (directory.parent / f"{directory.name}.{part}.{quantization}.gguf" for part in ("talker", "codec"))
    return talker, codec


def write(directory: Path, quantization: str) -> None:
    """Write both files."""
    files, types, codec = (
        gguf_files(directory, quantization),
        QUANTIZATIONS[quantization],
        directory / "speech_tokenizer",
    )
    talker_tensors = ((_rename(name, _TALKER), values) for name, values in _tensors(directory))
    _write(files[0], "qwen3-tts", _talker_fields(directory), talker_tensors, types)
    _write(files[1], "qwen3-tts-tokenizer", _codec_fields(codec), _codec_tensors(codec), types)


def _talker_fields(directory: Path) -> Iterator[tuple[str, Any]]:
    config = _read(directory / "config.json")
    talker = config["talker_config"]
    for name in ("tokenizer_type", "tts_model_size", "tts_model_type"):
        yield f"qwen3-tts.{name.removeprefix('tts_')}", config[name]
    yield "qwen3-tts.num_code_groups", talker["num_code_groups"]
    for part, sizes in (("talker", talker), ("code_pred", talker["code_predictor_config"])):
        for field, name in _SIZES.items():
            yield f"qwen3-tts.{part}.{field}", sizes[name]
    yield "qwen3-tts.talker.rope.mrope_section", talker["rope_scaling"]["mrope_section"]
    for name in ("pad_id", "bos_id", "eos_token_id", "think_id", "nothink_id", "think_bos_id", "think_eos_id"):
        yield f"qwen3-tts.codec.{name.replace('_token', '')}", talker[f"codec_{name}"]
    for name in ("im_start", "im_end", "tts_pad", "tts_bos", "tts_eos"):
        yield f"qwen3-tts.text.{name}_id", config[f"{name}_token_id"]
    for part, ids in (("language", talker["codec_language_id"]), ("speaker", talker["spk_id"])):
        yield f"qwen3-tts.codec.{part}_names", list(ids)
        yield f"qwen3-tts.codec.{part}_ids", list(ids.values())
    yield "qwen3-tts.codec.speaker_dialects", [talker["spk_is_dialect"][name] or "" for name in talker["spk_id"]]
    for name, value in _read(directory / "generation_config.json").items():
        yield f"generation.{name.replace('dosample', 'do_sample')}", value
    tokens = {number: token for token, number in _read(directory / "vocab.json").items()}
    for number, token in _read(directory / "tokenizer_config.json")["added_tokens_decoder"].items():
        tokens[int(number)] = token["content"]
    yield "tokenizer.ggml.tokens", [tokens.get(number, f"[{number}]") for number in range(max(tokens) + 1)]
    merges = (directory / "merges.txt").read_text().splitlines()
    yield "tokenizer.ggml.merges", [line for line in merges if line and not line.startswith("#version")]


def _codec_fields(directory: Path) -> Iterator[tuple[str, Any]]:
    config = _read(directory / "config.json")["decoder_config"]
    hidden = config["codebook_dim"]
    config |= {"codebook_dim_internal": hidden // 2, "vector_quantization_hidden_dim": hidden}
    for name, value in ({"num_semantic_quantizers": 1} | config).items():
        yield f"qwen3-tts-tokenizer.decoder.{name}", value


def _codec_tensors(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The decoder's: the library reads those of the encoder when it gets a recording."""
    usage: dict[str, np.ndarray] = {}
    for original, values in _tensors(directory):
        name = _rename(original, _CODEC)
        codebook, _, field = name.rpartition(".")
        if original.startswith("encoder.") or (".vq_" in name and "input_proj" in name):
            continue
        if field == "cluster_usage":  # its name is before that of the sum
            usage[codebook] = np.maximum(values, _USAGE_EPSILON)[:, None]
        elif field == "embedding_sum":
            yield f"{codebook}.codebook", values / usage[codebook]
        else:
            yield name, values


def _read(file: Path) -> Any:
    return json.loads(file.read_text())


def _tensors(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """In the order of their names, as float32."""
    from safetensors import safe_open  # noqa: PLC0415 -- it loads torch, which who measures does not need

    with safe_open(directory / "model.safetensors", framework="pt") as file:  # numpy has no bfloat16
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name).float().numpy()


def _rename(name: str, patterns: dict[str, str]) -> str:
    for pattern, replacement in (patterns | _LAYER).items():
        name = re.sub(pattern, replacement, name)
    return name


def _write(
    file: Path,
    architecture: str,
    fields: Iterable[tuple[str, Any]],
    tensors: Iterable[tuple[str, np.ndarray]],
    types: tuple[str, str],
) -> None:
    gguf = importlib.import_module("gguf")
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, architecture)
    for name, value in fields:
        typed = float(value) if name.endswith(("rope_theta", "freq_base")) else value
        writer.add_key_value(name, typed, gguf.GGUFValueType[_KINDS[type(typed)]])
    quantize = _quantizer()
    for name, values in tensors:
        kind = gguf.GGMLQuantizationType[types["_embd" in name]]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, columns = values.size // values.shape[-1], values.shape[-1]
        if values.ndim == 1 or ".vq_" in name:
            writer.add_tensor(name, values)
        elif columns % block:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            packed = np.empty((*values.shape[:-1], columns // block * size), np.uint8)
            quantize(kind, values.ctypes.data, packed.ctypes.data, 0, rows, columns, None)
            writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(file)


def _quantizer() -> Any:
    """The function of ggml, from the wheel."""
    wheel = Path(str(importlib.import_module("qwentts_cpp_cpu").__file__)).parent
    quantize = ctypes.CDLL(str(wheel / "lib" / "libggml-base.so.0")).ggml_quantize_chunk
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    quantize.restype = ctypes.c_size_t
    return quantize


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.qwentts_files", description=__doc__)
    parser.add_argument("directory", type=Path, help="of a CustomVoice checkpoint")
    parser.add_argument("quantization", choices=tuple(QUANTIZATIONS))
    arguments = parser.parse_args()
    write(arguments.directory, arguments.quantization)


if __name__ == "__main__":
    main()
