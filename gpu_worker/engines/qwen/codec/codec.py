"""The codec: the speech tokenizer of a checkpoint, decoder and encoder, loaded once for all models.

Weights are here; streams are in the DecoderStates that each engine makes for its slots.
It schedules nothing and knows neither jobs nor sample formats.
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

MAX_CHUNK: Final = 8
"""Frames of the longest chunk a stream decodes at once, unless an engine asks for another."""


class Codec:
    """Weights of one speech tokenizer on one device."""

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        """Load the decoder of a checkpoint, in `dtype`; the encoder follows when first asked.

        Raises:
            JobError: `model_unavailable`, naming the file at fault.
        """
        self.device = device
        self.dtype = dtype
        self._directory = directory
        path = directory / SPEECH_TOKENIZER / "config.json"
        self._config = read_json(path, CodecConfig)
        weights = load_codec_weights(directory, "decoder.", dtype=dtype, device=device)
        # Codebooks are quotients of stored sums and counts: taken in float32, rounded afterwards.
        weights |= load_codec_weights(directory, "decoder.quantizer.", dtype=torch.float32, device=device)
        try:
            self._decoder = Decoder(
                {name.removeprefix("decoder."): tensor for name, tensor in weights.items()}, self._config.decoder_config
            )
        except KeyError as error:
            raise unavailable(path.parent, f"its weights have no decoder.{error.args[0]}") from error
        self._encoder: Encoder | None = None
        self.bytes = self._count()
        """Bytes of all weights loaded so far."""

    def new_state(self, slots: int, *, max_chunk: int = MAX_CHUNK) -> DecoderState:
        """State for `slots` streams that decode up to `max_chunk` frames at once, all at their beginning."""
        return DecoderState(
            self._decoder.shape,
            self._decoder.history_values,
            slots=slots,
            max_chunk=max_chunk,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def decode(self, codes: Tensor, slots: Tensor, state: DecoderState) -> Tensor:
        """Continue streams by a chunk: the same waveform for any split into chunks, alone or in company.

        codes: int64 [batch, frames, 16], frames up to `state.max_chunk`; slots: int64 [batch], each slot once
        (`state.scratch` as often as a batch needs padding). All on the codec's device.
        Returns float32 [batch, frames * 1920] within -1 … 1. Nothing here waits for the device:
        for fixed batch and frames it can be captured into a CUDA graph.

        Raises:
            ValueError: more frames than `state.max_chunk`.
        """
        if codes.shape[1] > state.max_chunk:
            raise ValueError(f"{codes.shape[1]} frames at once, where the state allows {state.max_chunk}")
        return self._decoder(codes, slots, state)

    @torch.inference_mode()
    def prime(self, codes: Tensor, slot: int, state: DecoderState) -> None:
        """Begin a stream in `slot` as if `codes` (int64 [frames, 16], any number) had been decoded already.

        For in-context clones: what follows is then the official result of decoding reference and speech together,
        cut behind the reference. `state.snapshot(slot)` keeps the result with the voice.
        """
        state.reset(slot)
        if codes.shape[0]:
            self._decoder.prime(codes[None].to(self.device), torch.tensor([slot], device=self.device), state)

    def encode(self, pcm: Tensor, directory: Path | None = None) -> Tensor:
        """The codes of a recording, on the codec's device: int64 [frames, 16].

        pcm: float32 [samples] at 24 kHz mono, within -1 … 1.
        A last partial frame counts. Loads the encoder at the first call (about a second), from `directory`
        if given: a checkpoint with the same tokenizer as that this codec came with, which may be gone by now.
        Calls must not overlap each other; they may overlap `decode` and `prime`.

        Raises:
            JobError: `model_unavailable`, naming the file at fault.
        """
        if self._encoder is None:
            codebooks = self._config.encoder_valid_num_quantizers
            self._encoder = Encoder(directory or self._directory, codebooks, self.device)
            self.bytes = self._count()
        return self._encoder(pcm)

    def tensors(self) -> Iterator[Tensor]:
        """Every weight tensor loaded so far, each once: for whoever moves or counts them."""
        held = [*self._decoder.tensors(), *(self._encoder.tensors() if self._encoder is not None else ())]
        yield from {id(tensor): tensor for tensor in held}.values()

    def _count(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())
