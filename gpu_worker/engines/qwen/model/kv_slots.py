"""What the device knows of every slot: one row a slot in a few static tensors.

It owns the tensors, and how a request is written into its row and taken out.
The addresses never change, so captured graphs may read and write them.
"""

from typing import Final

import msgspec
import numpy as np
import torch
from torch import Tensor

from gpu_worker.engines.qwen.model.layers import Weights
from gpu_worker.engines.qwen.model.prompt import Prompt
from gpu_worker.engines.qwen.model.sampling import WIDTH, Parameters

RING: Final = 16
"""Frames kept for the codec: the longest chunk, and the frame that is being made meanwhile."""

MIN_FRAMES: Final = 2
"""The official package forbids the end before this many frames (`min_new_tokens`)."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one utterance is sampled; `top_k` 0 looks at every id.

    `greedy` takes the best at both levels, `greedy_codes` in the code predictor alone.
    """

    greedy: bool
    greedy_codes: bool = False
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    min_frames: int = MIN_FRAMES

    @property
    def wide(self) -> bool:
        """Whether more candidates are needed than the narrow sampler looks at."""
        return not self.greedy and not 1 <= self.top_k <= WIDTH


class State(Weights):
    """All slots' rows.

    `hidden` [slots, hidden]: the talker's last normed output.
    `input` [slots, hidden]: what the talker reads next.
    `code` int64 [slots]: codebook 0 of the frame to make next; `codes` (the highest id) means the end.
    `frame` int64 [slots]: that frame's number. `start` int64 [slots]: tokens of the prompt.
    `active` bool [slots]: whether a frame step may change the row.
    `trailing` [slots, texts + 1, hidden]: text for each frame, the padding embedding behind it.
    `seen` bool [slots, codes + 1]: codebook-0 ids made so far.
    `uniform` float32 [slots, frames, groups]: randomness of each frame; the last column chooses the next codebook 0.
    `first` float32 [slots, 1]: the uniform that chooses the very first codebook 0.
    `ring` int64 [slots, RING, groups]: the last frames, frame f at f % RING.
    """

    def __init__(
        self, slots: int, *, hidden: int, codes: int, groups: int, texts: int, frames: int, like: Tensor
    ) -> None:
        """`like`: a tensor of the device and dtype to live with."""
        device = like.device
        self.codes = codes
        self.texts = texts
        self.hidden = like.new_zeros(slots, hidden)
        self.input = like.new_zeros(slots, hidden)
        self.trailing = like.new_zeros(slots, texts + 1, hidden)
        self.code = torch.zeros(slots, dtype=torch.int64, device=device)
        self.frame = torch.zeros(slots, dtype=torch.int64, device=device)
        self.start = torch.zeros(slots, dtype=torch.int64, device=device)
        self.trailing_length = torch.zeros(slots, dtype=torch.int64, device=device)
        self.active = torch.zeros(slots, dtype=torch.bool, device=device)
        self.seen = torch.zeros(slots, codes + 1, dtype=torch.bool, device=device)
        self.uniform = torch.zeros(slots, frames, groups, device=device)
        self.first = torch.zeros(slots, 1, device=device)
        self.ring = torch.zeros(slots, RING, groups, dtype=torch.int64, device=device)
        self.temperature = torch.ones(slots, 1, device=device)
        self.rank = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self.top_p = torch.ones(slots, 1, device=device)
        self.penalty = torch.ones(slots, 1, device=device)
        self.wide = torch.zeros(slots, dtype=torch.bool, device=device)
        self.min_frames = torch.zeros(slots, dtype=torch.int64, device=device)

    def write(self, slot: int, prompt: Prompt, pad: Tensor, choice: SamplingParams, randomness: np.ndarray) -> None:
        """Put an utterance into a row. `pad` [1, hidden] stands for text behind the end; randomness: see `uniforms`."""
        length = len(prompt.trailing)
        self.trailing[slot, :length] = prompt.trailing
        self.trailing[slot, length] = pad
        self.trailing_length[slot] = length
        self.start[slot] = len(prompt.embeds)
        self.frame[slot] = 0
        self.seen[slot] = False
        self.temperature[slot] = 1.0 if choice.greedy else choice.temperature
        self.rank[slot] = 0 if choice.greedy else (choice.top_k or self.codes + 1) - 1
        self.top_p[slot] = choice.top_p
        self.penalty[slot] = choice.repetition_penalty
        self.wide[slot] = choice.wide
        self.min_frames[slot] = choice.min_frames
        if choice.greedy:
            self.first[slot] = 0
            self.uniform[slot] = 0
            return
        numbers = torch.from_numpy(randomness)
        if self.uniform.is_cuda:
            numbers = numbers.pin_memory()
        frames = (len(numbers) - 1) // self.uniform.shape[2]
        self.first[slot] = numbers[0].to(self.first.device, non_blocking=True)
        self.uniform[slot, :frames] = numbers[1:].view(frames, -1).to(self.uniform.device, non_blocking=True)
        if choice.greedy_codes:
            self.uniform[slot, :, :-1] = 0

    def parameters(self, rows: slice | Tensor, uniform: Tensor) -> Parameters:
        """The sampling parameters of some rows."""
        return Parameters(self.temperature[rows], self.rank[rows], self.top_p[rows], self.penalty[rows], uniform)
