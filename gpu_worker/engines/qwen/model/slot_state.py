"""Every slot's decoding state on the device: one row a slot in a few static tensors.

Owns these tensors and writes an utterance into its row. It holds no keys and values (kv_cache.py) and samples nothing.
The tensors' addresses never change, so captured graphs may read and write them.
"""

from typing import Final

import numpy as np
import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.model_config import TalkerShape
from gpu_worker.engines.qwen.model.prompt import Prompt
from gpu_worker.engines.qwen.model.sampling import SamplingParams
from gpu_worker.engines.qwen.runtime.lazy_zeros import lazy_zeros
from gpu_worker.engines.qwen.tensor_holder import TensorHolder

RING_FRAMES: Final = 16
"""Frames that the ring buffer keeps for the codec: the longest chunk, and the frames decoded while it is read."""

MAX_TRAILING_TOKENS: Final = 512
"""Text tokens that may trail a prompt, one a frame; longer texts are split into utterances."""


class SlotState(TensorHolder):
    """All slots' rows.

    `hidden` [slots, hidden]: the talker's last normed output.
    `talker_input` [slots, hidden]: the embedding that the talker reads next.
    `next_codebook0` int64 [slots]: codebook 0 of the next frame; `eos_code` (the highest id) ends the utterance.
    `frame` int64 [slots]: number of the next frame. `prompt_len` int64 [slots]: tokens of the prompt.
    `active` bool [slots]: whether a decode step may change the row.
    `trailing` [slots, MAX_TRAILING_TOKENS + 1, hidden]: the text embedding of each frame, then the padding embedding.
    `seen` bool [slots, eos_code + 1]: codebook-0 ids sampled so far, for the repetition penalty.
    `uniform` float32 [slots, frames, groups]: each frame's uniforms; the last column samples the next codebook 0.
    `first_uniform` float32 [slots, 1]: the uniform that samples the utterance's first codebook 0.
    `ring_buffer` int64 [slots, RING_FRAMES, groups]: the codes of the last frames, frame f at f % RING_FRAMES.
    """

    def __init__(self, shape: TalkerShape, slots: int, frames: int, like: Tensor) -> None:
        """`frames`: the most of an utterance. `like`: a tensor with the device and dtype of embeddings."""
        device, hidden, groups = like.device, shape.hidden_size, shape.num_code_groups
        self.eos_code = shape.codes
        self.hidden = like.new_zeros(slots, hidden)
        self.talker_input = like.new_zeros(slots, hidden)
        self.trailing = lazy_zeros(like, slots, MAX_TRAILING_TOKENS + 1, hidden)
        self.next_codebook0 = torch.zeros(slots, dtype=torch.int64, device=device)
        self.frame = torch.zeros(slots, dtype=torch.int64, device=device)
        self.prompt_len = torch.zeros(slots, dtype=torch.int64, device=device)
        self.trailing_len = torch.zeros(slots, dtype=torch.int64, device=device)
        self.active = torch.zeros(slots, dtype=torch.bool, device=device)
        self.seen = torch.zeros(slots, self.eos_code + 1, dtype=torch.bool, device=device)
        self.uniform = torch.zeros(slots, frames, groups, device=device)
        self.first_uniform = torch.zeros(slots, 1, device=device)
        self.ring_buffer = torch.zeros(slots, RING_FRAMES, groups, dtype=torch.int64, device=device)
        self.temperature = torch.ones(slots, 1, device=device)
        self.rank = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self.top_p = torch.ones(slots, 1, device=device)
        self.penalty = torch.ones(slots, 1, device=device)
        self.full_vocab = torch.zeros(slots, dtype=torch.bool, device=device)

    def write(self, slot: int, prompt: Prompt, pad: Tensor, params: SamplingParams, randomness: np.ndarray) -> None:
        """Write an utterance into the row of `slot`.

        `pad` [1, hidden]: the text embedding of every frame behind the text's end. `randomness`: see `uniforms`.
        """
        length = len(prompt.trailing)
        self.trailing[slot, :length] = prompt.trailing
        self.trailing[slot, length] = pad
        self.trailing_len[slot] = length
        self.prompt_len[slot] = len(prompt.embeds)
        self.frame[slot] = 0
        self.seen[slot] = False
        self.temperature[slot] = 1.0 if params.greedy else params.temperature
        self.rank[slot] = 0 if params.greedy else (params.top_k or self.eos_code + 1) - 1
        self.top_p[slot] = params.top_p
        self.penalty[slot] = params.repetition_penalty
        self.full_vocab[slot] = params.full_vocab
        if params.greedy:
            self.first_uniform[slot] = 0
            self.uniform[slot] = 0
            return
        numbers = torch.from_numpy(randomness)
        if self.uniform.is_cuda:
            numbers = numbers.pin_memory()
        frames = (len(numbers) - 1) // self.uniform.shape[2]
        self.first_uniform[slot] = numbers[0].to(self.first_uniform.device, non_blocking=True)
        self.uniform[slot, :frames] = numbers[1:].view(frames, -1).to(self.uniform.device, non_blocking=True)
        if params.greedy_codes:
            self.uniform[slot, :, :-1] = 0

    def append_text(self, slot: int, start: int, rows: Tensor, pad: Tensor) -> None:
        """Write further text embeddings [tokens, hidden] into the row of `slot`, behind `start` ones."""
        end = start + len(rows)
        self.trailing[slot, start:end] = rows
        self.trailing[slot, end] = pad
        self.trailing_len[slot] = end

    def rows(self, slot: int, *, frames: int, trailing: int) -> list[Tensor]:
        """Views of all that the row of `slot` holds of an utterance, but `active`, which each decode step sets.

        `frames`: the most of the utterance. `trailing`: its trailing text tokens.
        """
        one = slice(slot, slot + 1)
        whole = [tensor[one] for tensor in self._tensors_of_one_length()]
        return [self.trailing[slot, : trailing + 1], self.uniform[slot, :frames], *whole]

    def row_bytes(self, *, frames: int, trailing: int) -> int:
        """Bytes of `rows`."""
        whole = sum(tensor.nbytes for tensor in self._tensors_of_one_length()) // len(self.frame)
        return whole + (trailing + 1) * self.trailing[0, 0].nbytes + frames * self.uniform[0, 0].nbytes

    def _tensors_of_one_length(self) -> tuple[Tensor, ...]:
        """The tensors whose rows an utterance uses whole, but `active`."""
        return (
            self.hidden,
            self.talker_input,
            self.next_codebook0,
            self.frame,
            self.prompt_len,
            self.trailing_len,
            self.seen,
            self.first_uniform,
            self.ring_buffer,
            self.temperature,
            self.rank,
            self.top_p,
            self.penalty,
            self.full_vocab,
        )
