"""The codec's transformer: eight pre-norm layers over a sliding window of frames, continued from chunk to chunk.

Keys and values live in a ring by slot, so a chunk writes only its own frames.
The ring holds the window and the longest chunk; which of its rows a frame may see follows from positions alone.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.codec.codec_config import DecoderShape
from gpu_worker.engines.qwen.codec.convolution import scaled
from gpu_worker.engines.qwen.model.layers import Linear, Norm, TensorHolder


class Window:
    """One chunk's view of the rings: where its frames go, what each may see, and its rotary angles."""

    def __init__(
        self, rings: Tensor, slots: Tensor, positions: Tensor, chunk: int, rope: tuple[Tensor, Tensor]
    ) -> None:
        """rings: [layers, slots, rows, 2, heads, head_dim]; slots, positions: int64 [batch].

        `positions` are those of the chunk's first frames. rope: frequencies and signs, float32 [head_dim].
        """
        self.rings = rings
        self.slots = slots
        self.batch, self.chunk = slots.shape[0], chunk
        rows = rings.shape[2]
        steps = torch.arange(chunk, device=slots.device)
        self.frames = positions[:, None] + steps
        self.places = (slots[:, None] * rows + self.frames % rows).flatten()
        frequencies, signs = rope
        angles = self.frames[:, :, None, None, None] * frequencies
        self.cos = angles.cos().to(rings.dtype)
        self.sin = (angles.sin() * signs).to(rings.dtype)

    def mask(self, span: int) -> Tensor:
        """What is added to the scores, [batch, 1, chunk, rows]: 0 within `span` frames up to the frame, else -inf."""
        rows = self.rings.shape[2]
        newest = self.frames[:, -1:]
        held = newest - (newest - torch.arange(rows, device=newest.device)) % rows  # the frame each row holds
        age = self.frames[:, :, None] - held[:, None]
        hidden = (age < 0) | (age >= span) | (held < 0)[:, None]
        zeros = torch.zeros(hidden.shape, dtype=self.rings.dtype, device=hidden.device)
        return zeros.masked_fill_(hidden, float("-inf"))[:, None]


class Layer(TensorHolder):
    """Attention and SwiGLU, each scaled by channel; the scales are folded into the weights."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, shape: DecoderShape) -> None:
        def fused(*names: str, behind: Norm) -> Linear:
            return Linear(behind.fold_into([torch.cat([weights[f"{prefix}.{name}.weight"] for name in names])])[0])

        def rescaled(name: str, scale: str) -> Linear:
            return Linear(scaled(weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{scale}.scale"]))

        self.heads, self.head_dim = shape.num_attention_heads, shape.head_dim
        self.half = shape.head_dim // 2
        self.input_norm = Norm(weights[f"{prefix}.input_layernorm.weight"], shape.rms_norm_eps)
        self.post_norm = Norm(weights[f"{prefix}.post_attention_layernorm.weight"], shape.rms_norm_eps)
        self.qkv = fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", behind=self.input_norm)
        self.out = rescaled("self_attn.o_proj", "self_attn_layer_scale")
        self.gate_up = fused("mlp.gate_proj", "mlp.up_proj", behind=self.post_norm)
        self.down = rescaled("mlp.down_proj", "mlp_layer_scale")

    def __call__(self, x: Tensor, index: int, window: Window, mask: Tensor) -> Tensor:
        """X: [batch * chunk, hidden] -> the same; writes the chunk's keys and values into ring `index`."""
        qkv = self.qkv.batch_invariant(self.input_norm(x)).view(
            window.batch, window.chunk, 3, self.heads, self.head_dim
        )
        turned = qkv[:, :, :2]
        turned = torch.addcmul(turned * window.cos, turned.roll(self.half, -1), window.sin)
        ring = window.rings[index]
        new = torch.cat((turned[:, :, 1:], qkv[:, :, 2:]), 2)
        ring.flatten(0, 1).flatten(1).index_copy_(0, window.places, new.flatten(0, 1).flatten(1))
        key, value = ring.index_select(0, window.slots).transpose(1, 3).unbind(2)
        query = turned[:, :, 0].transpose(1, 2)
        if window.chunk == 1 and x.device.type == "cpu":
            # The keys of a single query are shared out among threads, and into how many parts depends on the batch.
            query, mask = query.expand(-1, -1, 2, -1), mask.expand(-1, -1, 2, -1)
        seen = functional.scaled_dot_product_attention(query, key, value, mask)[:, :, : window.chunk]
        x = x + self.out.batch_invariant(seen.transpose(1, 2).reshape(x.shape[0], -1))
        gate, up = self.gate_up.batch_invariant(self.post_norm(x)).chunk(2, -1)
        return x + self.down.batch_invariant(functional.silu(gate) * up)


class Transformer(TensorHolder):
    """Projection in, the layers, norm, projection out."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, shape: DecoderShape) -> None:
        def projection(name: str) -> Linear:
            return Linear(weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"])

        self.span = shape.sliding_window
        self.into, self.back = projection("input_proj"), projection("output_proj")
        self.layers = [Layer(weights, f"{prefix}.layers.{i}", shape) for i in range(shape.num_hidden_layers)]
        self.norm = Norm(weights[f"{prefix}.norm.weight"], shape.rms_norm_eps)
        device = weights[f"{prefix}.norm.weight"].device
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.int64, device=device).float() / shape.head_dim
        self.frequencies = (1.0 / shape.rope_theta**half).repeat(2)
        # Rolling by half the width and negating the first half of the sines is the official rotate_half.
        self.signs = torch.ones_like(self.frequencies)
        self.signs[: shape.head_dim // 2] = -1

    def __call__(self, x: Tensor, window: Window) -> Tensor:
        """X: [batch * chunk, latent] -> the same."""
        x = self.into.batch_invariant(x)
        mask = window.mask(self.span)
        for index, layer in enumerate(self.layers):
            x = layer(x, index, window, mask)
        return self.back.batch_invariant(self.norm(x))
