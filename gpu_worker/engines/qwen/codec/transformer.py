"""The transformer of the codec decoder: eight pre-norm layers over a sliding window of frames.

Each slot has a ring of keys and values, so a chunk writes only its own frames.
A ring holds the window and the longest chunk. The positions alone decide which rows of the ring a frame attends to.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.codec.codec_config import DecoderShape
from gpu_worker.engines.qwen.codec.convolution import scaled
from gpu_worker.engines.qwen.kernels.norm import Norm
from gpu_worker.engines.qwen.kernels.selection import Kernels
from gpu_worker.engines.qwen.model.layers import Linear
from gpu_worker.engines.qwen.runtime.products import BATCH_MULTIPLE
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN, Products
from gpu_worker.engines.qwen.tensor_holder import TensorHolder


class Window:
    """The rows of the rings that a chunk writes and attends to, and its rotary angles."""

    def __init__(
        self, kv_rings: Tensor, slots: Tensor, positions: Tensor, chunk: int, rope: tuple[Tensor, Tensor]
    ) -> None:
        """kv_rings: [layers, slots, rows, 2, heads, head_dim]; slots: int64 [batch].

        positions: int64 [batch], those of the chunk's first frames. rope: frequencies and signs, float32 [head_dim].
        """
        self.kv_rings = kv_rings
        self.slots = slots
        self.batch, self.chunk = slots.shape[0], chunk
        rows = kv_rings.shape[2]
        steps = torch.arange(chunk, device=slots.device)
        self.frames = positions[:, None] + steps
        self.ring_rows = (slots[:, None] * rows + self.frames % rows).flatten()
        frequencies, signs = rope
        angles = self.frames[:, :, None, None, None] * frequencies
        self.cos = angles.cos().to(kv_rings.dtype)
        self.sin = (angles.sin() * signs).to(kv_rings.dtype)

    def mask(self, sliding_window: int) -> Tensor:
        """The attention mask [batch, 1, chunk, rows]: 0 for the `sliding_window` frames up to a frame, else -inf."""
        rows = self.kv_rings.shape[2]
        newest = self.frames[:, -1:]
        held = newest - (newest - torch.arange(rows, device=newest.device)) % rows  # the frame each row holds
        age = self.frames[:, :, None] - held[:, None]
        hidden = (age < 0) | (age >= sliding_window) | (held < 0)[:, None]
        zeros = torch.zeros(hidden.shape, dtype=self.kv_rings.dtype, device=hidden.device)
        return zeros.masked_fill_(hidden, float("-inf"))[:, None]


class Layer(TensorHolder):
    """Attention and SwiGLU. The weights contain the scale of each channel."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        prefix: str,
        shape: DecoderShape,
        kernels: Kernels,
        products: Products = PLAIN,
    ) -> None:
        def fused(*names: str, behind: Norm) -> Linear:
            (matrix,) = behind.fold_into([torch.cat([weights[f"{prefix}.{name}.weight"] for name in names])])
            return Linear(matrix, products=products)

        def rescaled(name: str, scale: str) -> Linear:
            matrix = scaled(weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{scale}.scale"])
            return Linear(matrix, products=products)

        self.kernels = kernels
        self.heads, self.head_dim = shape.num_attention_heads, shape.head_dim
        self.half = shape.head_dim // 2
        self.input_norm = Norm(weights[f"{prefix}.input_layernorm.weight"], shape.rms_norm_eps)
        self.post_norm = Norm(weights[f"{prefix}.post_attention_layernorm.weight"], shape.rms_norm_eps)
        self.qkv = fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", behind=self.input_norm)
        self.out = rescaled("self_attn.o_proj", "self_attn_layer_scale")
        self.gate_up = fused("mlp.gate_proj", "mlp.up_proj", behind=self.post_norm)
        self.down = rescaled("mlp.down_proj", "mlp_layer_scale")

    def __call__(
        self, x: Tensor, normed: Tensor, index: int, window: Window, mask: Tensor, *, following: Norm
    ) -> tuple[Tensor, Tensor]:
        """`x` [batch * chunk, hidden] and its `input_norm` -> the output, and the norm `following` of it.

        It writes keys and values into the rings of layer `index`.
        """
        qkv = self.qkv.batch_invariant(normed).view(window.batch, window.chunk, 3, self.heads, self.head_dim)
        rotated = qkv[:, :, :2]
        rotated = torch.addcmul(rotated * window.cos, rotated.roll(self.half, -1), window.sin)
        ring = window.kv_rings[index]
        new = torch.cat((rotated[:, :, 1:], qkv[:, :, 2:]), 2)
        ring.flatten(0, 1).flatten(1).index_copy_(0, window.ring_rows, new.flatten(0, 1).flatten(1))
        key, value = ring.index_select(0, window.slots).transpose(1, 3).unbind(2)
        query = rotated[:, :, 0].transpose(1, 2)
        if x.device.type == "cpu" and (extra := -window.chunk % BATCH_MULTIPLE):
            # For a single query torch splits the keys among threads, into a number of parts that depends on the batch.
            # For two, an Intel Xeon with AVX-512 sums in another order than for four.
            query, mask = (functional.pad(tensor, (0, 0, 0, extra)) for tensor in (query, mask))
        attended = functional.scaled_dot_product_attention(query, key, value, mask)[:, :, : window.chunk]
        y = self.out.batch_invariant(attended.transpose(1, 2).reshape(x.shape[0], -1))
        x, normed = self._add_norm(x, y, self.post_norm)
        gated = self.kernels.silu_mul(self.gate_up.batch_invariant(normed))
        return self._add_norm(x, self.down.batch_invariant(gated), following)

    def _add_norm(self, x: Tensor, y: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        if norm.weight is None:  # it is in the matrices behind the norm
            x = x + y
            return x, norm(x)
        return self.kernels.add_norm(x, y, norm)


class Transformer(TensorHolder):
    """Input projection, layers, norm, output projection."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        prefix: str,
        shape: DecoderShape,
        kernels: Kernels,
        products: Products = PLAIN,
    ) -> None:
        def projection(name: str) -> Linear:
            return Linear(weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"], products)

        self.sliding_window = shape.sliding_window
        self.input_proj, self.output_proj = projection("input_proj"), projection("output_proj")
        layers = [f"{prefix}.layers.{i}" for i in range(shape.num_hidden_layers)]
        self.layers = [Layer(weights, layer, shape, kernels, products) for layer in layers]
        self.norm = Norm(weights[f"{prefix}.norm.weight"], shape.rms_norm_eps)
        device = weights[f"{prefix}.norm.weight"].device
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.int64, device=device).float() / shape.head_dim
        self.frequencies = (1.0 / shape.rope_theta**half).repeat(2)
        # Rolling by half the width and negating the first half of the sines equals the official rotate_half.
        self.signs = torch.ones_like(self.frequencies)
        self.signs[: shape.head_dim // 2] = -1

    def __call__(self, x: Tensor, window: Window) -> Tensor:
        """`x` is [batch * chunk, latent], and so is what is returned."""
        x = self.input_proj.batch_invariant(x)
        mask = window.mask(self.sliding_window)
        normed = self.layers[0].input_norm(x)
        norms = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        for index, (layer, following) in enumerate(zip(self.layers, norms, strict=True)):
            x, normed = layer(x, normed, index, window, mask, following=following)
        return self.output_proj.batch_invariant(normed)
