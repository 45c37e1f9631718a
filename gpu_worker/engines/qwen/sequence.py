"""One admitted job inside the engine: its utterances, its progress, and when its next chunk is due.

RunningJob is bookkeeping on the host. It makes and moves no tensors, and emits no events.
"""

import math
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Final

import numpy as np

from gpu_worker.engines.base import FinishReason, Job
from gpu_worker.engines.fades import FADE_OUT_S, Samples, fade_in, fade_out
from gpu_worker.engines.qwen.chunk_schedule import CHUNK_LENGTHS, chunk_frames
from gpu_worker.engines.qwen.model.prompt import Prompt
from gpu_worker.engines.qwen.passages import Passage
from gpu_worker.engines.qwen.planner import MoreText, Plan, Utterance, frame_cap
from gpu_worker.engines.qwen.reference_cache import EncodedReference
from shared.pcm import SAMPLE_RATE
from shared.protocol import Usage

MAX_SILENT_FRAMES: Final = 75
"""After this many near-silent frames in a row (6 s) the model will not speak again."""

SILENCE_PEAK: Final = 33
"""A frame whose int16 peak is at most this (-60 dB of full scale) is near-silent."""


class RunningJob:
    """A job in its slot.

    `next` is the next passage; without a text, the job ends behind its pause. It is None if none is known yet.
    `between` is true while no utterance is under way, and the job can go on. `rate` is that of the utterance.
    `pause_left` are the bytes of a pause that no step has emitted yet. An utterance waits for its prefill until then.
    `reference` is the recording while it is being encoded, `oom_reference` the first attempt if that ran out of memory.
    `prompt` is set while an utterance waits for its prefill; `generating` is true from the prefill to its last chunk.
    `ended` is true if no further frame of the utterance will be launched.
    `text_complete` is false while more of the utterance's text may come.
    `tokens` and `trailing_tokens` count what came.
    `early_frame` is true while the frame that needs text is speech already: its codes are known without that text,
    but not what follows them. `early_launched` is true while those codes are on their way.
    `frames_launched` counts the utterance's frames that were started on the device, `frames_ready` those that the host
    knows to be speech, and `pending_frames` those that are ready but not yet decoded.
    `underrun_at` is the time, on the engine's clock, at which a player that started at once has played everything.
    """

    def __init__(self, job: Job, slot: int, plan: Plan) -> None:
        self.job = job
        self.slot = slot
        self.plan = plan
        self.next: Passage | None = None
        self.between = False
        self.rate = 1.0
        self.pause_left = 0
        self.reference: Future[EncodedReference] | None = None
        self.oom_reference: Future[EncodedReference] | None = None
        self.encoded: EncodedReference | None = None
        self.utterance = -1
        self.prompt: Prompt | None = None
        self.alive = True
        self.input_tokens = 0
        self.output_frames = 0
        self.reason: FinishReason = "stop"
        self.generating = False
        self.ended = True
        self.text_complete = True
        self.frames_launched = self.frames_ready = 0
        self.early_frame = self.early_launched = False
        self.pending_frames = 0
        self.chunks = 0
        self.chunks_delivered = 0
        self.underrun_at = -math.inf

    def start_utterance(self, utterance: Utterance) -> None:
        """Set the prompt of the next utterance, which then waits for its prefill."""
        passage = self.look_ahead() or Passage("")
        self.utterance += 1
        self.between = False
        self.rate = passage.rate
        self.pause_left = passage.pause_bytes
        self.next = None
        self.prompt = utterance.prompt
        self.prompt_tokens = len(utterance.prompt.embeds)
        self.trailing_tokens = len(utterance.prompt.trailing)
        self.max_frames = utterance.max_frames
        self.tokens = utterance.tokens
        self.text_complete = not utterance.incomplete
        self.input_tokens += utterance.tokens
        self.frames_launched = 0
        self.early_frame = self.early_launched = False
        self.held_samples: Samples | None = None
        self.frames_ready = 0
        self.silent_frames = 0
        self.ended = False
        self.chunks = 0
        self.chunks_delivered = 0

    def look_ahead(self) -> Passage | None:
        """The next passage; None if more text has to come first. Behind the last frame that may be made comes none."""
        if self.next is None:
            self._count_unread_text()
            self.next = next(self.plan.passages)
        if self.next is not None and self.next.text and self.frames_left == 0:
            self.next, self.reason = Passage(""), "length"
        return self.next

    def _count_unread_text(self) -> None:
        """Count the text of an utterance that ended before it had read it all."""
        open_text = self.plan.open_text
        if open_text is not None and not self.text_complete:
            open_text.read_on()
            self.input_tokens += len(open_text.ids) - self.tokens
            self.tokens, self.text_complete = len(open_text.ids), open_text.complete

    def on_prefilled(self) -> None:
        """The prompt is in the slot."""
        self.prompt = None
        self.generating = True

    def on_text(self, text: MoreText) -> None:
        """More text of the utterance is in the slot."""
        self.trailing_tokens += len(text.rows)
        self.input_tokens += text.tokens - self.tokens
        self.tokens = text.tokens
        self.text_complete = text.complete
        if text.complete:
            self.max_frames = frame_cap(self.tokens, self.max_frames, self.max_frames)

    @property
    def waits_for_text(self) -> bool:
        """True if an open job can make no audio before more of its text comes."""
        open_text = self.plan.open_text
        if open_text is None or open_text.error is not None:
            return False
        if self.between:
            return self.look_ahead() is None and open_text.error is None
        idle = self.early_frame and not self.frames_on_device and not self.pending_frames
        return self.needs_text and idle and not self.has_new_text

    @property
    def needs_text(self) -> bool:
        """True if the next frame needs text that has not come: an utterance reads a token a frame."""
        return (
            self.generating
            and not self.ended
            and not self.text_complete
            and self.frames_launched >= self.trailing_tokens
        )

    @property
    def has_new_text(self) -> bool:
        """True if there is more of the utterance's text than its slot has."""
        open_text = self.plan.open_text
        if open_text is None:
            return False
        open_text.read_on()
        return open_text.complete or len(open_text.ids) > self.tokens or open_text.error is not None

    @property
    def frames_on_device(self) -> int:
        """Frames that were launched and are not ready yet."""
        return self.frames_launched + self.early_frame + self.early_launched - self.frames_ready

    @property
    def can_launch_early(self) -> bool:
        """True if the codes of the frame that needs text can be made before that text comes."""
        wanted = self.needs_text and not self.early_frame and self.frames_launched < self.max_frames
        return wanted and not self.frames_on_device

    @property
    def can_launch(self) -> bool:
        """True if the utterance may start another frame."""
        unlimited = self.generating and not self.ended and self.frames_launched < self.max_frames
        return unlimited and not self.needs_text

    @property
    def chunk_due(self) -> bool:
        """True if the pending frames make a whole chunk, or are the last ones of the utterance."""
        enough = self.pending_frames >= chunk_frames(self.chunks)
        return self.pending_frames > 0 and (enough or self.ended or self.reads_text)

    @property
    def reads_text(self) -> bool:
        """True if each frame is decoded by itself: the next one, of a job that is read frame by frame, reads text.

        So an open job gives all audio that there is while it waits for text. The split into chunks decides about the
        last bit, so that of the whole text is the same, if the request asks for that layout.
        """
        reads = not self.text_complete or self.frames_ready - self.pending_frames < self.trailing_tokens
        return self.plan.live and reads

    @property
    def next_chunk(self) -> int:
        """Frames of the chunk that is due: as many of the pending ones as a chunk may have."""
        return 1 if self.reads_text else max(length for length in CHUNK_LENGTHS if length <= self.pending_frames)

    @property
    def frames_left(self) -> int | None:
        """Frames that the job may still make; None if the request sets no limit."""
        return None if self.plan.max_new_tokens is None else self.plan.max_new_tokens - self.output_frames

    @property
    def usage(self) -> Usage:
        """Text tokens in, frames out."""
        return Usage(input_tokens=self.input_tokens, output_tokens=self.output_frames)

    def on_frame_ready(self, *, last: bool) -> None:
        """Count a frame whose codes are speech. `last`: the model has ended the utterance behind this frame."""
        if self.early_frame:  # counted before
            self.early_frame = False
        else:
            self.frames_ready += 1
            self.pending_frames += 1
            self.output_frames += 1
        if last:
            self.ended = True
        elif self.frames_ready >= self.max_frames:
            self._end_at_length()

    def on_early_frame_ready(self) -> None:
        """Count the frame that needs text: its codes are known."""
        self.early_launched = False
        self.on_frame_ready(last=False)
        self.early_frame = True

    def on_chunk_decoded(self) -> None:
        """The next chunk went to the vocoder."""
        self.pending_frames -= self.next_chunk
        self.chunks += 1

    def finish_utterance(self) -> None:
        """End the utterance, whose last frames went to the vocoder."""
        self.generating = False

    def faded(self, pcm: Samples) -> Samples:
        """The next decoded chunk, in order: faded in if the utterance begins with it, out if it ends with it.

        An utterance has ended by the time that its last frames are decoded, but for an early frame: the samples that
        would be faded are held back, for the next chunk or for `take_held`.
        """
        self.chunks_delivered += 1
        if self.chunks_delivered == 1:
            pcm = fade_in(pcm, SAMPLE_RATE)
        if self.held_samples is not None:
            pcm, self.held_samples = np.concatenate((self.held_samples, pcm)), None
        if self.ended and not self.pending_frames and self.chunks_delivered == self.chunks:
            return fade_out(pcm, SAMPLE_RATE)
        if self.early_frame and self.chunks_delivered == self.chunks:
            pcm, self.held_samples = np.split(pcm, [-round(FADE_OUT_S * SAMPLE_RATE)])
        return pcm

    def take_held(self) -> Samples | None:
        """The last samples of an utterance that ended with an early frame, faded out."""
        held, self.held_samples = self.held_samples, None
        return None if held is None else fade_out(held, SAMPLE_RATE)

    def check_silence(self, pcm: Samples, frame_samples: int) -> None:
        """End the utterance if the model has gone silent. pcm: a decoded chunk, int16 [samples]."""
        for peak in np.abs(pcm.reshape(-1, frame_samples).astype(np.int32)).max(axis=1):
            self.silent_frames = self.silent_frames + 1 if peak <= SILENCE_PEAK else 0
        if self.silent_frames >= MAX_SILENT_FRAMES and not self.ended:
            self._end_at_length()

    def on_delivered(self, seconds: float, now: float) -> None:
        """Add delivered audio to the playback clock. A player that had run dry plays it from `now` on."""
        self.underrun_at = max(self.underrun_at, now) + seconds

    def _end_at_length(self) -> None:
        self.ended = True
        self.reason = "length"


def by_chunk_length(due: Iterable[RunningJob]) -> list[list[RunningJob]]:
    """Group jobs by the length of their next chunks: those of one length are decoded together."""
    groups: dict[int, list[RunningJob]] = {}
    for sequence in due:
        groups.setdefault(sequence.next_chunk, []).append(sequence)
    return list(groups.values())


def most_urgent_first(groups: list[list[RunningJob]]) -> list[list[RunningJob]]:
    """Sort groups of chunks by the earliest underrun of a member."""
    return sorted(groups, key=lambda group: min(sequence.underrun_at for sequence in group))
