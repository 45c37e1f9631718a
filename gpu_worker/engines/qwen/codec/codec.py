"""The codec: decoder and encoder of a checkpoint's speech tokenizer, loaded once for all models.

Codec owns the weights. The streams are in a DecoderState, which each engine makes for its slots.
It schedules nothing, and knows neither jobs nor sample formats.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import structlog
import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.json_files import read_json, unavailable
from gpu_worker.engines.qwen.checkpoint.weights import SPEECH_TOKENIZER, open_codec_weights
from gpu_worker.engines.qwen.chunk_schedule import CHUNK_SCHEDULE, MAX_CHUNK_FRAMES
from gpu_worker.engines.qwen.codec.codec_config import CodecConfig
from gpu_worker.engines.qwen.codec.decoder import PIECE_BYTES, Decoder
from gpu_worker.engines.qwen.codec.decoder_state import DecoderState, kv_ring_bytes
from gpu_worker.engines.qwen.codec.encoder import Encoder
from gpu_worker.engines.qwen.kernels.selection import KernelSetting, select_kernels
from gpu_worker.engines.qwen.runtime.products import available
from gpu_worker.engines.qwen.runtime.products_trial import HALF, PLAIN, Outcome, kept

_STRIDE: Final = 797
"""Between the codes that a trial decodes."""

log = structlog.get_logger(__name__)


def can_be_quantized(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a codec of `dtype` can be quantized here: in float32, on a CPU."""
    return device.type == "cpu" and dtype == torch.float32 and (_has_amx() or available("fp16_threaded"))


def stream_bytes(directory: Path) -> int:
    """Bytes of the state of one stream in float32, but for the inputs of the convolutions, which are few.

    Only the configuration of the checkpoint is read.

    Raises:
        JobError: `model_unavailable`, naming the file at fault.
    """
    return kv_ring_bytes(read_json(_config_file(directory), CodecConfig).decoder_config, MAX_CHUNK_FRAMES)


def _config_file(directory: Path) -> Path:
    return directory / SPEECH_TOKENIZER / "config.json"


def _has_amx() -> bool:
    """Whether convolutions of a quantized codec multiply in bfloat16.

    With AMX this took a quarter of the time. The noise is 37 dB below the signal on random weights of published size,
    and 30 dB if all of the codec computes in bfloat16, as on a GPU.
    """
    # oneDNN may be kept from what the processor has.
    mkldnn = torch.ops.mkldnn
    return torch.cpu._is_amx_tile_supported() and mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 -- no public way


class Codec:
    """One speech tokenizer on one device."""

    def __init__(
        self,
        directory: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelSetting = "auto",
        quantized: bool = False,
        trial_file: Path | None = None,
    ) -> None:
        """Load the decoder of a checkpoint in `dtype`. The first `encode` loads the encoder.

        `quantized`, where it `can_be_quantized`: convolutions multiply in bfloat16 on a CPU with AMX. Other large
        matrices have float16 weights: half of the memory, and of the time where they read a few rows a frame.
        `trial_file`: see QwenOptions.

        Raises:
            JobError: `model_unavailable`, naming the file at fault.
        """
        self.device = device
        self.dtype = dtype
        self._directory = directory
        path = _config_file(directory)
        self._config = read_json(path, CodecConfig)
        self._kernels: KernelSetting = kernels
        self._products = HALF if quantized else PLAIN
        bfloat16 = quantized and _has_amx()
        self._decoder = self._load_decoder(path, bfloat16=bfloat16)
        question = "codec", PIECE_BYTES, repr(self._config)
        if bfloat16 and not kept(trial_file, question, lambda _: self._splits()).fastest:
            log.warning("codec_not_quantized", reason="here its sums depend on how a stream is split")
            del self._decoder  # before its successor is in memory, too
            self._decoder = self._load_decoder(path, bfloat16=False)
        self._encoder: Encoder | None = None
        self.bytes = self._count_bytes()
        """Bytes of all weights that are loaded."""

    def _load_decoder(self, path: Path, *, bfloat16: bool) -> Decoder:
        """`path`: that of its configuration. `bfloat16`: whether convolutions multiply in it."""
        directory, dtype, device = self._directory, self.dtype, self.device
        read = functools.partial(open_codec_weights, directory, device=device)
        # A codebook is the quotient of stored sums and counts: divided in float32, then rounded.
        with read("decoder.", dtype=dtype) as others, read("decoder.quantizer.", dtype=torch.float32) as codebooks:
            weights = _DecoderWeights(codebooks, others, bfloat16=bfloat16)
            kernels = select_kernels(self._kernels, device, dtype)
            try:
                return Decoder(weights, self._config.decoder_config, kernels, self._products)
            except KeyError as error:
                raise unavailable(path.parent, f"its weights have no {error.args[0]}") from error

    def _splits(self) -> Outcome:
        """The answer of `_splits_exactly`, as the file of trials keeps it. A second of CPU time for published sizes."""
        return Outcome(["bfloat16"] if self._splits_exactly() else [], {})

    def _splits_exactly(self) -> bool:
        """Whether a few frames have the same waveform in any chunks, and in any batch."""
        codes = torch.arange(2 * MAX_CHUNK_FRAMES * 16).view(2, -1, 16) * _STRIDE % self._decoder.shape.codebook_size

        def decoded(streams: int, chunks: Sequence[int]) -> Tensor:
            state = self.new_state(streams)
            parts = codes[:streams].split_with_sizes(list(chunks), 1)
            return torch.cat([self.decode(part, torch.arange(streams), state) for part in parts], 1)

        whole = decoded(1, (MAX_CHUNK_FRAMES,))
        return torch.equal(decoded(2, CHUNK_SCHEDULE[:-1])[:1], whole)

    def new_state(self, slots: int, *, max_chunk: int = MAX_CHUNK_FRAMES) -> DecoderState:
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
        visible = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())
        return visible + self._decoder.all_hidden_bytes()


class _DecoderWeights(Mapping[str, Tensor]):
    """The decoder's weights by their names in it. Each is read when it is looked up: no two copies of all."""

    def __init__(self, codebooks: Mapping[str, Tensor], others: Mapping[str, Tensor], *, bfloat16: bool) -> None:
        """Both by their full names. `bfloat16`: round the weights of costly convolutions to it."""
        self._codebooks, self._others = codebooks, others
        self._bfloat16 = bfloat16

    def __getitem__(self, name: str) -> Tensor:
        full = f"decoder.{name}"
        tensor = (self._codebooks if name.startswith("quantizer.") else self._others)[full]
        return tensor.bfloat16() if self._bfloat16 and _is_costly(full, tensor) else tensor

    def __iter__(self) -> Iterator[str]:
        return (full.removeprefix("decoder.") for full in self._others)

    def __len__(self) -> int:
        return len(self._others)


def _is_costly(name: str, tensor: Tensor) -> bool:
    """Whether this is the weight of a convolution behind the transformer. The last one has one output and is cheap."""
    return name.startswith("decoder.decoder.") and name.endswith(".conv.weight") and len(tensor) > 1
