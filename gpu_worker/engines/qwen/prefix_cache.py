"""Keys and values of the constant beginnings of prompts, so that a prefill computes only what follows them.

PrefixCache owns the copies and their bound. Each is found by the embeddings that it was computed from, never by a name:
another voice, language or instruction is another entry, and equal embeddings have equal keys and values.
"""

import hashlib
from collections import OrderedDict
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.qwen.model.kv_cache import KVCache
from shared.protocol import CacheStats

MAX_PREFIX_BYTES: Final = 32 << 20
"""Of kept keys and values. In float32 a position of a published model takes 224 KiB, a preset voice 9 positions."""


class PrefixCache:
    """Keeps the most recently used prefixes."""

    def __init__(self, cache: KVCache, max_bytes: int = MAX_PREFIX_BYTES) -> None:
        self._cache = cache
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, list[Tensor]] = OrderedDict()
        self._hits = self._misses = 0
        self.bytes = 0
        """Bytes of the kept keys and values."""

    @staticmethod
    def key(embeds: Tensor) -> bytes:
        """What a prefix is found by. `embeds`: those of the prefix, [tokens, hidden]."""
        return hashlib.sha256(embeds.contiguous().view(torch.uint8).numpy().tobytes()).digest()

    def load(self, slot: int, key: bytes) -> bool:
        """Copy the keys and values of a prefix to the first positions of a slot. Returns False if none are kept."""
        kept = self._kept.get(key)
        if kept is None:
            self._misses += 1
            return False
        self._hits += 1
        self._kept.move_to_end(key)
        for row, copy in zip(self._cache.rows(slot, len(kept[0])), kept, strict=True):
            row.copy_(copy)
        return True

    def keep(self, slot: int, key: bytes, tokens: int) -> None:
        """Keep the keys and values that a slot holds of a prefix of so many tokens, which `load` did not find."""
        size = tokens * self._cache.token_bytes
        if size > self._max_bytes:
            return
        # One tensor for all layers: its memory goes back to the system when it is dropped.
        self._kept[key] = list(torch.stack(self._cache.rows(slot, tokens)))
        self.bytes += size
        while self.bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= sum(copy.nbytes for copy in oldest)

    def stats(self) -> CacheStats:
        """The kept prefixes."""
        return CacheStats(
            name="prefixes", entries=len(self._kept), bytes=self.bytes, hits=self._hits, misses=self._misses
        )

    def clear(self) -> None:
        """Free all."""
        self._kept.clear()
        self.bytes = 0
