"""The codec encoder: a recording to 16 codes a frame, with the module of the official package.

Only in-context cloning needs the encoder, so Codec loads it at its first use.
It always computes in float32: codes are argmins, and lower precision selects other codes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.json_files import unavailable
from gpu_worker.engines.qwen.checkpoint.official import load_official
from gpu_worker.engines.qwen.checkpoint.weights import SPEECH_TOKENIZER, load_codec_weights
from shared.pcm import FRAME_SAMPLES


class Encoder:
    """The encoder on one device."""

    def __init__(self, directory: Path, codebooks: int, device: torch.device) -> None:
        """Load the encoder of the checkpoint in `directory`. `codebooks`: how many of its codebooks are used (16).

        Raises:
            JobError: `model_unavailable`, naming the file at fault.
        """
        self.device = device
        self._codebooks = codebooks
        self._module = _load_module(directory).to(device)

    def tensors(self) -> Iterator[Tensor]:
        """All weights."""
        yield from (*self._module.parameters(), *self._module.buffers())

    @torch.inference_mode()
    def __call__(self, pcm: Tensor) -> Tensor:
        """The codes of a recording: pcm float32 [samples] at 24 kHz, on any device -> int64 [frames, 16]."""
        frames = -(-pcm.shape[0] // FRAME_SAMPLES)
        encoded = self._module.encode(pcm.to(self.device)[None, None], num_quantizers=self._codebooks, return_dict=True)
        codes: Tensor = encoded.audio_codes[0, : self._codebooks, :frames]
        return codes.t().contiguous()


def _load_module(directory: Path) -> Any:
    from transformers.modeling_utils import no_init_weights  # noqa: PLC0415 -- seconds to import

    official = load_official()
    path = directory / SPEECH_TOKENIZER / "config.json"
    try:
        config = official.TokenizerConfig(**msgspec.json.decode(path.read_bytes())).encoder_config
        with no_init_weights():
            module = official.TokenizerEncoder._from_config(config)  # noqa: SLF001 -- as the official tokenizer builds it
    except (OSError, msgspec.DecodeError, TypeError, ValueError) as error:
        raise unavailable(path, f"cannot be used: {error}") from error
    weights = load_codec_weights(directory, "encoder.", dtype=torch.float32)
    problems = module.load_state_dict({name.removeprefix("encoder."): w for name, w in weights.items()}, strict=False)
    if problems.missing_keys:
        raise unavailable(path.parent, f"its weights have no encoder.{problems.missing_keys[0]}")
    return module.eval()
