"""The codec: decoder and encoder of a checkpoint's speech tokenizer, loaded once for all models.

Codec owns the weights. The streams are in a DecoderState, which each engine makes for its slots.
It schedules nothing, and knows neither jobs nor sample formats.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.json_files import read_json, unavailable
from gpu_worker.engines.qwen.checkpoint.weights import SPEECH_TOKENIZER, load_codec_weights
from gpu_worker.engines.qwen.codec.codec_config import CodecConfig
from gpu_worker.engines.qwen.codec.decoder import Decoder
from gpu_worker.engines.qwen.codec.decoder_state import DecoderState
from gpu_worker.engines.qwen.codec.encoder import Encoder
from gpu_worker.engines.qwen.kernels.selection import KernelSetting, select_kernels

_MAX_CHUNK: Final = 8
"""Default for the most frames that a stream decodes at once."""


class Codec:
    """One speech tokenizer on one device."""

    def __init__(
        self, directory: Path, *, dtype: torch.dtype, device: torch.device, kernels: KernelSetting = "auto"
    ) -> None:
        """Load the decoder of a checkpoint in `dtype`. The first `encode` loads the encoder.

        Raises:
            JobError: `model_unavailable`, naming the file at fault.
        """
        self.device = device
        self.dtype = dtype
        self._directory = directory
        path = directory / SPEECH_TOKENIZER / "config.json"
        self._config = read_json(path, CodecConfig)
        weights = load_codec_weights(directory, "decoder.", dtype=dtype, device=device)
        # A codebook is the quotient of stored sums and counts: divided in float32, then rounded.
        weights |= load_codec_weights(directory, "decoder.quantizer.", dtype=torch.float32, device=device)
        try:
            self._decoder = Decoder(
                {name.removeprefix("decoder."): tensor for name, tensor in weights.items()},
                self._config.decoder_config,
                select_kernels(kernels, device, dtype),
            )
        except KeyError as error:
            raise unavailable(path.parent, f"its weights have no decoder.{error.args[0]}") from error
        self._encoder: Encoder | None = None
        self.bytes = self._count_bytes()
        """Bytes of all weights that are loaded."""

    def new_state(self, slots: int, *, max_chunk: int = _MAX_CHUNK) -> DecoderState:
        """State of `slots` new streams, each of which decodes up to `max_chunk` frames at once."""
        return DecoderState(
            self._decoder.shape,
            self._decoder.history_size,
            slots=slots,
            max_chunk=max_chunk,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def decode(self, codes: Tensor, slots: Tensor, state: DecoderState) -> Tensor:
        """Decode the next chunk of each stream. The waveform depends neither on the chunk lengths nor on the batch.

        codes: int64 [batch, frames, 16], with at most `state.max_chunk` frames; slots: int64 [batch], each slot once,
        and `state.scratch` for the rows that pad the batch. All are on the codec's device.
        Returns float32 [batch, frames * 1920] within -1 … 1. `decode` never waits for the device,
        so it can be captured into a CUDA graph for a fixed batch and number of frames.

        Raises:
            ValueError: there are more frames than `state.max_chunk`.
        """
        if codes.shape[1] > state.max_chunk:
            raise ValueError(f"{codes.shape[1]} frames at once, where the state allows {state.max_chunk}")
        return self._decoder(codes, slots, state)

    @torch.inference_mode()
    def prime(self, codes: Tensor, slot: int, state: DecoderState) -> None:
        """Begin a stream in `slot` as if `codes` (int64 [frames, 16], any number of frames) had been decoded.

        In-context clones need this: the official package decodes reference and speech together and cuts the waveform
        behind the reference. `state.snapshot(slot)` keeps the primed state with the voice.
        """
        state.reset(slot)
        if codes.shape[0]:
            self._decoder.prime(codes[None].to(self.device), torch.tensor([slot], device=self.device), state)

    def encode(self, pcm: Tensor, directory: Path | None = None) -> Tensor:
        """The codes of a recording, on the codec's device: int64 [frames, 16]. A last partial frame counts.

        pcm: float32 [samples] at 24 kHz mono, within -1 … 1.
        The first call loads the encoder (about a second), from `directory` if it is given: a checkpoint with the same
        speech tokenizer. The checkpoint that the decoder was loaded from may be deleted by then.
        Two calls of `encode` must not overlap. `encode` may overlap `decode` and `prime`.

        Raises:
            JobError: `model_unavailable`, naming the file at fault.
        """
        if self._encoder is None:
            codebooks = self._config.encoder_valid_num_quantizers
            self._encoder = Encoder(directory or self._directory, codebooks, self.device)
            self.bytes = self._count_bytes()
        return self._encoder(pcm)

    def tensors(self) -> Iterator[Tensor]:
        """Every weight tensor that is loaded, each once."""
        held = [*self._decoder.tensors(), *(self._encoder.tensors() if self._encoder is not None else ())]
        yield from {id(tensor): tensor for tensor in held}.values()

    def _count_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())
