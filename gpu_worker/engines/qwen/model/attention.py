"""Attention kernels behind one small interface: eager, SDPA or FlashAttention 2.

Owns the choice of the backend and its arithmetic. It holds no caches.
"""

import importlib
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.base import JobError

Backend = Literal["eager", "sdpa", "flash_attention_2"]


class Attention(Protocol):
    """Causal attention of whole prompts, and of one new token a row over a cache."""

    def prefill(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, tokens, heads, dim] over [batch, tokens, kv_heads, dim], causal -> [batch, tokens, heads, dim]."""

    def length_mask(self, lengths: Tensor, tokens: int) -> Tensor:
        """What makes `decode` read the first `lengths` (int64 [rows]) of `tokens` cached tokens, in its backend's form.

        It is made once for all layers of a step: 2 kernels less in each layer.
        """

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with one query a row over the cached tokens that a `length_mask` leaves, or over all of them if None.

        [rows, heads, dim] over [rows, kv_heads, tokens, dim] of any strides -> [rows, heads * dim].
        """


class Eager:
    """The official eager path: scores, float32 softmax, sum, each as a kernel of its own."""

    def prefill(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens, groups = query.shape[1], query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(groups, dim=2).transpose(1, 2) for x in (key, value))
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
        scores = torch.matmul(query.transpose(1, 2), key.transpose(2, 3)) * query.shape[-1] ** -0.5
        weights = functional.softmax(scores.masked_fill(future, float("-inf")), dim=-1, dtype=torch.float32)
        return torch.matmul(weights.to(query.dtype), value).transpose(1, 2)

    def length_mask(self, lengths: Tensor, tokens: int) -> Tensor:
        """True for tokens beyond the length, bool [rows, 1, 1, tokens]."""
        return (torch.arange(tokens, device=lengths.device) >= lengths[:, None])[:, None, None]

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, kv_heads, _, dim = key.shape
        scores = torch.matmul(query.reshape(rows, kv_heads, -1, dim), key.transpose(2, 3)) * dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, value).reshape(rows, -1)


class Sdpa:
    """torch's fused kernels. The query heads of a KV head go in as tokens, so no KV head is repeated."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype`: that of queries, keys and values."""
        self._dtype = dtype

    def prefill(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )

    def length_mask(self, lengths: Tensor, tokens: int) -> Tensor:
        """What is added to the scores: 0 within the length, -inf beyond, [rows, 1, 1, tokens].

        Of a bool mask, the attention of every layer would make this with 3 kernels of its own.
        """
        beyond = torch.arange(tokens, device=lengths.device) >= lengths[:, None]
        zeros = torch.zeros(beyond.shape, dtype=self._dtype, device=lengths.device)
        return zeros.masked_fill_(beyond, float("-inf"))[:, None, None]

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, kv_heads, _, dim = key.shape
        query = query.reshape(rows, kv_heads, -1, dim)
        return functional.scaled_dot_product_attention(query, key, value, mask).reshape(rows, -1)


class Flash:
    """FlashAttention 2: reads each row's true length from the cache, without a mask. CUDA, bfloat16 or float16."""

    def __init__(self, package: Any) -> None:
        self._package = package

    def prefill(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._package.flash_attn_func(query, key, value, causal=True)

    def length_mask(self, lengths: Tensor, tokens: int) -> Tensor:
        """The lengths, int32 [rows]: the kernel needs no mask."""
        del tokens
        return lengths.to(torch.int32)

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        seqlens = key.shape[1] if mask is None else mask
        out = self._package.flash_attn_with_kvcache(query[:, None], key, value, cache_seqlens=seqlens)
        return out.flatten(1)


def attention(backend: Backend, device: torch.device, dtype: torch.dtype) -> Attention:
    """The attention of `backend`.

    Raises:
        JobError: `model_unavailable` where it cannot run here. Another backend is never taken instead.
    """
    if backend == "eager":
        return Eager()
    if backend == "sdpa":
        return Sdpa(dtype)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise JobError(
            "model_unavailable",
            f"flash_attention_2 needs CUDA and bfloat16 or float16, not {device.type} and {dtype}; use sdpa",
        )
    try:
        package = importlib.import_module("flash_attn")
    except ImportError as error:
        raise JobError("model_unavailable", "flash_attention_2 needs the flash-attn package; use sdpa") from error
    return Flash(package)
