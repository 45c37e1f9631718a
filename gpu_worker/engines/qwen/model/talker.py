"""The talker: reads a prompt or one frame a slot; gives a hidden state and the logits of codebook 0.

Owns the talker's weights and the KV cache of all slots.
It neither places requests into slots nor samples from the logits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.model_config import TalkerShape
from gpu_worker.engines.qwen.kernels.selection import Kernels
from gpu_worker.engines.qwen.model.kv_cache import KVCache
from gpu_worker.engines.qwen.model.layers import Linear, RopeTables, Stack, aligned, pad_rows
from gpu_worker.engines.qwen.runtime.cpu_traces import Run, run_untraced
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN, Products
from gpu_worker.engines.qwen.tensor_holder import TensorHolder


class Talker(TensorHolder):
    """Weights of the talker and the KV cache of all slots."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        shape: TalkerShape,
        cache: KVCache,
        *,
        kernels: Kernels,
        products: Products = PLAIN,
    ) -> None:
        """`weights`: as for CodePredictor. `cache` has their device and dtype."""
        self.stack = Stack(
            weights, "talker.model.", shape, kernels=kernels, products=products, heads_by_group=cache.heads_by_group
        )
        head = weights["talker.codec_head.weight"]
        # Control ids can never be sampled, the end apart: their rows are left out instead of suppressed.
        self._outputs = shape.codes + 1
        head = aligned(torch.cat((head[: shape.codes], head[shape.codec_eos_token_id][None])))
        self.head = Linear(head, products=products, part="sensitive")
        self.ropes = RopeTables(shape, cache.max_model_len, head.dtype, head.device)
        self.cache = cache

    def prefill(
        self, embeds: Tensor, slots: Tensor, lengths: Tensor, *, prefix: int = 0, cached: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Read prompts: embeds [prompts, tokens, hidden], padded at the end; slots, lengths: int64 [prompts].

        `prefix`: see KVCache.prefill_attend. If it is `cached`, its keys and values are there, and it is not computed.

        Returns the last token's normed hidden state [prompts, hidden] and its logits [prompts, codes + 1].
        Padding writes to the cache behind `lengths`; decode steps overwrite those positions before they read them.
        """
        prompts, tokens, _ = embeds.shape
        start = prefix if cached else 0
        rope = self.ropes.span(start, tokens, prompts)
        attend = self.cache.prefill_attend(slots, tokens, rope, prefix=prefix, start=start)
        x = self.stack(embeds[:, start:].flatten(0, 1), attend)
        last = torch.arange(prompts, device=slots.device) * (tokens - start) + lengths - (1 + start)
        hidden = self.stack.norm(x.index_select(0, last))
        return hidden, self._logits(hidden)

    def decode(
        self,
        x: Tensor,
        positions: Tensor,
        lengths: Tensor,
        kv_len: int,
        *,
        run: Run = run_untraced,
    ) -> tuple[Tensor, Tensor]:
        """Read one token of each of the first slots: x [batch, hidden]; positions, lengths int64 [batch].

        Returns hidden states and logits as `prefill` does. See KVCache.decode_attend for the other arguments.
        `run`: see Stack.normed.
        """
        batch = x.shape[0]
        attend = self.cache.decode_attend(positions, lengths, kv_len, self.ropes.at(positions))
        hidden = self.stack.normed(pad_rows(x, self.stack.products.row_multiple), attend, run)
        return hidden[:batch], self._logits(hidden)[:batch]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)[:, : self._outputs]
