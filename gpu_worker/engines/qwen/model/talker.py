"""The talker: prompt in, then one hidden state and one set of codebook-0 logits a frame.

It owns the talker's weights and every slot's keys and values.
Which request sits in which slot, and what is sampled from the logits, is decided elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.checkpoint.model_config import TalkerShape
from gpu_worker.engines.qwen.model.attention import Attention
from gpu_worker.engines.qwen.model.layers import Linear, Rope, Stack, Weights, pad_rows

Rows = Sequence[tuple[int, int]]
"""(slot, tokens to read) of each row whose result matters."""

END: Final = -1
"""Index of the end-of-speech logit: the last row of the reduced head."""


class SlotCache(Weights):
    """Keys and values of all slots: per layer [slots, positions, kv_heads, head_dim]."""

    def __init__(self, shape: TalkerShape, slots: int, positions: int, like: Tensor) -> None:
        size = (slots, positions, shape.num_key_value_heads, shape.head_dim)
        self.keys = [like.new_zeros(size) for _ in range(shape.num_hidden_layers)]
        self.values = [like.new_zeros(size) for _ in range(shape.num_hidden_layers)]


class Prefill:
    """Attend for prompts: writes them from position 0 on and attends causally among them."""

    def __init__(self, cache: SlotCache, attention: Attention, slots: Tensor, tokens: int) -> None:
        self._cache = cache
        self._attention = attention
        self._slots = slots
        self._tokens = tokens

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rows are [prompts * tokens]."""
        query, key, value = (x.unflatten(0, (-1, self._tokens)) for x in (query, key, value))
        self._cache.keys[layer][:, : self._tokens].index_copy_(0, self._slots, key)
        self._cache.values[layer][:, : self._tokens].index_copy_(0, self._slots, value)
        return self._attention.prefill(query, key, value).flatten(2).flatten(0, 1)


class Decode:
    """Attend for one token a slot, of the first slots: writes it at its position, reads what the slot holds."""

    def __init__(self, cache: SlotCache, attention: Attention, positions: Tensor, rows: Rows, reach: int) -> None:
        """positions: int64 [slots used].

        Each of `rows` is read at its own length, and the others are left out.
        Where no rows are given, all read the first `reach` positions, masked: shapes are fixed, as graphs need it.
        """
        self._cache = cache
        self._attention = attention
        self._positions = positions
        self._spans = None if rows else attention.spans(positions + 1, reach)
        self._index = (torch.arange(len(positions), device=positions.device), positions)
        self._rows = rows
        self._reach = reach

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rows are slots 0, 1, …, and padding behind them."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        live = len(self._positions)
        keys.index_put_(self._index, key[:live])
        values.index_put_(self._index, value[:live])
        if not self._rows:
            keys, values = (x[:live, : self._reach].transpose(1, 2) for x in (keys, values))
            return pad_rows(self._attention.decode(query[:live], keys, values, self._spans))
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        out = torch.zeros_like(query).flatten(1)
        for slot, length in self._rows:
            one = slice(slot, slot + 1)
            out[one] = self._attention.decode(query[one], keys[one, :, :length], values[one, :, :length], None)
        return out


class Talker(Weights):
    """Weights of the talker and the caches of its slots."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        shape: TalkerShape,
        attention: Attention,
        table: Tensor,
        *,
        slots: int,
        positions: int,
    ) -> None:
        """`weights`, `table`: as for the Predictor. `positions`: tokens that a slot can hold, prompt and frames."""
        self._attention = attention
        self.stack = Stack(weights, "talker.model.", shape)
        head = weights["talker.codec_head.weight"]
        # Control ids can never be sampled, the end apart: their rows are left out instead of suppressed.
        self.head = Linear(torch.cat((head[: shape.codes], head[shape.codec_eos_token_id][None])))
        self.rope = Rope(shape, positions, table.dtype, table.device)
        self.cache = SlotCache(shape, slots, positions, table)

    def prefill(self, embeds: Tensor, slots: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Read prompts: embeds [prompts, tokens, hidden], padded at the end; slots, lengths: int64 [prompts].

        Returns the last token's normed hidden state [prompts, hidden] and its logits [prompts, codes + 1].
        What padding writes lies behind `lengths`, where frames overwrite it before it is read.
        """
        prompts, tokens, _ = embeds.shape
        attend = Prefill(self.cache, self._attention, slots, tokens)
        x = self.stack(embeds.flatten(0, 1), self.rope.span(0, tokens, prompts), attend)
        last = torch.arange(prompts, device=slots.device) * tokens + lengths - 1
        hidden = self.stack.norm(x.index_select(0, last))
        return hidden, self.head(hidden)

    def step(self, x: Tensor, positions: Tensor, rows: Rows, reach: int) -> tuple[Tensor, Tensor]:
        """One token for each of the first slots: x [slots used, hidden], positions int64 [slots used].

        Returns as `prefill`; see Decode for `rows` and `reach`.
        """
        live = x.shape[0]
        attend = Decode(self.cache, self._attention, positions, rows, reach)
        padded = pad_rows(x)
        rope = self.rope.at(functional.pad(positions, (0, padded.shape[0] - live)))
        hidden = self.stack.norm(self.stack(padded, rope, attend))
        return hidden[:live], self.head(hidden)[:live]
