"""Transformer blocks shared by the talker and the code predictor: fused projections, norms, rotary positions.

Owns the weights and the arithmetic of a block, with the rounding points of the official modules.
It holds no caches: keys and values go to the Attend that the caller passes.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.checkpoint.model_config import Shape
from gpu_worker.engines.qwen.checkpoint.tensor_files import LazyTensors, StoredRows
from gpu_worker.engines.qwen.kernels.norm import Norm
from gpu_worker.engines.qwen.kernels.rotation import Rotation
from gpu_worker.engines.qwen.kernels.selection import Kernels
from gpu_worker.engines.qwen.model.attention import by_group
from gpu_worker.engines.qwen.runtime.cpu_traces import Run, run_untraced
from gpu_worker.engines.qwen.runtime.cuda_products import CUDA_KERNELS
from gpu_worker.engines.qwen.runtime.products import BATCH_MULTIPLE, KERNELS, Rows, by_size, reads_in_parts
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN, Part, Products
from gpu_worker.engines.qwen.tensor_holder import TensorHolder

_KERNELS: Final = {**KERNELS, **CUDA_KERNELS}

ALIGNED_OUTPUTS: Final = 8
"""cuBLAS has its fast kernels only for rows of 16 bytes: for 8 outputs in bfloat16."""


class Linear(TensorHolder):
    """y = x Wᵀ + b, by the kernel that `products` name."""

    def __init__(
        self,
        weight: Rows | Sequence[Rows],
        bias: Tensor | None = None,
        products: Products = PLAIN,
        *,
        part: Part = "weights",
        columns: Tensor | None = None,
    ) -> None:
        """`part`: "sensitive" if the matrix is one of those that are quantised less.

        A kernel that reads in parts takes several matrices, whose outputs follow each other, as one `weight`.
        `columns`: by what such a kernel multiplies each column.
        """
        name = products.of(part) or by_size(weight)  # type: ignore[arg-type]  # parts are for kernels with a name
        make = _KERNELS[name]
        self._kernel = make(weight, bias) if columns is None else make(weight, bias, columns)
        self.packed = name != "plain"
        self._tensors: list[Tensor] = self._kernel.tensors
        self.hidden_bytes: int = self._kernel.hidden_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """`x`: [rows, in] -> [rows, out]."""
        return self._kernel(x)

    def batch_invariant(self, x: Tensor) -> Tensor:
        """The same for any number of rows: on CPU they are padded, so that a row's bits do not depend on the others."""
        padded = pad_rows(x)
        return self(x) if padded is x else self(padded)[: x.shape[0]]

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` + x Wᵀ, for a product without bias."""
        return self._kernel.add_to(y, x)


def pad_rows(x: Tensor, multiple: int = BATCH_MULTIPLE) -> Tensor:
    """On CPU, x with rows of zeros behind it up to a multiple of `multiple`; elsewhere x."""
    return x if x.is_cuda else pad_to(x, x.shape[0] + -x.shape[0] % multiple)


def pad_to(x: Tensor, rows: int) -> Tensor:
    """`x` with rows of zeros behind it, `rows` in all."""
    extra = rows - x.shape[0]
    return functional.pad(x, (0, 0) * (x.ndim - 1) + (0, extra)) if extra else x


def aligned(matrix: Tensor) -> Tensor:
    """On CUDA, `matrix` [out, in] with rows of zeros up to a multiple of ALIGNED_OUTPUTS; elsewhere `matrix`."""
    extra = -matrix.shape[0] % ALIGNED_OUTPUTS
    return functional.pad(matrix, (0, 0, 0, extra)) if matrix.is_cuda and extra else matrix


def matrix(weights: Mapping[str, Tensor], name: str, products: Products, part: Part = "weights") -> Tensor | StoredRows:
    """A matrix of a checkpoint. It stays in its file if its kernel reads it in parts."""
    if isinstance(weights, LazyTensors) and reads_in_parts(products.of(part)):
        return weights.rows(name)
    return weights[name]


def as_stored(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of a checkpoint in the dtype of its file, if that is known and no larger than that of `weights`."""
    return weights.as_stored(name) if isinstance(weights, LazyTensors) else weights[name]


class RopeTables(TensorHolder):
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


class Attend(Protocol):
    """Attention over a cache, layer by layer."""

    def __call__(self, index: int, layer: "Layer", qkv: Tensor) -> Tensor:
        """Norm and rotate queries and keys, write the new keys and values to the cache of layer `index`, and attend.

        `qkv`: what `layer.project` returns -> [rows, heads * head_dim].
        """


class Layer(TensorHolder):
    """One pre-norm block: attention with a norm of each head's query and key, then SwiGLU."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        prefix: str,
        shape: Shape,
        *,
        kernels: Kernels,
        products: Products,
        heads_by_group: bool,
    ) -> None:
        """`heads_by_group`: the order of the heads that attention returns, see Attention."""

        def one(name: str, part: Part = "weights") -> Tensor | StoredRows:
            return matrix(weights, f"{prefix}{name}.weight", products, part)

        def fused(*names: str, behind: Norm, part: Part = "weights") -> Linear:
            if reads_in_parts(products.of(part)):
                matrices = [one(name, part) for name in names]
                return Linear(matrices, products=products, part=part, columns=behind.leave_weight())
            whole = torch.cat([weights[f"{prefix}{name}.weight"] for name in names])
            return Linear(behind.fold_into([whole])[0] if products.folds else whole, products=products, part=part)

        self.heads = shape.num_attention_heads
        self.kv_heads = shape.num_key_value_heads
        self.head_dim = shape.head_dim
        self.kernels = kernels
        self.input_norm = Norm(weights[f"{prefix}input_layernorm.weight"], shape.rms_norm_eps)
        self.post_norm = Norm(weights[f"{prefix}post_attention_layernorm.weight"], shape.rms_norm_eps)
        query, key = (weights[f"{prefix}self_attn.{name}_norm.weight"] for name in "qk")
        self.rotation = Rotation(query, key, self.heads, self.kv_heads, shape.rms_norm_eps)
        self.qkv = fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", behind=self.input_norm)
        if heads_by_group:
            by_head = weights[f"{prefix}self_attn.o_proj.weight"].unflatten(1, (self.heads, self.head_dim))
            self.out = Linear(by_group(by_head, self.kv_heads).flatten(1), products=products)
        else:
            self.out = Linear(one("self_attn.o_proj"), products=products)
        self.gate_up = fused("mlp.gate_proj", "mlp.up_proj", behind=self.post_norm, part="gate_up")
        self.down = Linear(one("mlp.down_proj", "sensitive"), products=products, part="sensitive")

    def project(self, normed: Tensor) -> Tensor:
        """The layer's input behind `input_norm`, [rows, hidden] -> [rows, heads + 2 * kv_heads, head_dim]."""
        return self.qkv(normed).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """`x` [rows, hidden] and attention's output [rows, heads * head_dim] -> the block's output [rows, hidden]."""
        x, gated = self._gated(x, attended)
        return self.down.add_to(x, gated)

    def finish_normed(self, x: Tensor, attended: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """The same, and the norm of the output."""
        x, gated = self._gated(x, attended)
        return self._add_normed(x, self.down, gated, norm)

    def _gated(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The sum behind attention, and what the last projection reads."""
        x, normed = self._add_normed(x, self.out, attended, self.post_norm)
        return x, self.kernels.silu_mul(self.gate_up(normed))

    def _add_normed(self, x: Tensor, linear: Linear, y: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """`x` + linear(y), and its norm."""
        if x.dtype == torch.float32:  # the product adds
            x = linear.add_to(x, y)
            return x, norm(x)
        return self.kernels.add_norm(x, linear(y), norm)


class Stack(TensorHolder):
    """The blocks and the final norm."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        prefix: str,
        shape: Shape,
        *,
        kernels: Kernels,
        products: Products,
        heads_by_group: bool,
    ) -> None:
        layers = [f"{prefix}layers.{i}." for i in range(shape.num_hidden_layers)]
        self.products = products
        self.layers = [
            Layer(weights, layer, shape, kernels=kernels, products=products, heads_by_group=heads_by_group)
            for layer in layers
        ]
        self.norm = Norm(weights[f"{prefix}norm.weight"], shape.rms_norm_eps)
        self._tensors_between: dict[int, list[Tensor]] = {}

    def __call__(self, x: Tensor, attend: Attend) -> Tensor:
        """`x`: [rows, hidden] -> the last layer's output [rows, hidden]. Apply `norm` to the rows that are needed."""
        x, attended = self._up_to_last(x, self._first_attended(x, attend), attend)
        return self.layers[-1].finish(x, attended)

    def normed(self, x: Tensor, attend: Attend, run: Run = run_untraced) -> Tensor:
        """`x`: [rows, hidden] -> the norm of the last layer's output, for callers that need every row.

        `run` runs what is between the attention of two layers; one trace serves all layers.
        """
        return self.normed_from(x, self._first_attended(x, attend), attend, run)

    def normed_from(self, x: Tensor, attended: Tensor, attend: Attend, run: Run = run_untraced) -> Tensor:
        """As `normed`, where the output of the first layer's attention is known."""
        x, attended = self._up_to_last(x, attended, attend, run)
        return self.layers[-1].finish_normed(x, attended, self.norm)[1]

    def _first_attended(self, x: Tensor, attend: Attend) -> Tensor:
        first = self.layers[0]
        return attend(0, first, first.project(first.input_norm(x)))

    def _up_to_last(
        self, x: Tensor, attended: Tensor, attend: Attend, run: Run = run_untraced
    ) -> tuple[Tensor, Tensor]:
        """From the output of the first layer's attention to the last layer's input and its attention's output."""
        for index in range(1, len(self.layers)):
            projected = functools.partial(self._projected, index)
            x, qkv = run("between_layers", projected, x, attended, varied=self._varied(index))
            attended = attend(index, self.layers[index], qkv)
        return x, attended

    def _projected(self, index: int, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """From the input of layer `index` - 1 and its attention's output to the input of layer `index`, projected."""
        following = self.layers[index]
        x, normed = self.layers[index - 1].finish_normed(x, attended, following.input_norm)
        return x, following.project(normed)

    def _varied(self, index: int) -> list[Tensor]:
        """The tensors of layers `index` - 1 and `index`."""
        if index not in self._tensors_between:
            held = itertools.chain.from_iterable(layer.tensors() for layer in self.layers[index - 1 : index + 1])
            self._tensors_between[index] = list({id(tensor): tensor for tensor in held}.values())
        return self._tensors_between[index]
