"""The codec decoder: 16 codes a frame to 1920 samples. Any split into chunks gives the same waveform.

Decoder owns weights and arithmetic. A DecoderState has the state between chunks.
All convolutions are causal, and attention has a fixed window. So keeping their last inputs is exact,
but decoding some left context again would never be.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.qwen.chunk_schedule import MAX_CHUNK_FRAMES
from gpu_worker.engines.qwen.codec.codec_config import DecoderShape
from gpu_worker.engines.qwen.codec.convolution import (
    CausalConv,
    ConvNeXt,
    History,
    ToMono,
    Upsample,
    UpsamplingBlock,
    receptive_frames,
)
from gpu_worker.engines.qwen.codec.decoder_state import DecoderState
from gpu_worker.engines.qwen.codec.transformer import Transformer, Window
from gpu_worker.engines.qwen.kernels.bias_snake import Snake
from gpu_worker.engines.qwen.kernels.causal_input import causal_input
from gpu_worker.engines.qwen.kernels.selection import Kernels
from gpu_worker.engines.qwen.model.layers import Linear
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN, Products
from gpu_worker.engines.qwen.tensor_holder import TensorHolder

LARGE_RATE: Final = 160
"""From this many rows a frame on, a block has little weight and large activations."""

PIECE_BYTES: Final = 1 << 21
"""On a CPU, the blocks of a large rate compute so many bytes of activations at once, or a frame if that is more."""


class Decoder(TensorHolder):
    """Codebooks, transformer and convolutions, from the checkpoint's "decoder." tensors."""

    def __init__(
        self, weights: Mapping[str, Tensor], shape: DecoderShape, kernels: Kernels, products: Products = PLAIN
    ) -> None:
        """weights: by name without the prefix "decoder.", on the device.

        All are in the compute dtype, except those of "quantizer.": codebooks are divided in float32.
        `products`: those of all matrices but the last one.
        """
        self.shape = shape
        self._kernels = kernels
        self.pre_conv = CausalConv(weights, "pre_conv", rate=1, products=products)
        dtype = weights["pre_conv.conv.bias"].dtype
        self.codebooks = Codebooks(weights, "quantizer", shape, dtype, halved=products is not PLAIN)
        self.transformer = Transformer(weights, "pre_transformer", shape, kernels, products)
        rate = 1
        self.upsamplers: list[Upsample | ConvNeXt] = []
        for index, ratio in enumerate(shape.upsampling_ratios):
            upsample = Upsample(weights, f"upsample.{index}.0", rate=rate, stride=ratio, products=products)
            rate *= ratio
            self.upsamplers += [upsample, ConvNeXt(weights, f"upsample.{index}.1", rate=rate, products=products)]
        self.conv_in = CausalConv(weights, "decoder.0", rate=rate, products=products)
        self.blocks: list[UpsamplingBlock] = []
        self._large_blocks: list[UpsamplingBlock] = []
        self._frame_bytes = 1
        for index, stride in enumerate(shape.upsample_rates, 1):
            block = UpsamplingBlock(
                weights, f"decoder.{index}", rate=rate, stride=stride, kernels=kernels, products=products
            )
            (self.blocks if rate < LARGE_RATE else self._large_blocks).append(block)
            rate *= stride
            self._frame_bytes = max(self._frame_bytes, 4 * rate * block.upsample.channels)
        last = len(shape.upsample_rates) + 1
        self.snake = Snake(weights, f"decoder.{last}", rate=rate)
        self.to_mono = ToMono(weights, f"decoder.{last + 1}", rate=rate)
        pieces = (*self.upsamplers, self.conv_in, *self.blocks, *self._large_blocks, self.to_mono)
        self.receptive_frames = receptive_frames([piece.lookback_frames for piece in pieces])
        self.history_size = self.pre_conv.history_size + sum(piece.history_size for piece in pieces)
        large = self.to_mono.history_size + sum(block.history_size for block in self._large_blocks)
        self._large_history = self.history_size - large

    def __call__(self, codes: Tensor, slots: Tensor, state: DecoderState) -> Tensor:
        """codes: int64 [batch, chunk, 16]; slots: int64 [batch], each once -> waveform float32 [batch, chunk * 1920].

        Continues the streams of the slots, without synchronization with the host.
        """
        old, new = self._histories(slots, state)
        latents = self._latents(codes, slots, state, old, new)
        wave = self._waveform(latents, old, new)
        state.history.index_copy_(0, slots, new)
        return wave

    def prime(self, codes: Tensor, slots: Tensor, state: DecoderState) -> None:
        """Leave the streams as if `codes` of any length had been decoded, at a fraction of the cost.

        The streams must be new. Only the transformer needs all frames:
        the convolutions behind it read no further back than `receptive_frames`.
        """
        old, new = self._histories(slots, state)
        latents = []
        for part in codes.split(state.max_chunk, 1):
            latents.append(self._latents(part, slots, state, old, new))
            if new is not old:
                old[:, : self.pre_conv.history_size] = new[:, : self.pre_conv.history_size]
        self._waveform(torch.cat(latents, 1)[:, -self.receptive_frames :], old, new)
        state.history.index_copy_(0, slots, new)

    def _histories(self, slots: Tensor, state: DecoderState) -> tuple[Tensor, Tensor]:
        """Those of the slots, and the tensor for the new ones: the same for torch, which reads all before it writes."""
        old = state.history.index_select(0, slots)
        return old, old if self._kernels.causal_input is causal_input else torch.empty_like(old)

    def _latents(self, codes: Tensor, slots: Tensor, state: DecoderState, old: Tensor, new: Tensor) -> Tensor:
        """[batch, chunk, latent_dim]. Advances the positions of the slots. `old`, `new`: histories, see History.

        It reads and writes that of `pre_conv`, which comes first.
        """
        batch, chunk, _ = codes.shape
        positions = state.positions.index_select(0, slots)
        rope = (self.transformer.frequencies, self.transformer.signs)
        window = Window(state.kv_rings, slots, positions, chunk, rope)
        x = self.pre_conv(self.codebooks(codes), History(old, new, self._kernels))
        x = self.transformer(x.flatten(0, 1), window)
        state.positions.index_copy_(0, slots, positions + chunk)
        return x.view(batch, chunk, -1)

    def _waveform(self, x: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """[batch, chunk, latent_dim] -> float32 [batch, chunk * 1920]. Reads and writes the rest of the histories."""
        start, frames = self.pre_conv.history_size, x.shape[1]
        rest = History(old[:, start:], new[:, start:], self._kernels)
        for upsampler in self.upsamplers:
            x = upsampler(x, rest)
        x, added = self.conv_in(x, rest), None
        for block in self.blocks:
            x, added = block(x, added, rest)
        old, new = old[:, self._large_history :], new[:, self._large_history :]
        if added is None and x.device.type == "cpu":
            return self._in_pieces(x, frames, old, new)
        return self._at_large_rate(x, added, History(old, new, self._kernels))

    def _in_pieces(self, x: Tensor, frames: int, old: Tensor, new: Tensor) -> Tensor:
        """As _at_large_rate, a few frames of one stream at a time, whose activations take little memory.

        Those of 8 frames of 4 streams took 0.25 GB at published sizes; in pieces they take 0.09 GB and as much time.
        With 3, 6 or 7 threads, oneDNN's convolution of two streams sums in another order than that of one. Those of
        small models do not, and streams together are faster there.
        """
        at_once = max(1, PIECE_BYTES // self._frame_bytes)
        streams = max(1, at_once // frames) if at_once > MAX_CHUNK_FRAMES else 1
        rows = min(frames, at_once) * (x.shape[1] // frames)
        waves = []
        for some, past, kept in zip(x.split(streams), old.split(streams), new.split(streams), strict=True):
            pieces = some.split(rows, 1)
            waves.append(
                torch.cat([self._at_large_rate(piece, None, History(past, kept, self._kernels)) for piece in pieces], 1)
            )
        return torch.cat(waves)

    def _at_large_rate(self, x: Tensor, added: Tensor | None, history: History) -> Tensor:
        """From what the first blocks computed to the waveform."""
        for block in self._large_blocks:
            x, added = block(x, added, history)
        _, extended = history.extend(x, self.to_mono.past_rows, added=added, snake=self.snake)
        return self.to_mono.of_extended(extended).float().clamp_(-1, 1)


class Codebooks(TensorHolder):
    """The vectors of a frame's codes, summed and projected: that of codebook 0 apart from the other fifteen.

    A checkpoint stores the sum and the number of the vectors of each entry. The constructor divides them once.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], prefix: str, shape: DecoderShape, dtype: torch.dtype, *, halved: bool
    ) -> None:
        """`halved`: keep the vectors in float16 if their range allows it."""

        def vectors(group: str, index: int) -> Tensor:
            book = f"{prefix}.{group}.vq.layers.{index}._codebook"
            return weights[f"{book}.embedding_sum"] / weights[f"{book}.cluster_usage"].clamp(min=1e-5)[:, None]

        rest = shape.num_quantizers - 1
        table = torch.cat([vectors("rvq_first", 0), *(vectors("rvq_rest", i) for i in range(rest))])
        self.table = _halved(table) if halved else table.to(dtype)
        self._dtype = dtype
        self.size = shape.codebook_size
        self.offsets = torch.arange(shape.num_quantizers, device=self.table.device) * self.size
        groups = ("rvq_first", "rvq_rest")
        project = torch.cat([weights[f"{prefix}.{group}.output_proj.weight"][:, :, 0] for group in groups], 1)
        self.project = Linear(project.to(dtype))

    def __call__(self, codes: Tensor) -> Tensor:
        """int64 [batch, chunk, 16] -> [batch, chunk, codebook_dim]. An invalid id counts as the nearest valid one."""
        batch, chunk, books = codes.shape
        ids = codes.clamp(0, self.size - 1) + self.offsets
        vectors = self.table.index_select(0, ids.flatten()).to(self._dtype).view(batch * chunk, books, -1)
        return self.project.batch_invariant(torch.cat((vectors[:, 0], vectors[:, 1:].sum(1)), 1)).view(batch, chunk, -1)


def _halved(table: Tensor) -> Tensor:
    """`table` [rows, values] in float16 if no row loses more than rounding takes: 66 dB; else as it is."""
    half = table.half()
    error = torch.sub(half, table).norm(dim=1)
    return half if bool((error <= 2**-11 * table.norm(dim=1)).all()) else table
