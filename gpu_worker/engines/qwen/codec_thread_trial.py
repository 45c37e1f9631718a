"""Whether an engine on a CPU has a thread for its codec: by a trial on this machine, whose outcome a file keeps.

The trial runs frames of one job and a large chunk of the codec, one behind the other and beside each other.
It takes a thread only if each round saves a quarter of the chunk's time.
It takes none if a bit depends on the number of threads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec
import numpy as np
import structlog
import torch
from torch import Tensor

from gpu_worker.engines.qwen.chunk_schedule import MAX_CHUNK_FRAMES
from gpu_worker.engines.qwen.codec_thread import CodecThread
from gpu_worker.engines.qwen.engine import Parts
from gpu_worker.engines.qwen.model.prompt import Prompt, Voice
from gpu_worker.engines.qwen.model.sampling import SamplingParams
from gpu_worker.engines.qwen.runner import PrefillInput
from gpu_worker.engines.qwen.runtime.products_trial import Outcome, kept

_TEXT: Final = "Hello world, good morning to the speech of today."
_GREEDY: Final = SamplingParams(greedy=True, temperature=1.0, top_k=1, top_p=1.0, repetition_penalty=1.0)
_ROUNDS: Final = 5
_LEAST_GAIN: Final = 0.25
"""Share of a chunk's time that a thread has to save. Less may be noise, and two calls at a time take more memory."""

log = structlog.get_logger(__name__)


class Rehearsal(Protocol):
    """What the trial runs. Each method always computes the same, and returns all values that it has computed."""

    def prompt(self) -> list[Tensor]:
        """Read a prompt, and make a frame behind it."""

    def frame(self) -> None:
        """Make a frame of one job."""

    def chunk(self) -> Tensor:
        """Decode a chunk of the largest size."""


class EngineRehearsal:
    """The parts of an idle engine, whose first slot it uses."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        prompt = parts.prompts.build(_TEXT, Voice(), language="auto", instructions="", whole_text=True)
        self._prompt = Prompt(
            prompt.embeds, prompt.trailing
        )  # without a constant part, all of it is computed each time
        self._tokens = len(self._prompt.embeds)

    def prompt(self) -> list[Tensor]:
        """As Rehearsal."""
        state = self._parts.state
        state.write(0, self._prompt, self._parts.prompts.padding(), _GREEDY, np.empty(0))
        self._parts.runner.prefill([PrefillInput(0, self._prompt, full_vocab=False)])
        read = state.hidden[0].clone()
        state.active[0] = True
        try:
            self.frame()
        finally:
            state.active[0] = False
        return [read, *(tensor[0].clone() for tensor in (state.hidden, state.talker_input, state.ring_buffer[:, 0]))]

    def frame(self) -> None:
        """As Rehearsal."""
        self._parts.runner.decode_step([(0, self._tokens + 1)], full_vocab=False)

    def chunk(self) -> Tensor:
        """As Rehearsal."""
        return self._parts.vocoder.rehearse()


class Split(msgspec.Struct, frozen=True):
    """How many threads the codec's thread computes with, and of how many streams it decodes at once."""

    codec_threads: int
    streams: int


def choose(
    rehearsal: Rehearsal,
    question: tuple[object, ...],
    clock: Callable[[], float],
    kept_in: Path | None = None,
) -> Split | None:
    """The split of this thread's threads; None: no thread for the codec. `question`: what the outcome depends on.

    The trial is made if the file `kept_in` has no outcome.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return None

    def find() -> Outcome:
        start = clock()
        split = trial(rehearsal, threads, clock)
        log.info("codec_thread_tried", split=split, threads=threads, took_ms=round(1000 * (clock() - start)))
        return Outcome([], {}) if split is None else Outcome(["thread"], msgspec.structs.asdict(split))

    outcome = kept(kept_in, ("codec thread", *question), find)
    return Split(**outcome.row_multiples) if outcome.fastest else None


@torch.inference_mode()
def trial(rehearsal: Rehearsal, threads: int, clock: Callable[[], float]) -> Split | None:
    """Try the splits of `threads`, and return the one that saves the most, by its worst round."""
    rehearsal.frame()  # the first ones find nothing in the caches
    rehearsal.chunk()
    tried = dict.fromkeys({1, max(1, threads // 4), threads // 2}, (1.0, MAX_CHUNK_FRAMES))
    for _ in range(_ROUNDS):
        frame_s, chunk_s = _seconds(rehearsal.frame, clock), _seconds(rehearsal.chunk, clock)
        for codec_threads, (least_saved, streams) in list(tried.items()):
            frames, chunk_beside_s, together_s = _beside(rehearsal, threads, codec_threads, clock)
            saved = (chunk_s + frames * frame_s - together_s) / chunk_s
            in_time = int(MAX_CHUNK_FRAMES * together_s / frames / chunk_beside_s)
            tried[codec_threads] = min(saved, least_saved), min(in_time, streams)
            if saved < _LEAST_GAIN or not in_time:
                del tried[codec_threads]
        if not tried:
            return None
    codec_threads, (_, streams) = max(tried.items(), key=lambda item: item[1])
    if not _same_bits(rehearsal, {threads, threads - codec_threads, codec_threads}):
        log.warning("codec_thread_left_out", reason="here bits depend on the number of threads")
        return None
    return Split(codec_threads, streams)


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def _beside(
    rehearsal: Rehearsal, threads: int, codec_threads: int, clock: Callable[[], float]
) -> tuple[int, float, float]:
    """The frames made until a chunk beside them is done, its seconds, and those of both together."""
    thread: CodecThread[float] = CodecThread(threads=threads, codec_threads=codec_threads, streams=1)
    frames, start = 0, clock()
    try:
        with thread.sharing():
            thread.start(lambda: _seconds(rehearsal.chunk, clock))
            while not frames or not thread.done():
                rehearsal.frame()
                frames += 1
            together_s = clock() - start
            return frames, thread.take(), together_s
    finally:
        thread.close()


def _same_bits(rehearsal: Rehearsal, numbers: set[int]) -> bool:
    """Whether prompts, frames and chunks have the same bits with each of these numbers of threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for number in numbers:
            torch.set_num_threads(number)
            results.append([*rehearsal.prompt(), rehearsal.chunk()])
    finally:
        torch.set_num_threads(before)
    first, *others = results
    return all(torch.equal(one, wanted) for other in others for one, wanted in zip(other, first, strict=True))
