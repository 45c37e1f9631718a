"""The speaker encoder: speaker embeddings (x-vectors) of recordings, computed by the official modules.

Owns the encoder's weights. Only Base checkpoints have one. It caches nothing and knows neither jobs nor voices.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.json_files import unavailable
from gpu_worker.engines.qwen.checkpoint.official import load_official
from gpu_worker.engines.qwen.checkpoint.weights import load_weights


class SpeakerEncoder:
    """The speaker encoder of one Base checkpoint, on one device."""

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        """Load the encoder of the checkpoint in `directory`.

        Raises:
            JobError: `model_unavailable`, naming the file at fault.
        """
        official = load_official()
        path = directory / "config.json"
        try:
            config = msgspec.json.decode(path.read_bytes(), type=_Config)
            module = official.SpeakerEncoder(official.SpeakerEncoderConfig(**config.speaker_encoder_config))
        except (OSError, msgspec.DecodeError, TypeError, ValueError) as error:
            raise unavailable(path, f"its speaker_encoder_config cannot be used: {error}") from error
        weights = load_weights(directory, "speaker_encoder.", dtype=dtype)
        try:
            module.load_state_dict({name.removeprefix("speaker_encoder."): w for name, w in weights.items()})
        except RuntimeError as error:
            raise unavailable(directory, f"its speaker encoder does not fit config.json: {error}") from error
        self.device = device
        self.dtype = dtype
        self._module = module.eval().to(device=device, dtype=dtype)
        self._mel = official.mel_spectrogram

    def tensors(self) -> Iterator[Tensor]:
        """Its weights."""
        yield from self._module.parameters()

    @torch.inference_mode()
    def __call__(self, pcm: Tensor) -> Tensor:
        """`pcm`: float32 [samples] at 24 kHz mono, on the CPU, at least 385 samples -> [talker hidden], in `dtype`.

        The mel spectrogram's parameters are those of the official `extract_speaker_embedding`.
        """
        mel = self._mel(
            pcm[None], n_fft=1024, num_mels=128, sampling_rate=24_000, hop_size=256, win_size=1024, fmin=0, fmax=12_000
        )
        embedding: Tensor = self._module(mel.transpose(1, 2).to(self.device).to(self.dtype))[0]
        return embedding


class _Config(msgspec.Struct, frozen=True):
    speaker_encoder_config: dict[str, Any]
