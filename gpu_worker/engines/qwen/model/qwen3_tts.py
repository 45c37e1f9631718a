"""The model as functions over the slots: `prefill`, and the two halves of a decode step, which makes an 80 ms frame.

Owns the arithmetic from one frame's state to the next. It decides nothing about requests.
For fixed arguments the functions have fixed shapes and never wait for the device, so a ModelRunner may call,
trace or capture them.
"""

import functools
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.model_config import GenerationConfig, ModelConfig, TalkerShape
from gpu_worker.engines.qwen.kernels.embed_frame import embed_codes
from gpu_worker.engines.qwen.kernels.selection import Kernels
from gpu_worker.engines.qwen.model.attention import Attention
from gpu_worker.engines.qwen.model.code_predictor import CodePredictor
from gpu_worker.engines.qwen.model.kv_cache import KVCache
from gpu_worker.engines.qwen.model.layers import as_stored
from gpu_worker.engines.qwen.model.slot_state import SlotState
from gpu_worker.engines.qwen.model.talker import Talker
from gpu_worker.engines.qwen.runtime.cpu_traces import Run, run_untraced
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN, Products
from gpu_worker.engines.qwen.tensor_holder import TensorHolder

MIN_FRAMES: Final = 2
"""The official package forbids the end before this many frames (`min_new_tokens`)."""


def product_shapes(shape: TalkerShape) -> list[tuple[int, int]]:
    """Outputs and inputs of the matrices of both transformers and of their heads."""
    predictor = shape.code_predictor_config
    shapes = [(shape.codes + 1, shape.hidden_size), (predictor.vocab_size, predictor.hidden_size)]
    for stack in (shape, predictor):
        hidden, inner, heads = stack.hidden_size, stack.intermediate_size, stack.num_attention_heads
        qkv = (heads + 2 * stack.num_key_value_heads) * stack.head_dim
        shapes += [(qkv, hidden), (hidden, heads * stack.head_dim), (2 * inner, hidden), (hidden, inner)]
    return shapes


def halved(table: Tensor) -> Tensor:
    """`table` in bfloat16 if each of its values is one in bfloat16; else as it is."""
    half = table.bfloat16()
    return half if torch.equal(half.to(table.dtype), table) else table


class Qwen3TTSModel(TensorHolder):
    """Talker, code predictor and the state of all slots."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: ModelConfig,
        generation: GenerationConfig,
        attention: Attention,
        *,
        kernels: Kernels,
        slots: int,
        max_model_len: int,
        products: Products = PLAIN,
    ) -> None:
        """`weights`: the checkpoint's, on the device, in the compute dtype.

        `slots`: rows of state and cache. `max_model_len`: tokens that a slot holds, prompt and frames.
        """
        shape = config.talker_config
        groups = shape.num_code_groups
        tables = ["talker.model.codec_embedding.weight"]
        tables += [f"talker.code_predictor.model.codec_embedding.{i}.weight" for i in range(groups - 1)]
        like = weights["talker.model.norm.weight"]
        large = like.device.type == "cpu" and bool(products.weights)
        read = functools.partial(as_stored, weights) if large else weights.__getitem__
        table = torch.cat([read(name) for name in tables])
        self.codec_table = halved(table) if large else table
        """All code embeddings. A CPU with large matrices keeps them in bfloat16 if that loses no bit: 70 MB less."""
        offsets = [0, *(shape.vocab_size + i * shape.code_predictor_config.vocab_size for i in range(groups - 1))]
        self.table_offsets = torch.tensor(offsets, device=self.codec_table.device)
        cache = KVCache(shape, attention, slots, max_model_len, like, kernels=kernels)
        self.talker = Talker(weights, shape, cache, kernels=kernels, products=products)
        self.code_predictor = CodePredictor(
            weights, shape, generation, attention, self.codec_table, kernels=kernels, products=products
        )
        self._kernels = kernels
        self.state = SlotState(shape, slots, max_model_len, like)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """The sum of each frame's code embeddings: int64 [frames, groups] -> [frames, hidden]."""
        return embed_codes(codes, self.codec_table, self.table_offsets, self.state.talker_input.dtype)

    def prefill(
        self,
        embeds: Tensor,
        slots: Tensor,
        lengths: Tensor,
        *,
        full_vocab: bool,
        prefix: int = 0,
        cached: bool = False,
    ) -> None:
        """Read prompts into their slots and sample their first codebook 0; the tensors are as for Talker.prefill.

        `full_vocab`: whether the sampling parameters of any of them need the full vocabulary (SamplingParams).
        On CUDA the full vocabulary is sorted in any case.
        """
        hidden, logits = self.talker.prefill(embeds, slots, lengths, prefix=prefix, cached=cached)
        self._sample(logits, hidden, slots, full_vocab=full_vocab)

    def code_predictor_step(self, batch: int, run: Run = run_untraced) -> None:
        """First half of a decode step, for slots 0 to batch - 1: all codes of the frame, into `state.ring_buffer`.

        The sum of their embeddings and of the frame's text embedding becomes `state.talker_input`.
        `run` runs its parts.
        """
        hidden, code, uniform = run("inputs", functools.partial(self._predictor_inputs, batch))
        codes = self.code_predictor(hidden, code, uniform, run)
        run("embed", self._embed_frame, codes)

    def _predictor_inputs(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        state, part = self.state, slice(0, batch)
        frame = state.frame[part]
        index = torch.arange(batch, device=frame.device)
        return state.hidden[part], state.next_codebook0[part], state.uniform[part][index, frame]

    def _embed_frame(self, codes: Tensor) -> None:
        self._kernels.embed_frame(self.state, codes, self.codec_table, self.table_offsets)

    def talker_step(self, batch: int, kv_len: int, *, full_vocab: bool, run: Run = run_untraced) -> None:
        """Second half: the talker reads the frame and samples the next frame's codebook 0, into `state.next_codebook0`.

        `kv_len`: see KVCache.decode_attend; `full_vocab`: see `prefill`; `run`: see Stack.normed.
        Rows that are not active are computed and not kept, so a frame that failed midway can be made again.
        """
        state, part = self.state, slice(0, batch)
        positions = state.prompt_len[part] + state.frame[part]
        lengths = positions * state.active[part] + 1  # of a row whose result is not kept, one token is enough
        hidden, logits = self.talker.decode(state.talker_input[part], positions, lengths, kv_len, run=run)
        self._sample(logits, hidden, None, full_vocab=full_vocab)

    def _sample(self, logits: Tensor, hidden: Tensor, prompts: Tensor | None, *, full_vocab: bool) -> None:
        """See NextCodebook0."""
        sampler = self._kernels.next_codebook0
        sampler(self.state, logits, hidden, prompts, min_frames=MIN_FRAMES, full_vocab=full_vocab)
