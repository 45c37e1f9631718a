"""One admitted job on the host's side: its utterances, how far it is, and when its next chunk is due.

It owns bookkeeping alone: no tensors are made or moved here, and no event is sent.
"""

from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final

import numpy as np

from gpu_worker.engines.base import FinishReason, Job, Usage
from gpu_worker.engines.qwen.prompt import Prompt
from gpu_worker.engines.qwen.references import EncodedReference

if TYPE_CHECKING:
    from gpu_worker.engines.qwen.planner import Plan

FIRST_CHUNK: Final = 1
LONGEST_CHUNK: Final = 8
"""Frames a chunk: 1, 2, 4, 8, 8, …: the first audio at once, then fewer and cheaper decoder calls."""

FRAMES_PER_TOKEN: Final = 12
LEAST_CAP: Final = 192
"""Frames that a text may take: max(LEAST_CAP, FRAMES_PER_TOKEN * its tokens), as other engines cap runaways.

0.2 to 0.5 % of requests never say that they are done; speech takes 3 to 5 frames a token.
"""

SILENCE_FRAMES: Final = 75
"""This many near-silent frames on end (6 s) mean that the model is lost."""

SILENCE_PEAK: Final = 33
"""An int16 peak at or below this (-60 dB of full scale) is near silence."""


class Speaking:
    """A job in its slot.

    `prompt` is set while an utterance waits to be read into the slot, `speaks` from then until its frames end.
    `launched` counts frames begun on the device, `landed` those known to be speech, `pending` those not yet decoded.
    """

    def __init__(self, job: Job, slot: int, plan: "Plan", reference: Future[EncodedReference] | None) -> None:
        self.job = job
        self.slot = slot
        self.plan = plan
        self.texts = deque(plan.texts)
        self.reference = reference
        self.encoded: EncodedReference | None = None
        self.utterance = -1
        self.prompt: Prompt | None = None
        self.alive = True
        self.frames = 0
        self.reason: FinishReason = "stop"
        self.speaks = False
        self.ended = True
        self.pending = 0
        self.chunk = FIRST_CHUNK

    def begin(self, prompt: Prompt, cap: int) -> None:
        """An utterance of at most `cap` frames waits to be read."""
        self.utterance += 1
        self.texts.popleft()
        self.prompt = prompt
        self.length = len(prompt.embeds)
        self.cap = cap
        self.launched = 0
        self.landed = 0
        self.silent = 0
        self.ended = False
        self.chunk = FIRST_CHUNK

    def start(self) -> None:
        """The prompt is in the slot."""
        self.prompt = None
        self.speaks = True

    @property
    def launchable(self) -> bool:
        """Whether another frame may be begun."""
        return self.speaks and not self.ended and self.launched < self.cap

    @property
    def due(self) -> bool:
        """Whether frames should wait for the decoder no longer."""
        return self.pending >= self.chunk or (self.ended and self.pending > 0)

    @property
    def usage(self) -> Usage:
        """Tokens in, frames out."""
        return Usage(input_tokens=self.plan.tokens, output_tokens=self.frames)

    def land(self, *, last: bool) -> None:
        """A frame's codes are known to be speech; `last`: the model said that nothing follows."""
        self.landed += 1
        self.pending += 1
        self.frames += 1
        if last:
            self.ended = True
        elif self.landed >= self.cap:
            self._cut()

    def take_chunk(self) -> None:
        """The pending frames went to the decoder; the next chunk may be twice as long."""
        self.pending = 0
        self.chunk = min(self.chunk * 2, LONGEST_CHUNK)

    def hear(self, pcm: np.ndarray, frame_samples: int) -> None:
        """Listen to a chunk, int16 [samples], for a model that has gone silent."""
        for peak in np.abs(pcm.reshape(-1, frame_samples).astype(np.int32)).max(axis=1):
            self.silent = self.silent + 1 if peak <= SILENCE_PEAK else 0
        if self.silent >= SILENCE_FRAMES and not self.ended:
            self._cut()

    def _cut(self) -> None:
        self.ended = True
        self.reason = "length"


def frame_cap(tokens: int, max_new_tokens: int, room: int) -> int:
    """Frames that an utterance of `tokens` text tokens may take, in a slot with `room` positions left."""
    return min(max(LEAST_CAP, FRAMES_PER_TOKEN * tokens), max_new_tokens, room)
