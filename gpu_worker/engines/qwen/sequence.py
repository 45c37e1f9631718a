"""One admitted job on the host's side: its utterances, how far it is, and when its next chunk is due.

It owns bookkeeping alone: no tensors are made or moved here, and no event is sent.
"""

import math
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final

import numpy as np

from gpu_worker.engines.base import FinishReason, Job, Usage
from gpu_worker.engines.qwen.model.prompt import Prompt
from gpu_worker.engines.qwen.reference_cache import EncodedReference

if TYPE_CHECKING:
    from gpu_worker.engines.qwen.planner import Plan, Utterance

SCHEDULE: Final = (1, 1, 2, 4, 8)
LONGEST_CHUNK: Final = SCHEDULE[-1]
"""Frames a chunk, the last one's again and again: the first audio at once, then fewer and cheaper decoder calls.

The second frame comes alone, too: of the first 80 ms an MP3 encoder gives 48 to play until it is there.
"""

FRAMES_PER_TOKEN: Final = 12
LEAST_CAP: Final = 192
"""Frames that a text may take: max(LEAST_CAP, FRAMES_PER_TOKEN * its tokens), as other engines cap runaways.

0.2 to 0.5 % of requests never say that they are done; speech takes 3 to 5 frames a token.
"""

SILENCE_FRAMES: Final = 75
"""This many near-silent frames on end (6 s) mean that the model is lost."""

SILENCE_PEAK: Final = 33
"""An int16 peak at or below this (-60 dB of full scale) is near silence."""


class RunningJob:
    """A job in its slot.

    `text` is what it says next, "" where nothing follows.
    `prompt` is set while an utterance waits to be read into the slot, `speaks` from then until its frames end.
    `reference` is its recording on the way, `exhausted` the first attempt at it if memory ran out in that.
    `dry_at`: when a player that began at once has played all that was handed out, in seconds of the engine's clock.
    `launched` counts frames begun on the device, `landed` those known to be speech, `pending` those not yet decoded.
    """

    def __init__(self, job: Job, slot: int, plan: "Plan") -> None:
        self.job = job
        self.slot = slot
        self.plan = plan
        self.text = next(plan.texts, "")
        self.reference: Future[EncodedReference] | None = None
        self.exhausted: Future[EncodedReference] | None = None
        self.encoded: EncodedReference | None = None
        self.utterance = -1
        self.prompt: Prompt | None = None
        self.alive = True
        self.tokens = 0
        self.frames = 0
        self.reason: FinishReason = "stop"
        self.speaks = False
        self.ended = True
        self.pending = 0
        self.chunks = 0
        self.dry_at = -math.inf

    def begin(self, utterance: "Utterance") -> None:
        """The next of its texts waits to be read."""
        self.utterance += 1
        self.text = next(self.plan.texts, "")
        self.prompt = utterance.prompt
        self.length = len(utterance.prompt.embeds)
        self.cap = utterance.cap
        self.tokens += utterance.tokens
        self.launched = 0
        self.landed = 0
        self.silent = 0
        self.ended = False
        self.chunks = 0

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
        chunk = SCHEDULE[min(self.chunks, len(SCHEDULE) - 1)]
        return self.pending >= chunk or (self.ended and self.pending > 0)

    @property
    def left(self) -> int | None:
        """Frames that the job may still take; None where it names no number."""
        return None if self.plan.max_new_tokens is None else self.plan.max_new_tokens - self.frames

    @property
    def usage(self) -> Usage:
        """Tokens of what was read, frames out."""
        return Usage(input_tokens=self.tokens, output_tokens=self.frames)

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
        """The pending frames went to the decoder."""
        self.pending = 0
        self.chunks += 1

    def finish(self) -> bool:
        """The utterance's last frames went to the decoder: whether they were the job's last, too."""
        self.speaks = False
        if self.text and self.left == 0:
            self.text, self.reason = "", "length"
        return not self.text

    def hear(self, pcm: np.ndarray, frame_samples: int) -> None:
        """Listen to a chunk, int16 [samples], for a model that has gone silent."""
        for peak in np.abs(pcm.reshape(-1, frame_samples).astype(np.int32)).max(axis=1):
            self.silent = self.silent + 1 if peak <= SILENCE_PEAK else 0
        if self.silent >= SILENCE_FRAMES and not self.ended:
            self._cut()

    def plays(self, seconds: float, now: float) -> None:
        """So much more was handed out; a player that had run dry plays it from now on."""
        self.dry_at = max(self.dry_at, now) + seconds

    def _cut(self) -> None:
        self.ended = True
        self.reason = "length"


def most_urgent_first(groups: list[list[RunningJob]]) -> list[list[RunningJob]]:
    """Chunks to decode together, in the order in which the first player of each group runs dry."""
    return sorted(groups, key=lambda group: min(speaking.dry_at for speaking in group))


def frame_cap(tokens: int, wanted: int, room: int) -> int:
    """Frames that an utterance of `tokens` text tokens may take, in a slot with `room` positions left."""
    return min(max(LEAST_CAP, FRAMES_PER_TOKEN * tokens), wanted, room)
