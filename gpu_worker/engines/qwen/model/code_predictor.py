"""The code predictor: from the talker's hidden state and codebook 0 to the other 15 codes of a frame.

Owns the predictor's weights, the loop over the codebooks, and the scratch memory of that loop.
The loop is fifteen small forwards with sampling in between, all of fixed shapes and without synchronisation,
so it can be captured as one CUDA graph for each batch size.
Its KV cache lasts for one frame; therefore the cache is scratch memory.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.model_config import GenerationConfig, Shape, TalkerShape
from gpu_worker.engines.qwen.kernels.rotation import Rope
from gpu_worker.engines.qwen.kernels.selection import Kernels
from gpu_worker.engines.qwen.model.attention import Attention
from gpu_worker.engines.qwen.model.layers import Layer, Linear, RopeTables, Stack, matrix, pad_rows, pad_to
from gpu_worker.engines.qwen.runtime.cpu_traces import Run, run_untraced
from gpu_worker.engines.qwen.runtime.products import Rows
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN, Products
from gpu_worker.engines.qwen.tensor_holder import TensorHolder


def first_layer_inputs_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of `CodePredictor.first_layer_inputs`: for published sizes in bfloat16, 280 MiB."""
    return (shape.num_code_groups - 2) * shape.vocab_size * _first_layer_input_values(shape) * dtype.itemsize


def _first_layer_input_values(shape: Shape) -> int:
    """An input, and the first layer's queries, keys and values of it."""
    return shape.hidden_size + (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim


class FrameCache:
    """Scratch memory of one frame at one batch size: keys and values, per layer [rows, groups, kv_heads, head_dim].

    Every view that a forward writes to or reads from is made once: making them took a third of a forward's time.
    """

    def __init__(
        self, attention: Attention, shape: Shape, ropes: RopeTables, rows: int, like: Tensor, *, kernels: Kernels
    ) -> None:
        """`rows`: the padded batch size. `like`: a tensor with the cache's device and dtype."""
        size = (2, rows, shape.num_code_groups, shape.num_key_value_heads, shape.head_dim)
        caches = [like.new_zeros(size) for _ in range(shape.num_hidden_layers)]
        self._attention = attention
        self._fused = kernels.frame_attention if attention.fused else None
        self._rows = rows
        self._caches = [(cache[0], cache[1]) for cache in caches]
        self._first_two = [cache[:, :, :2].unbind() for cache in caches]
        self._written = [[cache[:, :, i].unbind() for i in range(size[2])] for cache in caches]
        self._read = [[cache[:, :, : i + 1].transpose(2, 3).unbind() for i in range(size[2])] for cache in caches]
        heads, kv_heads, hidden = shape.num_attention_heads, shape.num_key_value_heads, shape.hidden_size
        inputs = like.new_zeros(rows, _first_layer_input_values(shape))
        self.inputs = [inputs[:batch] for batch in range(rows + 1)]
        """By batch size: where a forward after the first finds its first layer's input. The rows behind are padding."""
        self.hidden = inputs[:, :hidden]
        self._qkv = inputs[:, hidden:].view(rows, heads + 2 * kv_heads, shape.head_dim)
        self._query_key_value = self._qkv.split_with_sizes((heads, kv_heads, kv_heads), 1)
        self._first_rope = ropes.span(0, 2, rows)
        self._ropes = [self._first_rope, *(ropes.span(i, i + 1) for i in range(1, size[2]))]
        self.bytes = sum(tensor.nbytes for tensor in (*caches, inputs, *self._first_rope))
        self.position = 0
        self.varied: dict[int, list[Tensor]] = {}
        """By codebook: what its forward uses and the others do not, weights included."""

    def tensors(self) -> Iterator[Tensor]:
        """All scratch memory, as the views that forwards use."""
        yield from (*self.inputs, self.hidden, self._qkv, *self._query_key_value, *self._first_rope)
        for views in itertools.chain(self._caches, self._first_two, *self._written, *self._read):
            yield from views

    def at(self, position: int) -> list[Tensor]:
        """The tensors that the forward of this position uses, and those of the others do not."""
        views = (self._written[index][position] + self._read[index][position] for index in range(len(self._caches)))
        return [*self._ropes[position], *itertools.chain(*views)]

    def __call__(self, index: int, layer: Layer, qkv: Tensor) -> Tensor:
        """As Attend. Position 0 brings 2 tokens a row, every other position 1."""
        rope = self._ropes[self.position]
        if self._fused is None:
            return self._attend(index, *layer.rotation(qkv, rope))
        rotation = layer.rotation, rope
        return self._fused(qkv, rotation, self._caches[index], self.position, by_group=self._attention.heads_by_group)

    def attend_known(self) -> Tensor:
        """As Attend, for the first layer, whose queries, keys and values stand in `inputs`."""
        if self._fused is None:
            return self._attend(0, *self._query_key_value)
        return self._fused(self._qkv, None, self._caches[0], self.position, by_group=self._attention.heads_by_group)

    def _attend(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.position == 0:
            query, key, value = (x.unflatten(0, (self._rows, 2)) for x in (query, key, value))
            keys, values = self._first_two[index]
            keys.copy_(key)
            values.copy_(value)
            return self._attention.prefill(query, key, value).reshape(2 * self._rows, -1)
        keys, values = self._written[index][self.position]
        keys.copy_(key)
        values.copy_(value)
        keys, values = self._read[index][self.position]
        query = query.view(self._rows, keys.shape[1], -1, keys.shape[3])
        return self._attention.decode(query, keys, values, None)


class CodePredictor(TensorHolder):
    """Weights of the code predictor, and the loop over a frame's codebooks."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        talker: TalkerShape,
        generation: GenerationConfig,
        attention: Attention,
        codec_table: Tensor,
        *,
        kernels: Kernels,
        products: Products = PLAIN,
    ) -> None:
        """`weights`: the checkpoint's, on the device, in the compute dtype.

        `codec_table`: all code embeddings [vocabulary + 15 * codes, talker hidden], codebook 0 first. Its dtype may
        be smaller.
        """
        prefix = "talker.code_predictor."
        shape = talker.code_predictor_config
        self.groups = shape.num_code_groups
        self._shape = shape
        self._attention = attention
        self._kernels = kernels
        self._top_k = generation.subtalker_top_k
        codebook0, *others = codec_table.split([talker.vocab_size, *[shape.vocab_size] * (self.groups - 1)])
        heads_by_group = attention.heads_by_group
        self.stack = Stack(
            weights, f"{prefix}model.", shape, kernels=kernels, products=products, heads_by_group=heads_by_group
        )
        self._temperature = generation.subtalker_temperature
        # In other dtypes logits are rounded before the temperature divides them. float16 would round the heads.
        like = weights[f"{prefix}model.norm.weight"]
        folds = like.dtype == torch.float32 and products.quantization == "none"
        names = [f"{prefix}lm_head.{i}.weight" for i in range(self.groups - 1)]
        heads: Iterable[Rows] = (matrix(weights, name, products, "sensitive") for name in names)
        if folds:
            whole = self.stack.norm.fold_into([weights[name] for name in names])
            heads = [head / self._temperature for head in whole]
            self._temperature = 1.0
        self.heads = [Linear(head, products=products, part="sensitive") for head in heads]
        self.projection: Linear | None = None
        if talker.hidden_size != shape.hidden_size:
            name = f"{prefix}small_to_mtp_projection"
            self.projection = Linear(weights[f"{name}.weight"], weights[f"{name}.bias"], products)
        self._ropes = RopeTables(shape, self.groups, like.dtype, like.device)
        self.codebook0_embeddings = codebook0 if self.projection is None else self._embed(codebook0)
        """The input for each code of codebook 0, [vocabulary, hidden], perhaps in the dtype of `codec_table`."""
        self.codebooks = list(others[:-1])
        """The embeddings of the codes of codebooks 1 to 14, each [codes, talker hidden]."""
        self.first_layer_inputs = [
            self._first_layer_inputs(codebook, self._ropes.span(position, position + 1))
            for position, codebook in enumerate(self.codebooks, 2)
            if codec_table.is_cuda or not products.weights
        ]
        """For each of these codes: its input, and the first layer's queries, keys and values of that input.

        A codebook is read at one position only, so all this is computed at load: a fifth of a frame's operators less.
        A CPU with large matrices goes without: it would save 5 % of a frame's bytes, for 4 s of one core at load and
        590 MB (0.6B, float32).
        """
        self._caches: dict[int, FrameCache] = {}

    def __call__(self, hidden: Tensor, code: Tensor, uniform: Tensor, run: Run = run_untraced) -> Tensor:
        """One frame's codes, int64 [batch, groups].

        `hidden`: the talker's normed output [batch, talker hidden]. `code`: codebook 0, int64 [batch].
        `uniform`: float32 [batch, groups - 1 or more], one column a code to sample.
        `run`: one trace serves the forwards of all codebooks but the first and the last.
        """
        rows = pad_rows(hidden, self.stack.products.row_multiple).shape[0]
        cache = self._caches.get(rows) or self.allocate_scratch(rows)
        x, *levels = run("first", functools.partial(self._first, cache), hidden, code, uniform)
        codes = [code]
        for group in range(1, self.groups - 1):
            following = functools.partial(self._next, cache, group)
            x, code = run("next", following, x, levels[group - 1], varied=self._varied(cache, group))
            codes.append(code)
        return run("last", self._last, x, levels[self.groups - 2], *codes)[0]

    def _varied(self, cache: FrameCache, group: int) -> list[Tensor]:
        """The tensors that `_next` uses of its own, by codebook."""
        if group not in cache.varied:
            table = (self.first_layer_inputs or self.codebooks)[group - 1]
            cache.varied[group] = [*self.heads[group - 1].tensors(), table, *cache.at(group + 1)]
        return cache.varied[group]

    def _first(self, cache: FrameCache, hidden: Tensor, code: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
        """The input of the head of codebook 1, and the numbers to sample each code with, [batch, 1] each."""
        levels = uniform.t().contiguous().unsqueeze(2).unbind()
        hidden = pad_rows(hidden, self.stack.products.row_multiple)
        rows = hidden.shape[0]
        if self.projection is not None:
            hidden = self.projection(hidden)
        embedded = pad_to(self.codebook0_embeddings.index_select(0, code).to(hidden.dtype), rows)
        x = torch.stack((hidden, embedded), 1).flatten(0, 1)
        cache.position = 0
        return self.stack.norm(self.stack(x, cache).unflatten(0, (rows, 2))[:, 1]), *levels

    def _next(self, cache: FrameCache, group: int, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the head of the next codebook, and the codes of codebook `group`."""
        batch, rows = len(level), len(x)
        cache.position = group + 1
        if self.first_layer_inputs:
            code = self._sample(group, x, level, self.first_layer_inputs[group - 1], cache.inputs[batch])
            return self.stack.normed_from(cache.hidden, cache.attend_known(), cache), code
        code = self._sample(group, x, level)
        embedded = pad_to(self.codebooks[group - 1].index_select(0, code), rows)
        return self.stack.normed(self._embed(embedded), cache), code

    def _last(self, x: Tensor, level: Tensor, *codes: Tensor) -> tuple[Tensor]:
        """All codes of the frame, of which `codes` has all but the last codebook's."""
        return (torch.stack((*codes, self._sample(self.groups - 1, x, level)), 1),)

    def _sample(
        self, group: int, x: Tensor, level: Tensor, table: Tensor | None = None, inputs: Tensor | None = None
    ) -> Tensor:
        """The codes of codebook `group`. Their rows of `table`, if it is given, go into `inputs`."""
        logits = self.heads[group - 1](x)
        logits = logits if len(level) == len(x) else logits[: len(level)]
        return self._kernels.sample_code(logits, level, table, inputs, top_k=self._top_k, temperature=self._temperature)

    def forced_logits(self, hidden: Tensor, codes: Tensor) -> list[Tensor]:
        """The logits of codebooks 1 to 15, divided by the temperature, of a frame whose codes are given: [vocabulary].

        `hidden` [1, talker hidden], `codes` int64 [1, groups]. For comparisons: all are computed in one pass.
        """
        if self.projection is not None:
            hidden = self.projection(hidden)
        codebooks = [
            self.codebook0_embeddings.to(hidden.dtype),
            *(self._embed(codebook) for codebook in self.codebooks),
        ]
        read = [codebook.index_select(0, code) for codebook, code in zip(codebooks, codes[0, :-1, None], strict=True)]
        x = torch.cat((hidden, *read))

        rope = self._ropes.span(0, self.groups)

        def attend(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            del index
            query, key, value = (part[None] for part in layer.rotation(qkv, rope))
            return self._attention.prefill(query, key, value)[0].flatten(1)

        x = self.stack.normed(x, attend)
        return [head(x[i : i + 1])[0] / self._temperature for i, head in enumerate(self.heads, 1)]

    def allocate_scratch(self, rows: int) -> FrameCache:
        """Allocate the scratch memory of a padded batch size. It stays until `release_scratch`."""
        like = self._ropes.cos
        cache = self._caches[rows] = FrameCache(
            self._attention, self._shape, self._ropes, rows, like, kernels=self._kernels
        )
        return cache

    def scratch(self) -> Iterator[Tensor]:
        """The scratch memory of every batch size used so far."""
        for cache in self._caches.values():
            yield from cache.tensors()

    @property
    def scratch_bytes(self) -> int:
        """Device bytes of scratch memory: for published sizes in bfloat16, 320 KiB a row of each batch size."""
        return sum(cache.bytes for cache in self._caches.values())

    def release_scratch(self) -> None:
        """Free scratch memory; the next call allocates it again."""
        self._caches.clear()

    def _embed(self, rows: Tensor) -> Tensor:
        """Rows of the codec table -> inputs [rows, hidden]."""
        rows = rows.to(self._ropes.cos.dtype)
        return rows if self.projection is None else self.projection(rows)

    def _first_layer_inputs(self, rows: Tensor, rope: Rope) -> Tensor:
        """Rows of the codec table, read at one position -> [rows, values of a first-layer input]."""
        x = self._embed(rows)
        first = self.stack.layers[0]
        qkv = first.rotation(first.project(first.input_norm(x)), rope)
        return torch.cat((x, *(part.flatten(1) for part in qkv)), 1)
