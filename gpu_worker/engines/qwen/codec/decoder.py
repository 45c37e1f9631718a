"""The codec decoder: 16 codes a frame to 1920 samples, any split into chunks giving the same waveform.

It owns weights and arithmetic; what continues from chunk to chunk is in a DecoderState.
Every convolution is causal and attention looks back over a fixed window,
so carrying their few last inputs is exact, where re-decoding a left context never is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from gpu_worker.engines.qwen.codec.codec_config import DecoderShape
from gpu_worker.engines.qwen.codec.convolution import (
    CausalConv,
    ConvNeXt,
    History,
    Snake,
    ToMono,
    Upsample,
    UpsamplingBlock,
    receptive_frames,
)
from gpu_worker.engines.qwen.codec.decoder_state import DecoderState
from gpu_worker.engines.qwen.codec.transformer import Transformer, Window
from gpu_worker.engines.qwen.model.layers import Linear, TensorHolder


class Decoder(TensorHolder):
    """Codebooks, transformer and convolutions, from the checkpoint's "decoder." tensors."""

    def __init__(self, weights: Mapping[str, Tensor], shape: DecoderShape) -> None:
        """weights: names without their "decoder." prefix, on the device.

        All in the compute dtype but those of "quantizer.", which are float32 until codebooks have been divided.
        """
        self.shape = shape
        self.before = CausalConv(weights, "pre_conv", rate=1)
        self.books = Codebooks(weights, "quantizer", shape, self.before.bias.dtype)
        self.transformer = Transformer(weights, "pre_transformer", shape)
        rate = 1
        self.doublers: list[Upsample | ConvNeXt] = []
        for index, ratio in enumerate(shape.upsampling_ratios):
            self.doublers.append(Upsample(weights, f"upsample.{index}.0", rate=rate, stride=ratio))
            rate *= ratio
            self.doublers.append(ConvNeXt(weights, f"upsample.{index}.1", rate=rate))
        self.widen = CausalConv(weights, "decoder.0", rate=rate)
        self.blocks: list[UpsamplingBlock] = []
        for index, stride in enumerate(shape.upsample_rates, 1):
            self.blocks.append(UpsamplingBlock(weights, f"decoder.{index}", rate=rate, stride=stride))
            rate *= stride
        last = len(shape.upsample_rates) + 1
        self.snake = Snake(weights, f"decoder.{last}", rate=rate)
        self.mono = ToMono(weights, f"decoder.{last + 1}", rate=rate)
        pieces = (*self.doublers, self.widen, *self.blocks, self.mono)
        self.frames_heard = receptive_frames([piece.lookback for piece in pieces])
        self.history_values = self.before.values + sum(piece.values for piece in pieces)

    def __call__(self, codes: Tensor, slots: Tensor, state: DecoderState) -> Tensor:
        """codes: int64 [batch, chunk, 16]; slots: int64 [batch], each once -> waveform float32 [batch, chunk * 1920].

        Continues the slots' streams and moves them on, without a look at the host.
        """
        history = state.history.index_select(0, slots)
        latents = self._latents(codes, slots, state, history)
        wave = self._waveform(latents, history)
        state.history.index_copy_(0, slots, history)
        return wave

    def prime(self, codes: Tensor, slots: Tensor, state: DecoderState) -> None:
        """As decoding `codes` of any length and throwing the waveform away, at a fraction of the cost.

        The slots must be at their beginning.
        Only the transformer sees every frame: the convolutions behind it hear no further back than `frames_heard`.
        """
        history = state.history.index_select(0, slots)
        latents = [self._latents(part, slots, state, history) for part in codes.split(state.max_chunk, 1)]
        self._waveform(torch.cat(latents, 1)[:, -self.frames_heard :], history)
        state.history.index_copy_(0, slots, history)

    def _latents(self, codes: Tensor, slots: Tensor, state: DecoderState, history: Tensor) -> Tensor:
        """[batch, chunk, latent_dim]; moves the slots' positions on and renews the history of the first convolution."""
        batch, chunk, _ = codes.shape
        positions = state.positions.index_select(0, slots)
        rope = (self.transformer.frequencies, self.transformer.signs)
        window = Window(state.rings, slots, positions, chunk, rope)
        x = self.before(self.books(codes), History(history[:, : self.before.values]))
        x = self.transformer(x.flatten(0, 1), window)
        state.positions.index_copy_(0, slots, positions + chunk)
        return x.view(batch, chunk, -1)

    def _waveform(self, x: Tensor, history: Tensor) -> Tensor:
        """[batch, chunk, latent_dim] -> float32 [batch, chunk * 1920]; renews the rest of the history."""
        rest = History(history[:, self.before.values :])
        for doubler in self.doublers:
            x = doubler(x, rest)
        x = self.widen(x, rest)
        for block in self.blocks:
            x = block(x, rest)
        return self.mono(self.snake(x), rest).float().clamp_(-1, 1)


class Codebooks(TensorHolder):
    """One vector a code, summed over the codebooks and projected: the first codebook apart from the other fifteen.

    A checkpoint keeps sums of the vectors assigned to an entry and their number; they are divided once, here.
    """

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, shape: DecoderShape, dtype: torch.dtype) -> None:
        def vectors(group: str, index: int) -> Tensor:
            book = f"{prefix}.{group}.vq.layers.{index}._codebook"
            return weights[f"{book}.embedding_sum"] / weights[f"{book}.cluster_usage"].clamp(min=1e-5)[:, None]

        rest = shape.num_quantizers - 1
        table = torch.cat([vectors("rvq_first", 0), *(vectors("rvq_rest", i) for i in range(rest))])
        self.table = table.to(dtype)
        self.size = shape.codebook_size
        self.offsets = torch.arange(shape.num_quantizers, device=self.table.device) * self.size
        groups = ("rvq_first", "rvq_rest")
        project = torch.cat([weights[f"{prefix}.{group}.output_proj.weight"][:, :, 0] for group in groups], 1)
        self.project = Linear(project.to(dtype))

    def __call__(self, codes: Tensor) -> Tensor:
        """int64 [batch, chunk, 16] -> [batch, chunk, codebook_dim]; ids out of range mean the nearest valid one."""
        batch, chunk, books = codes.shape
        ids = codes.clamp(0, self.size - 1) + self.offsets
        vectors = self.table.index_select(0, ids.flatten()).view(batch * chunk, books, -1)
        return self.project.batch_invariant(torch.cat((vectors[:, 0], vectors[:, 1:].sum(1)), 1)).view(batch, chunk, -1)
