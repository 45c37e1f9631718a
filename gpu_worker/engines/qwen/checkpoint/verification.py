"""Where a model's checkpoint lies, whether it is whole and ours, and what its configuration says.

A checkpoint is a directory in the published layout:
config.json, generation_config.json, the text tokenizer's files, model.safetensors (or shards with an index),
and speech_tokenizer/ with the codec's config.json and model.safetensors.
It loads no weights itself (see weights.py) and needs neither transformers nor the official package.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.config import GenerationConfig, ModelConfig, Shape
from gpu_worker.engines.qwen.checkpoint.safetensors import (
    Stored,
    fingerprint,
    load_tensors,
    open_tensors,
    read_headers,
    require,
    tensor_files,
    unavailable,
)

if TYPE_CHECKING:  # finding a checkpoint must not cost the seconds that importing torch takes
    import torch
    from torch import Tensor

SPEECH_TOKENIZER: Final = "speech_tokenizer"
"""The directory of the codec within a checkpoint."""

_TOKENIZER_TYPE: Final = "qwen3_tts_tokenizer_12hz"


def locate(
    hf_id: str,
    *,
    configured: Path | None,
    models_dir: Path,
    allow_download: bool,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """The verified directory of a model's checkpoint.

    Looks at the configured path alone, if there is one;
    else at `models_dir/<Hugging Face basename>`, then in the Hugging Face cache,
    and fetches the model into the former when that is allowed.
    `progress` hears how far a download has come.
    A damaged directory is an error and never passed over for the next place, unless a download may repair it.

    Raises:
        JobError: `model_unavailable`, naming the file at fault or the places looked at.
    """
    if configured is not None:
        verify(configured)
        return configured
    ours = models_dir / hf_id.rpartition("/")[2]
    place = ours if ours.is_dir() else _cached(hf_id)
    if place is not None:
        try:
            verify(place)
        except JobError:
            if not allow_download:
                raise
        else:
            return place
    elif not allow_download:
        raise JobError(
            "model_unavailable",
            f"{hf_id} is neither at {ours} nor in the Hugging Face cache, and TTS_ALLOW_DOWNLOAD is off; "
            f"fetch it with `python -m gpu_worker download {hf_id}`",
        )
    from gpu_worker.engines.qwen.checkpoint.download import fetch  # noqa: PLC0415 -- the hub's client is needed only here

    fetch(hf_id, ours, progress=progress)
    verify(ours)
    return ours


def read_config(directory: Path) -> ModelConfig:
    """config.json of a Qwen3-TTS checkpoint.

    Raises:
        JobError: `model_unavailable`, when the file is missing, damaged, or describes something else.
    """
    path = directory / "config.json"
    _require_type(path, "qwen3_tts")
    config = _decode(path, ModelConfig)
    identity = _decode(path, _Identity)
    if identity.tokenizer_type != _TOKENIZER_TYPE:
        raise unavailable(
            path, f"wants speech tokenizer {identity.tokenizer_type!r}; only {_TOKENIZER_TYPE!r} is known"
        )
    rope = identity.talker_config.rope_scaling
    if rope is not None and rope.rope_type != "default":
        raise unavailable(path, f"wants rope_type {rope.rope_type!r}; only 'default' is known")
    return config


def read_generation_config(directory: Path) -> GenerationConfig:
    """generation_config.json, the checkpoint's own sampling parameters. Raises as `read_config` does."""
    return _decode(directory / "generation_config.json", GenerationConfig)


def verify(directory: Path) -> None:
    """Check that `directory` holds a whole Qwen3-TTS checkpoint, without loading its weights (milliseconds).

    Raises:
        JobError: `model_unavailable`, naming the file that is missing, damaged, cut short or foreign.
    """
    if not directory.is_dir():
        raise unavailable(directory, "is not a directory")
    config = read_config(directory)
    _require_sampling(directory / "generation_config.json", read_generation_config(directory), config)
    _require_files(directory, ["tokenizer_config.json"])
    if not (directory / "tokenizer.json").is_file():
        _require_files(directory, ["vocab.json", "merges.txt"])
    files = tensor_files(directory)
    require(read_headers(files), _expected_tensors(config), files[0])

    codec = directory / SPEECH_TOKENIZER
    _require_type(codec / "config.json", _TOKENIZER_TYPE)
    files = tensor_files(codec)
    names = read_headers(files)
    for part in ("encoder.", "decoder."):
        if not any(name.startswith(part) for name in names):
            raise unavailable(files[0], f"has no tensors {part}*")


def load_weights(
    directory: Path, prefix: str, *, dtype: "torch.dtype | None", device: "torch.device | str" = "cpu"
) -> "dict[str, Tensor]":
    """Tensors of the model itself whose names begin with `prefix` ("talker.", "speaker_encoder."), full names kept.

    Floating-point tensors come in `dtype` (None keeps the file's), on `device`.

    Raises:
        JobError: `model_unavailable`, naming a file that is missing or cannot be read.
    """
    return load_tensors(tensor_files(directory), prefix, dtype=dtype, device=device)


def open_weights(
    directory: Path, prefix: str, *, dtype: "torch.dtype | None", device: "torch.device | str" = "cpu"
) -> contextlib.AbstractContextManager[Stored]:
    """As `load_weights`, to be read one by one: what becomes of a model never shares the RAM with all it is made of."""
    return open_tensors(tensor_files(directory), prefix, dtype=dtype, device=device)


def load_codec_weights(
    directory: Path, prefix: str, *, dtype: "torch.dtype | None", device: "torch.device | str" = "cpu"
) -> "dict[str, Tensor]":
    """As `load_weights`, of the speech tokenizer ("decoder.", "encoder.")."""
    return load_tensors(tensor_files(directory / SPEECH_TOKENIZER), prefix, dtype=dtype, device=device)


def codec_fingerprint(directory: Path) -> bytes:
    """Equal for checkpoints that bring the same speech tokenizer. Raises as `load_weights` does."""
    codec = directory / SPEECH_TOKENIZER
    path = codec / "config.json"
    try:
        return path.read_bytes() + fingerprint(tensor_files(codec))
    except OSError as error:
        raise unavailable(path, f"cannot be read: {error.strerror}") from error


_T = TypeVar("_T")


class _Typed(msgspec.Struct, frozen=True):
    model_type: str


class _RopeScaling(msgspec.Struct, frozen=True):
    rope_type: str = "default"


class _Talker(msgspec.Struct, frozen=True):
    rope_scaling: _RopeScaling | None = None


class _Identity(msgspec.Struct, frozen=True):
    tokenizer_type: str
    talker_config: _Talker


def _decode(path: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError as error:
        raise unavailable(path, "missing") from error
    except OSError as error:
        raise unavailable(path, f"cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise unavailable(path, f"is damaged: {error}") from error


def _require_type(path: Path, model_type: str) -> None:
    found = _decode(path, _Typed).model_type
    if found != model_type:
        raise unavailable(path, f"describes a {found!r} model, not {model_type!r}")


def _require_sampling(path: Path, generation: GenerationConfig, config: ModelConfig) -> None:
    """The code predictor's sampling must be of the kind that its one graph does."""
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


def _cached(hf_id: str) -> Path | None:
    """The newest snapshot of the Hugging Face cache, whole or not; None if there is none."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 -- half a second to import
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415 -- as above

    try:
        return Path(snapshot_download(hf_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything that the engine reads, by what config.json says; -1 is any size."""
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
        **_stack("talker.model.", talker),
        **_stack("talker.code_predictor.model.", predictor),
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


def _stack(prefix: str, shape: Shape) -> dict[str, tuple[int, ...]]:
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
