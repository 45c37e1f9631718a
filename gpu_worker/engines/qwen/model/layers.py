"""Transformer blocks shared by the talker and the code predictor: fused projections, norms, rotary positions.

Owns the weights and the arithmetic of a block, with the rounding points of the official modules.
It holds no caches: keys and values go to the Attend that the caller passes.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.checkpoint.model_config import Shape
from gpu_worker.engines.qwen.kernels.selection import Kernels
from gpu_worker.engines.qwen.model.attention import by_group

PACK_ELEMENTS: Final = 1 << 18
"""On CPU, weights of at least this many elements are kept in oneDNN's blocked layout ("packed").

Measured on 2 cores of an AMD EPYC (Zen 4), float32: from here up it is 2 to 3 times faster than MKL at 1 to 16 rows.
Below, its overhead costs more: 13 µs a call in a loop of nothing else, 40 µs between the other operators of a frame.
"""

BATCH_MULTIPLE: Final = 4
"""On CPU, batches are padded to a multiple of this.

MKL computes 1 to 3 trailing rows with other kernels, whose sums round differently.
With full groups of 4, products are batch invariant: a row's bits do not depend on the batch it is in.
Which layout of W this takes depends on the processor; see `_views_are_batch_invariant`.
"""

ALIGNED_OUTPUTS: Final = 8
"""cuBLAS has its fast kernels only for rows of 16 bytes: for 8 outputs in bfloat16."""

_TRIAL_SHAPES: Final = ((128, 64), (192, 64), (256, 128))
"""Inputs and outputs of products whose sums, on an Intel Xeon with AVX-512, depend on the batch from 5 or 9 rows up."""


@functools.cache
def _views_are_batch_invariant() -> bool:
    """Whether MKL's float32 products x Wᵀ of full groups are batch invariant on this processor if Wᵀ is a view of W.

    They are on an AMD EPYC (Zen 4). On an Intel Xeon with AVX-512 they are if Wᵀ is contiguous, which is as fast.
    One trial for the process; it takes a millisecond.
    """
    generator = torch.Generator().manual_seed(0)
    for inner, outer in _TRIAL_SHAPES:
        weight, x = (torch.randn(rows, inner, generator=generator) for rows in (outer, 8 * BATCH_MULTIPLE))
        alone = torch.cat([torch.mm(group, weight.t()) for group in x.split(BATCH_MULTIPLE)])
        for rows in range(2 * BATCH_MULTIPLE, len(x) + 1, BATCH_MULTIPLE):
            if not torch.equal(torch.mm(x[:rows], weight.t()), alone[:rows]):
                return False
    return True


class TensorHolder:
    """Finds the tensors in its attributes, in lists there, and in the TensorHolders there."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held, directly or below; a tensor held twice comes twice."""
        for value in vars(self).values():
            for item in value if isinstance(value, list) else (value,):
                if isinstance(item, Tensor):
                    yield item
                elif isinstance(item, TensorHolder):
                    yield from item.tensors()


class Linear(TensorHolder):
    """y = x Wᵀ + b, with W in the layout that the device computes fastest with."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = weight.device.type == "cpu" and weight.numel() >= PACK_ELEMENTS and _packs(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 16) if self.packed else weight  # noqa: SLF001 -- no public way to keep a packed weight with plain tensors around it
        self._outputs = weight.shape[0]
        self.bias = bias
        self._transposed = None if self.packed else weight.t()
        if self._transposed is not None and _needs_contiguous(weight):
            self._transposed = self._transposed.contiguous()
            self.weight = self._transposed.t()

    def __call__(self, x: Tensor) -> Tensor:
        """`x`: [rows, in] -> [rows, out]."""
        if self._transposed is None:
            return self._add_packed(x.new_zeros(x.shape[0], self._outputs), x)
        if self.bias is None:
            return torch.mm(x, self._transposed)  # what functional.linear calls in the end, in a third of the calls
        return torch.addmm(self.bias, x, self._transposed)

    def batch_invariant(self, x: Tensor) -> Tensor:
        """The same for any number of rows: on CPU they are padded, so that a row's bits do not depend on the others."""
        padded = pad_rows(x)
        return self(x) if padded is x else self(padded)[: x.shape[0]]

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` + x Wᵀ, without bias. Only float32 adds within the product, which rounds once less than a sum."""
        if x.dtype != torch.float32:
            return y + self(x)
        if self._transposed is None:
            return self._add_packed(y, x)
        return torch.addmm(y, x, self._transposed)

    def _add_packed(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` + x Wᵀ + b: the form of oneDNN's product that can be traced (see cpu_traces.py). Adding costs nothing."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, y, self.weight, self.bias, "add")  # noqa: SLF001 -- as above


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype on this processor: of bfloat16 not without AVX-512."""
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 -- no public way


def _needs_contiguous(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not _views_are_batch_invariant()


def pad_rows(x: Tensor) -> Tensor:
    """On CPU, x with rows of zeros behind it up to a multiple of BATCH_MULTIPLE; elsewhere x."""
    extra = -x.shape[0] % BATCH_MULTIPLE
    if x.is_cuda or not extra:
        return x
    return functional.pad(x, (0, 0) * (x.ndim - 1) + (0, extra))


def aligned(matrix: Tensor) -> Tensor:
    """On CUDA, `matrix` [out, in] with rows of zeros up to a multiple of ALIGNED_OUTPUTS; elsewhere `matrix`."""
    extra = -matrix.shape[0] % ALIGNED_OUTPUTS
    return functional.pad(matrix, (0, 0, 0, extra)) if matrix.is_cuda and extra else matrix


class Norm(TensorHolder):
    """RMSNorm over the last axis, computed in float32 and rounded to the model's dtype before the weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._shape = weight.shape[-1:]
        self._eps = eps
        # x / sqrt(mean(x²) + eps) == sqrt(n) x / hypot(norm(x), sqrt(n eps)): torch has no fused kernel for CPU,
        # and this is a third of the calls of its composite one.
        self._root = math.sqrt(weight.shape[-1])
        self._floor = torch.tensor(self._root * math.sqrt(eps), dtype=torch.float32, device=weight.device)
        rooted = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.weight: Tensor | None = weight * self._root if rooted else weight

    def fold_into(self, matrices: list[Tensor]) -> list[Tensor]:
        """Multiply the weight into all matrices [out, size] that read this norm's output, and apply it no longer.

        In float32 only: in other dtypes the official modules round in between, so the matrices come back unchanged.
        """
        if self.weight is None or self.weight.dtype != torch.float32:
            return matrices
        matrices = [matrix * self.weight for matrix in matrices]
        self.weight = None
        return matrices

    def of_part(self, part: Tensor, whole: Tensor, sizes: tuple[int, int]) -> Tensor:
        """The norm of `part`, the first of `sizes` along the second axis of `whole`.

        CUDA's kernel would copy a part that is not contiguous. The norm of all costs less than that copy.
        """
        if not part.is_cuda:
            return self(part)
        y = functional.rms_norm(whole, self._shape, None, self._eps).split_with_sizes(sizes, 1)[0]
        return y if self.weight is None else y * self.weight

    def __call__(self, x: Tensor) -> Tensor:
        """`x`: [..., size] in any float dtype -> the same shape and dtype."""
        if x.is_cuda:
            # One kernel. It computes in float32 and, without a weight, rounds where the official modules do.
            y = functional.rms_norm(x, self._shape, None, self._eps)
        elif x.dtype == torch.float32:
            y = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._floor)
        else:
            y = x.float()
            norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True).hypot_(self._floor)
            y = (y * (self._root / norm)).to(x.dtype)
        return y if self.weight is None else y * self.weight


class Rope(TensorHolder):
    """Tables of rotary position embeddings. The three axes of the official mRoPE are equal for speech: plain RoPE."""

    def __init__(self, shape: Shape, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.int64, device=device).float() / shape.head_dim
        angles = torch.arange(max_positions, device=device).float()[:, None] * (1.0 / shape.rope_theta**half)
        sin = angles.sin()
        self.cos = torch.cat((angles.cos(),) * 2, dim=-1).to(dtype)
        # rotate_half(x) * sin == roll(x, half) * (-sin, sin): negation rounds nothing.
        self.sin = torch.cat((-sin, sin), dim=-1).to(dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`positions`: int64 [rows] -> (cos, sin), each [rows, 1, head_dim]."""
        return self.cos.index_select(0, positions)[:, None], self.sin.index_select(0, positions)[:, None]

    def span(self, start: int, stop: int, batch: int = 1) -> tuple[Tensor, Tensor]:
        """Positions start to stop - 1 of `batch` sequences: (cos, sin), each [batch * (stop - start), 1, head_dim]."""
        cos, sin = self.cos[start:stop, None], self.sin[start:stop, None]
        return (cos, sin) if batch == 1 else (cos.repeat(batch, 1, 1), sin.repeat(batch, 1, 1))


QKV = tuple[Tensor, Tensor, Tensor]
"""Queries [rows, heads, head_dim], keys and values [rows, kv_heads, head_dim] of one layer."""


class Attend(Protocol):
    """Attention over a cache, layer by layer."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write the new keys and values to the cache, and attend.

        query: [rows, heads, head_dim]; key, value: [rows, kv_heads, head_dim] -> [rows, heads * head_dim].
        """


class Layer(TensorHolder):
    """One pre-norm block: attention with a norm of each head's query and key, then SwiGLU."""

    def __init__(
        self, weights: Mapping[str, Tensor], prefix: str, shape: Shape, *, kernels: Kernels, heads_by_group: bool
    ) -> None:
        """`heads_by_group`: the order of the heads that attention returns, see Attention."""

        def fused(*names: str, behind: Norm | None = None) -> Linear:
            matrix = torch.cat([weights[f"{prefix}{name}.weight"] for name in names])
            return Linear(behind.fold_into([matrix])[0] if behind is not None else matrix)

        self.heads = shape.num_attention_heads
        self.kv_heads = shape.num_key_value_heads
        self.head_dim = shape.head_dim
        self.half = shape.head_dim // 2
        self.kernels = kernels
        self.input_norm = Norm(weights[f"{prefix}input_layernorm.weight"], shape.rms_norm_eps)
        self.post_norm = Norm(weights[f"{prefix}post_attention_layernorm.weight"], shape.rms_norm_eps)
        query, key = (weights[f"{prefix}self_attn.{name}_norm.weight"] for name in "qk")
        self.qk_norm = Norm(
            torch.cat((query.expand(self.heads, -1), key.expand(self.kv_heads, -1))), shape.rms_norm_eps
        )
        self.qkv = fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", behind=self.input_norm)
        out = weights[f"{prefix}self_attn.o_proj.weight"]
        if heads_by_group:
            out = by_group(out.unflatten(1, (self.heads, self.head_dim)), self.kv_heads).flatten(1)
        self.out = Linear(out)
        self.gate_up = fused("mlp.gate_proj", "mlp.up_proj", behind=self.post_norm)
        self.down = fused("mlp.down_proj")

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> QKV:
        """`x`: [rows, hidden] -> its queries, keys and values."""
        cos, sin = rope
        qkv = self.qkv(self.input_norm(x)).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        sizes = (self.heads + self.kv_heads, self.kv_heads)
        qk, value = qkv.split_with_sizes(sizes, 1)  # half the time of split
        qk = self.qk_norm.of_part(qk, qkv, sizes)
        rotated = qk.roll(self.half, -1)
        # In one kernel where that rounds no coarser than the official two.
        qk = torch.addcmul(qk * cos, rotated, sin) if qk.dtype == torch.float32 else qk * cos + rotated * sin
        query, key = qk.split_with_sizes((self.heads, self.kv_heads), 1)
        return query, key, value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """`x` [rows, hidden] and attention's output [rows, heads * head_dim] -> the block's output [rows, hidden]."""
        x = self.out.add_to(x, attended)
        return self.down.add_to(x, self.kernels.silu_mul(self.gate_up(self.post_norm(x))))


class Stack(TensorHolder):
    """The blocks and the final norm."""

    def __init__(
        self, weights: Mapping[str, Tensor], prefix: str, shape: Shape, *, kernels: Kernels, heads_by_group: bool
    ) -> None:
        layers = [f"{prefix}layers.{i}." for i in range(shape.num_hidden_layers)]
        self.layers = [Layer(weights, layer, shape, kernels=kernels, heads_by_group=heads_by_group) for layer in layers]
        self.norm = Norm(weights[f"{prefix}norm.weight"], shape.rms_norm_eps)

    def __call__(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """`x`: [rows, hidden] -> the last layer's output [rows, hidden]. Apply `norm` to the rows that are needed."""
        return self.from_qkv(x, self.layers[0].project(x, rope), rope, attend)

    def from_qkv(self, x: Tensor, qkv: QKV, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """The same, where the first layer's queries, keys and values of x are known."""
        for index, layer in enumerate(self.layers):
            if index:
                qkv = layer.project(x, rope)
            x = layer.finish(x, attend(index, *qkv))
        return x
