"""The talker's KV cache: keys and values of every slot, and attention over them.

Owns the cache and how prefill and decode write to it and read from it. The attention kernels are attention.py's.
The code predictor's cache lasts for one frame and stands in code_predictor.py.
"""

import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.model_config import TalkerShape
from gpu_worker.engines.qwen.kernels.rotation import Rope
from gpu_worker.engines.qwen.kernels.selection import Kernels
from gpu_worker.engines.qwen.model.attention import Attention
from gpu_worker.engines.qwen.model.layers import Attend, Layer, pad_to
from gpu_worker.engines.qwen.runtime.lazy_zeros import lazy_zeros
from gpu_worker.engines.qwen.tensor_holder import TensorHolder


class KVCache(TensorHolder):
    """Keys and values of all slots: per layer [slots, max_model_len, kv_heads, head_dim]."""

    def __init__(
        self,
        shape: TalkerShape,
        attention: Attention,
        slots: int,
        max_model_len: int,
        like: Tensor,
        *,
        kernels: Kernels,
    ) -> None:
        """`like`: a tensor with the cache's device and dtype."""
        size = (slots, max_model_len, shape.num_key_value_heads, shape.head_dim)
        self.max_model_len = max_model_len
        self.reads_lengths = attention.reads_lengths
        self.heads_by_group = attention.heads_by_group
        self._attention = attention
        self._rotate_and_cache = kernels.rotate_and_cache
        self._groups = shape.num_attention_heads // shape.num_key_value_heads
        self.keys = [lazy_zeros(like, *size) for _ in range(shape.num_hidden_layers)]
        self.values = [lazy_zeros(like, *size) for _ in range(shape.num_hidden_layers)]

    def rows(self, slot: int, tokens: int) -> list[Tensor]:
        """Views of the keys and values of the first `tokens` positions of a slot, one a layer."""
        return [tensor[slot, :tokens] for tensor in (*self.keys, *self.values)]

    @property
    def token_bytes(self) -> int:
        """Bytes of one position of a slot."""
        return 2 * len(self.keys) * self.keys[0][0, 0].nbytes

    def prefill_attend(self, slots: Tensor, tokens: int, rope: Rope, *, prefix: int = 0, start: int = 0) -> Attend:
        """The Attend of prompts: writes them to the cache, and attends causally among their tokens.

        `slots`: int64 [prompts]. `tokens`: the length that the prompts are padded to.
        Its rows are [prompts * (tokens - start)], those of the positions from `start` on; the cache holds the others.
        `prefix`: of a single prompt, as many first positions attend in a call of their own. What follows them attends
        over the cache, so its bits do not depend on whether `start` is 0 or `prefix`.
        """
        positions = torch.arange(start, tokens, device=slots.device).repeat(len(slots))
        places = slots[:, None].repeat(1, tokens - start).flatten(), positions
        slot = int(slots[0]) if prefix else 0

        def attend(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            cache = self.keys[index], self.values[index]
            query, key, value = self._rotate_and_cache(qkv, layer.rotation, rope, cache, places, by_group=False)
            query, key, value = (x.unflatten(0, (-1, tokens - start)) for x in (query.flatten(1, 2), key, value))
            if not prefix:
                return self._attention.prefill(query, key, value).flatten(2).flatten(0, 1)
            cached = (x[slot : slot + 1, :tokens] for x in cache)
            attended = [self._attention.prefill(query[:, prefix - start :], *cached)]
            if start < prefix:
                attended.insert(0, self._attention.prefill(*(x[:, :prefix] for x in (query, key, value))))
            return torch.cat([x.flatten(2).flatten(0, 1) for x in attended])

        return attend

    def decode_attend(self, positions: Tensor, lengths: Tensor, kv_len: int, rope: Rope) -> Attend:
        """The Attend of one token a slot, for slots 0 to batch - 1: writes it at its position, reads the slot's cache.

        `positions`: int64 [batch], where each slot's token goes. Its rows are the slots, and padding behind them.
        Each slot reads its first `lengths` (int64 [batch]) of `kv_len` positions: as graphs need, shapes are fixed.
        With a `kv_len` of 0, each slot is computed by itself at its own length.
        """
        batch = len(positions)
        places = torch.arange(batch, device=positions.device), positions
        mask = self._attention.length_mask(lengths, kv_len, self._groups) if kv_len else None
        ends = [] if kv_len else lengths.tolist()

        def attend(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            cache = self.keys[index], self.values[index]
            query, _, _ = self._rotate_and_cache(
                qkv[:batch], layer.rotation, rope, cache, places, by_group=self._attention.queries_by_group
            )
            if kv_len:
                keys, values = (x[:batch, :kv_len].transpose(1, 2) for x in cache)
                return pad_to(self._attention.decode(query, keys, values, mask), len(qkv))
            rows = []
            for slot, end in enumerate(ends):
                one = slice(slot, slot + 1)
                keys, values = (x[one, :end].transpose(1, 2) for x in cache)
                rows.append(self._attention.decode(query[one], keys, values, None))
            return pad_to(torch.cat(rows), len(qkv))

        return attend
