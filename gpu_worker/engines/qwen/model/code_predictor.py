"""The code predictor: from the talker's hidden state and codebook 0 to the other 15 codes of a frame.

Fifteen small forwards with sampling in between, all of fixed shapes and without a look at the host:
as one function it is one CUDA graph a batch size.
Nothing survives a frame, so its key/value cache is scratch memory.
"""

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.model_config import GenerationConfig, Shape, TalkerShape
from gpu_worker.engines.qwen.model.attention import Attention
from gpu_worker.engines.qwen.model.layers import Linear, Projected, Rope, Stack, Weights, pad_rows
from gpu_worker.engines.qwen.model.sampling import sample_fixed


def entries_shape(shape: Shape) -> tuple[int, int]:
    """(entries, values in each) of all that is known beforehand: see Predictor.entries."""
    projected = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
    return (shape.num_code_groups - 2) * shape.vocab_size, shape.hidden_size + projected


class FrameCache:
    """Keys and values of one frame's forwards: per layer [rows, groups, kv_heads, head_dim].

    Where each forward writes and what it reads are views, made once: making them took a third of a forward's time.
    """

    def __init__(self, attention: Attention, shape: Shape, rope: Rope, rows: int, like: Tensor) -> None:
        size = (2, rows, shape.num_code_groups, shape.num_key_value_heads, shape.head_dim)
        caches = [like.new_zeros(size) for _ in range(shape.num_hidden_layers)]
        self._attention = attention
        self._rows = rows
        self._first = [cache[:, :, :2].unbind() for cache in caches]
        self._new = [[cache[:, :, i].unbind() for i in range(size[2])] for cache in caches]
        self._seen = [[cache[:, :, : i + 1].transpose(2, 3).unbind() for i in range(size[2])] for cache in caches]
        heads, kv_heads, hidden = shape.num_attention_heads, shape.num_key_value_heads, shape.hidden_size
        entry = like.new_zeros(rows, entries_shape(shape)[1])
        self.entries = [entry[:live] for live in range(rows + 1)]
        """Where to put what a forward after the first begins with, for so many rows; behind them is padding."""
        self.input = entry[:, :hidden]
        projected = entry[:, hidden:].view(rows, heads + 2 * kv_heads, shape.head_dim)
        query, key, value = projected.split_with_sizes((heads, kv_heads, kv_heads), 1)
        self.projected: Projected = query, key, value
        self.first_rope = rope.span(0, 2, rows)
        self.bytes = sum(tensor.nbytes for tensor in (*caches, entry, *self.first_rope))
        self.position = 0

    def tensors(self) -> Iterator[Tensor]:
        """All scratch memory, as it is written and read."""
        yield from (*self.entries, self.input, *self.projected, *self.first_rope)
        for views in itertools.chain(self._first, *self._new, *self._seen):
            yield from views

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend: position 0 brings 2 tokens a row, the others 1."""
        if self.position == 0:
            query, key, value = (x.unflatten(0, (self._rows, 2)) for x in (query, key, value))
            keys, values = self._first[layer]
            keys.copy_(key)
            values.copy_(value)
            return self._attention.prefill(query, key, value).reshape(2 * self._rows, -1)
        keys, values = self._new[layer][self.position]
        keys.copy_(key)
        values.copy_(value)
        keys, values = self._seen[layer][self.position]
        return self._attention.decode(query, keys, values, None)


class CodePredictor(Weights):
    """Weights of the code predictor, and the frame's loop."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        talker: TalkerShape,
        generation: GenerationConfig,
        attention: Attention,
        table: Tensor,
    ) -> None:
        """`weights`: the checkpoint's, on the device, in the compute dtype.

        `table`: all codec embeddings [vocabulary + 15 * codes, talker hidden], codebook 0 first.
        """
        prefix = "talker.code_predictor."
        shape = talker.code_predictor_config
        self.groups = shape.num_code_groups
        self._shape = shape
        self._attention = attention
        self._top_k = generation.subtalker_top_k
        first, *rest = table.split([talker.vocab_size, *[shape.vocab_size] * (self.groups - 1)])
        self.stack = Stack(weights, f"{prefix}model.", shape)
        heads = self.stack.norm.fold_into([weights[f"{prefix}lm_head.{i}.weight"] for i in range(self.groups - 1)])
        self._temperature = generation.subtalker_temperature
        if heads[0].dtype == torch.float32:  # elsewhere logits are rounded before they are divided
            heads = [head / self._temperature for head in heads]
            self._temperature = 1.0
        self.heads = [Linear(head) for head in heads]
        self.projection: Linear | None = None
        if talker.hidden_size != shape.hidden_size:
            self.projection = Linear(
                weights[f"{prefix}small_to_mtp_projection.weight"], weights[f"{prefix}small_to_mtp_projection.bias"]
            )
        self._rope = Rope(shape, self.groups, table.dtype, table.device)
        self._turns = [self._rope.span(i, i + 1) for i in range(self.groups)]
        self.first = self._embeddings(first)
        """What is read for each code of codebook 0, [vocabulary, hidden]."""
        self.entries = [
            self._entries(codebook, turn) for codebook, turn in zip(rest[:-1], self._turns[2:], strict=True)
        ]
        """The same for each code of the others but the last, and what the first layer projects it to: entries_shape.

        A codebook is read at one position only, so this is known beforehand: a fifth of a frame's operators less.
        """
        self._caches: dict[int, FrameCache] = {}

    def __call__(self, hidden: Tensor, code: Tensor, uniform: Tensor) -> Tensor:
        """One frame's codes, int64 [rows, groups].

        hidden: the talker's normed output [rows, talker hidden]; code: codebook 0, int64 [rows];
        uniform: float32 [rows, groups - 1 or more], one column a code to choose.
        """
        live = hidden.shape[0]
        hidden = pad_rows(hidden)
        rows = hidden.shape[0]
        cache = self._caches.get(rows)
        if cache is None:
            cache = self._caches[rows] = FrameCache(self._attention, self._shape, self._rope, rows, self.first)
        levels = uniform.t().contiguous().unsqueeze(2).unbind()  # one [rows, 1] a group
        codes = [code]
        if self.projection is not None:
            hidden = self.projection(hidden)
        embedded = pad_rows(self.first.index_select(0, code))
        x = torch.stack((hidden, embedded), 1).flatten(0, 1)
        cache.position = 0
        x = self.stack(x, cache.first_rope, cache).unflatten(0, (rows, 2))[:, 1]
        entry = cache.entries[live]
        for group in range(1, self.groups):
            logits = self.heads[group - 1](self.stack.norm(x))
            code = self._choose(logits if live == rows else logits[:live], levels[group - 1])
            codes.append(code)
            if group < self.groups - 1:
                cache.position = group + 1
                torch.index_select(self.entries[group - 1], 0, code, out=entry)
                x = self.stack.resume(cache.input, cache.projected, self._turns[group + 1], cache)
        return torch.stack(codes, 1)

    def scratch(self) -> Iterator[Tensor]:
        """What frames write into and read again."""
        for cache in self._caches.values():
            yield from cache.tensors()

    @property
    def scratch_bytes(self) -> int:
        """Device bytes of scratch memory: 320 KiB a row of each batch size in bfloat16, as published."""
        return sum(cache.bytes for cache in self._caches.values())

    def forget(self) -> None:
        """Drop scratch memory; it comes back when it is needed."""
        self._caches.clear()

    def _embeddings(self, rows: Tensor) -> Tensor:
        """Rows of the table -> [rows, hidden]."""
        return rows if self.projection is None else self.projection(rows)

    def _entries(self, rows: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Rows of the table, read at one position -> [rows, values of an entry]."""
        x = self._embeddings(rows)
        return torch.cat((x, *(part.flatten(1) for part in self.stack.layers[0].project(x, turn))), 1)

    def _choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        return sample_fixed(logits, uniform, top_k=self._top_k, temperature=self._temperature)
