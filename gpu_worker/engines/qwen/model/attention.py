"""Attention kernels behind one small interface: eager, SDPA or FlashAttention 2, all of them torch's own.

Owns the choice of the backend and its arithmetic. It holds no caches.
"""

import functools
import math
from typing import Any, Final, Literal, Protocol

import structlog
import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.runtime.products import BATCH_MULTIPLE

Backend = Literal["auto", "eager", "sdpa", "flash_attention_2"]

FLASH_CAPABILITY: Final = (8, 0)
"""The compute capability from which torch has FlashAttention 2: Ampere."""

FLASH_TOLERANCE: Final = 0.02
"""How far FlashAttention 2 may be from SDPA for values around 1: both round to the dtype, at other places."""

FEW_KEYS: Final = 16
"""Up to so many keys, those of a frame of the code predictor, a CPU attends with full groups of queries.

Each thread of torch has its part of one scratch memory. With two queries and an odd number of keys a part begins
off 16 bytes, where MKL sums in another order: a row's bits would depend on the thread, and so on the rows before it.
Of more keys, as the talker has them, rows come alone on a CPU: a head always has the same thread.
"""

log = structlog.get_logger(__name__)


class Attention(Protocol):
    """Causal attention of whole prompts, and of one new token a row over a cache.

    `reads_lengths`: a row costs what its own length costs, however many tokens are passed. Then one graph serves all.
    `heads_by_group`: results have the first query head of every KV head in front, then the second, as fused kernels
    leave them: a copy less in each layer. Otherwise all heads of the first KV head are in front. Queries always are so.
    `queries_by_group`: `decode` copies less if queries have that order in memory.
    `fused`: scores are not rounded to the dtype, so another kernel that keeps them in float32 may do the same.
    """

    fused: bool
    reads_lengths: bool
    queries_by_group: bool
    heads_by_group: bool

    def prefill(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, queries, heads, dim] over [batch, tokens, kv_heads, dim], causal -> [batch, queries, heads, dim].

        The queries are those of the last tokens, or of all.
        """

    def length_mask(self, lengths: Tensor, tokens: int, groups: int) -> Any:
        """The mask, in its backend's form, for `decode` to read the first `lengths` (int64 [rows]) of `tokens` tokens.

        `groups`: query heads of a KV head. It is made once for all layers of a step: 2 kernels less in each layer.
        """

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        """Attend with one token a row over the cached tokens that a `length_mask` leaves, or over all of them if None.

        [rows, kv_heads, heads of one KV head, dim] over [rows, kv_heads, tokens, dim], all of any strides
        -> [rows, heads * dim].
        """


class Eager:
    """The official eager path: scores, float32 softmax, sum, each as a kernel of its own.

    For comparisons: with several threads of a CPU, a row's last bits depend on its batch.
    """

    fused = False
    reads_lengths = False
    heads_by_group = False
    queries_by_group = False

    def prefill(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries, tokens, groups = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(groups, dim=2).transpose(1, 2) for x in (key, value))
        future = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).triu(1 + tokens - queries)
        scores = torch.matmul(query.transpose(1, 2), key.transpose(2, 3)) * query.shape[-1] ** -0.5
        weights = functional.softmax(scores.masked_fill(future, float("-inf")), dim=-1, dtype=torch.float32)
        return torch.matmul(weights.to(query.dtype), value).transpose(1, 2)

    def length_mask(self, lengths: Tensor, tokens: int, groups: int) -> Tensor:
        """True for tokens beyond the length, bool [rows, 1, 1, tokens]."""
        del groups
        return (torch.arange(tokens, device=lengths.device) >= lengths[:, None])[:, None, None]

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, value).reshape(query.shape[0], -1)


class Sdpa:
    """torch's fused kernels. The query heads of a KV head go in as tokens, so no KV head is repeated."""

    fused = True
    reads_lengths = False
    queries_by_group = False

    def __init__(self, dtype: torch.dtype, *, heads_by_group: bool = False) -> None:
        """`dtype`: that of queries, keys and values."""
        self._dtype = dtype
        self.heads_by_group = heads_by_group

    def prefill(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        queries, tokens = query.shape[2], key.shape[2]
        mask = None
        if queries < tokens:  # is_causal would take them for the first ones
            mask = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)
        out = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)
        out = out.transpose(1, 2)
        return by_group(out, key.shape[1]) if self.heads_by_group else out

    def length_mask(self, lengths: Tensor, tokens: int, groups: int) -> Tensor:
        """The summand of the scores: 0 within the length, -inf beyond, [rows, 1, 1, tokens].

        Of a bool mask, the attention of every layer would make this with 3 kernels of its own.
        """
        del groups
        beyond = torch.arange(tokens, device=lengths.device) >= lengths[:, None]
        zeros = torch.zeros(beyond.shape, dtype=self._dtype, device=lengths.device)
        return zeros.masked_fill_(beyond, float("-inf"))[:, None, None]

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        queries = query.shape[2]
        if not query.is_cuda and key.shape[2] <= FEW_KEYS and queries % BATCH_MULTIPLE:
            query = torch.cat([query] * (BATCH_MULTIPLE // math.gcd(queries, BATCH_MULTIPLE)), 2)
        out = functional.scaled_dot_product_attention(query, key, value, mask)
        if query.shape[2] > queries:
            out = out.narrow(2, 0, queries)
        return (out.transpose(1, 2) if self.heads_by_group else out).reshape(query.shape[0], -1)


class Flash(Sdpa):
    """SDPA for prompts and short caches; torch's FlashAttention 2 for rows of different lengths.

    Under a mask, SDPA reads for every row as many tokens as the longest one has. This kernel stops at a row's length.
    It does not split a row among thread blocks, so a row's bits do not depend on the others.
    CUDA, bfloat16 or float16.
    """

    reads_lengths = True
    queries_by_group = True

    def length_mask(self, lengths: Tensor, tokens: int, groups: int) -> Any:
        """The lengths, int32 [rows], and where each row's queries and keys begin: int32 [rows + 1]."""
        begins = torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        return lengths.to(torch.int32), begins * groups, begins * tokens

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        if mask is None:
            return super().decode(query, key, value, None)
        rows, kv_heads, groups, dim = query.shape
        tokens = key.shape[2]
        # The query heads of a KV head are tokens of one row, as in Sdpa: with one token, the kernel would copy thrice.
        query = query.transpose(1, 2).reshape(-1, kv_heads, dim)
        key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
        out = flash_kernel((query, key, value), mask, groups, tokens)
        out = out.view(rows, groups, kv_heads, dim)
        return (out if self.heads_by_group else out.transpose(1, 2)).reshape(rows, -1)


def by_group(heads: Tensor, kv_heads: int) -> Tensor:
    """Reorder [..., heads, dim] for `heads_by_group`."""
    return heads.unflatten(-2, (kv_heads, -1)).transpose(-3, -2).flatten(-3, -2)


def flash_kernel(
    tensors: tuple[Tensor, Tensor, Tensor], mask: tuple[Tensor, Tensor, Tensor], queries: int, keys: int
) -> Tensor:
    """Attention of rows that lie one behind the other, each with `queries` queries and `keys` keys.

    `tensors`: queries [rows * queries, heads, dim], keys and values [rows * keys, heads, dim].
    `mask`: see Flash.length_mask. Of its keys, a row reads as many as its length says.
    """
    lengths, queries_begin, keys_begin = mask
    return torch.ops.aten._flash_attention_forward(  # noqa: SLF001 -- the public varlen_attn is younger than torch 2.11
        *tensors,
        queries_begin,
        keys_begin,
        queries,
        keys,
        0.0,  # dropout
        False,  # causal
        False,  # debug output
        seqused_k=lengths,
    )[0]


def attention(backend: Backend, device: torch.device, dtype: torch.dtype) -> Attention:
    """The attention of `backend`. "auto" is FlashAttention 2 where it can run and agrees with SDPA, and else SDPA.

    Raises:
        JobError: `model_unavailable` where it cannot run here. Another backend is never taken instead.
    """
    if backend == "eager":
        return Eager()
    if backend == "sdpa" or (backend == "auto" and not _flash_agrees(device, dtype)):
        return Sdpa(dtype, heads_by_group=device.type == "cuda")
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise JobError(
            "model_unavailable",
            "TTS_ATTENTION_BACKEND=flash_attention_2 needs CUDA and bfloat16 or float16, "
            f"not {device.type} and {str(dtype).removeprefix('torch.')}; use sdpa",
        )
    return Flash(dtype, heads_by_group=True)


@functools.cache
def _flash_agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """True if FlashAttention 2 runs on the device, and gives what SDPA gives. One trial for the process."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.cuda.get_device_capability() < FLASH_CAPABILITY:
        return False
    try:
        difference = difference_from_sdpa(Flash(dtype, heads_by_group=True), device, dtype)
    except (RuntimeError, TypeError) as error:
        log.warning("flash_attention_left_out", reason=str(error))
        return False
    if not difference <= FLASH_TOLERANCE:
        log.warning("flash_attention_left_out", reason=f"it differs from SDPA by {difference}")
        return False
    return True


def difference_from_sdpa(flash: Flash, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between both over rows of several lengths, for random values."""
    rows, heads, kv_heads, tokens, dim = 4, 16, 8, 300, 128
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, rows, tokens, kv_heads, dim, generator=generator).to(device, dtype)
    query = torch.randn(rows, kv_heads, heads // kv_heads, dim, generator=generator).to(device, dtype)
    key, value = cache.transpose(2, 3).unbind()
    lengths = torch.tensor([1, 64, 129, tokens], device=device)
    ours, wanted = (
        backend.decode(query, key, value, backend.length_mask(lengths, tokens, heads // kv_heads))
        for backend in (flash, Sdpa(dtype, heads_by_group=flash.heads_by_group))
    )
    return float((ours.float() - wanted.float()).abs().max())
