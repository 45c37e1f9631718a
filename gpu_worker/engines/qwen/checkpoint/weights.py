"""The tensors of one checkpoint: those of the model, and those of its speech tokenizer.

tensor_files.py reads the files; this module knows in which file of a checkpoint a tensor is.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gpu_worker.engines.qwen.checkpoint.json_files import unavailable
from gpu_worker.engines.qwen.checkpoint.tensor_files import (
    LazyTensors,
    find_tensor_files,
    fingerprint,
    load_tensors,
    open_tensors,
)

if TYPE_CHECKING:  # importing torch takes seconds, and looking for a checkpoint must not
    import torch
    from torch import Tensor

SPEECH_TOKENIZER: Final = "speech_tokenizer"
"""The directory of the speech tokenizer within a checkpoint."""


def load_weights(
    directory: Path, prefix: str, *, dtype: "torch.dtype | None", device: "torch.device | str" = "cpu"
) -> "dict[str, Tensor]":
    """The model's tensors whose names begin with `prefix` ("talker.", "speaker_encoder."), under their full names.

    Floating-point tensors are converted to `dtype`; None keeps the dtype of the file. All tensors are on `device`.

    Raises:
        JobError: `model_unavailable`, naming a file that is missing or cannot be read.
    """
    return load_tensors(find_tensor_files(directory), prefix, dtype=dtype, device=device)


def open_weights(
    directory: Path, prefix: str, *, dtype: "torch.dtype | None", device: "torch.device | str" = "cpu"
) -> contextlib.AbstractContextManager[LazyTensors]:
    """As `load_weights`, but a tensor is read when it is looked up.

    So the weights as stored and the weights as computed with are never both whole in memory.
    """
    return open_tensors(find_tensor_files(directory), prefix, dtype=dtype, device=device)


def load_codec_weights(
    directory: Path, prefix: str, *, dtype: "torch.dtype | None", device: "torch.device | str" = "cpu"
) -> "dict[str, Tensor]":
    """As `load_weights`, from the speech tokenizer of the checkpoint ("decoder.", "encoder.")."""
    return load_tensors(find_tensor_files(directory / SPEECH_TOKENIZER), prefix, dtype=dtype, device=device)


def open_codec_weights(
    directory: Path, prefix: str, *, dtype: "torch.dtype | None", device: "torch.device | str" = "cpu"
) -> contextlib.AbstractContextManager[LazyTensors]:
    """As `load_codec_weights`, but a tensor is read when it is looked up."""
    return open_tensors(find_tensor_files(directory / SPEECH_TOKENIZER), prefix, dtype=dtype, device=device)


def codec_fingerprint(directory: Path) -> bytes:
    """Bytes that are equal for two checkpoints with the same speech tokenizer. Raises as `load_weights` does."""
    codec = directory / SPEECH_TOKENIZER
    path = codec / "config.json"
    try:
        return path.read_bytes() + fingerprint(find_tensor_files(codec))
    except OSError as error:
        raise unavailable(path, f"cannot be read: {error.strerror}") from error
