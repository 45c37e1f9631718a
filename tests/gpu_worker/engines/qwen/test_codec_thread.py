"""An engine whose codec decodes large chunks on a thread of its own: not a bit of any speech changes."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from gpu_worker.engines.qwen.chunk_schedule import MAX_CHUNK_FRAMES
from gpu_worker.engines.qwen.codec_thread import CodecThread
from gpu_worker.engines.qwen.deliveries import DecoderThread
from gpu_worker.engines.qwen.engine import Parts, QwenEngine
from gpu_worker.engines.qwen.model.slot_state import RING_FRAMES
from gpu_worker.engines.qwen.reference_cache import EncodedReference
from gpu_worker.engines.qwen.runtime.cuda_streams import CudaStreams
from gpu_worker.engines.qwen.vocoder import Vocoder
from tests.checkpoints import tiny
from tests.gpu_worker.engines.qwen.driving import (
    Outcome,
    assemble,
    clone,
    kept_engine,
    kept_parts,
    parts,
    run,
    shared,
    take,
    wait_until_runnable,
)
from tests.gpu_worker.engines.qwen.driving import job as a_job
from tests.gpu_worker.engines.qwen.faulty_parts import SilentCodec, with_encoder
from tests.gpu_worker.engines.qwen.test_engine import PAUSED, end_of
from tests.gpu_worker.engines.qwen.test_parking import sampling

Make = Callable[..., QwenEngine]

FRAMES = 26
"""Chunks of 1, 1, 2, 4, 8, 8 and 2."""

CLONE_SEED = 2
JOBS = [
    a_job(10, sampling=sampling(10, FRAMES)),
    a_job(12, sampling=sampling(12, FRAMES)),
    a_job(3, sampling=sampling(3, 18, temperature=0), non_streaming_mode=False),
    a_job(7, segments=PAUSED, sampling=sampling(1, 18)),
]
JOB, OTHER = JOBS[:2]


class GatedCodec:
    """A codec whose large chunks wait for the gate, if they are decoded on the codec's thread.

    The next `faults` large chunks run out of memory, on any thread.
    """

    def __init__(self, codec: Any) -> None:
        self._codec = codec
        self.gate = threading.Event()
        self.on_thread = 0
        self.faults = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def decode(self, codes: Tensor, *args: Any) -> Tensor:
        """The waveform of the real codec."""
        if threading.current_thread().name == "codec":
            self.on_thread += 1
            assert self.gate.wait(60)
        if codes.shape[1] == MAX_CHUNK_FRAMES and self.faults:
            self.faults -= 1
            slots, state = args
            state.positions[slots] += 1  # as if it had begun
            raise torch.OutOfMemoryError("made up")
        waveform: Tensor = self._codec.decode(codes, *args)
        return waveform


@pytest.fixture
def codec() -> Iterator[GatedCodec]:
    """The codec of the small checkpoints, its gate closed."""
    codecs = shared().codecs
    held = codecs.acquire(tiny("custom_voice"))
    yield GatedCodec(held)
    codecs.release(held)


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many threads each thread would compute with: here all have one, as waiting threads spin in tests."""
    numbers: dict[str, int] = {}

    def record(number: int) -> None:
        numbers[threading.current_thread().name] = number

    monkeypatch.setattr(torch, "set_num_threads", record)
    return numbers


@pytest.fixture
def make(numbers: dict[str, int]) -> Iterator[Make]:
    """Makes engines with a thread for the codec, and ends the threads behind the test."""
    del numbers
    threads: list[DecoderThread] = []

    def made(made: Parts, codec: Any = None, *, streams: int = 2, slots: int = 4) -> QwenEngine:
        if codec is not None:
            made = msgspec.structs.replace(made, vocoder=Vocoder(codec, made.state.ring_buffer, 4, CudaStreams()))
        threads.append(CodecThread(threads=4, codec_threads=1, streams=streams, wake=shared().wake))
        return assemble(msgspec.structs.replace(made, slots=slots), codec_thread=threads[-1])

    yield made
    for thread in threads:
        thread.close()


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Outcome]:
    """What the jobs speak without a thread for the codec."""
    return run(kept_engine("custom_voice"), JOBS)


def until_blocked(speaker: QwenEngine, *jobs: Any) -> dict[str, Outcome]:
    """Admit jobs, and step until the engine can do no more."""
    outcomes = {one.id: Outcome() for one in jobs}
    for one in jobs:
        speaker.admit(one)
    while speaker.runnable(()):
        take(speaker, outcomes, 0)
    return outcomes


def finish(speaker: QwenEngine, outcomes: dict[str, Outcome]) -> None:
    """Step until the jobs have ended."""
    while any(outcome.end is None for outcome in outcomes.values()):
        wait_until_runnable(speaker)
        take(speaker, outcomes, 0)


def soon(action: Callable[[], None]) -> threading.Timer:
    """Call `action` while this thread waits for something."""
    timer = threading.Timer(0.05, action)
    timer.start()
    return timer


@pytest.mark.parametrize(("jobs", "streams"), [(1, 4), (4, 1)])
def test_no_bit_and_no_chunk_changes(
    jobs: int, streams: int, make: Make, codec: GatedCodec, undisturbed: dict[str, Outcome]
) -> None:
    """Sampled and greedy, in two utterances, and one token of text a frame: one job and four at a time."""
    codec.gate.set()
    outcomes = run(make(kept_parts("custom_voice"), codec, streams=streams), JOBS[:jobs])
    assert [one.chunks for one in outcomes.values()] == [undisturbed[name].chunks for name in outcomes]
    assert [one.end for one in outcomes.values()] == [undisturbed[name].end for name in outcomes]
    assert codec.on_thread


def test_no_bit_of_a_clone_changes(make: Make, codec: GatedCodec) -> None:
    """Its codec stream begins behind the recording."""
    codec.gate.set()
    made = kept_parts("base")

    def encode(_: np.ndarray, wants_codes: bool) -> EncodedReference:  # noqa: FBT001 -- ReferenceCache calls it so
        assert wants_codes
        state, codes = codec.new_state(1), torch.arange(5 * 16).view(5, 16)
        with torch.inference_mode():
            codec.prime(codes, 0, state)
            return EncodedReference(torch.ones(made.state.hidden.shape[1]), codes, state.snapshot(0))

    one = clone(1, sampling=sampling(CLONE_SEED, 18))
    with with_encoder(made, encode, shared().wake) as encoded:
        wanted = run(assemble(encoded), [one])[one.id]
        assert run(make(encoded, codec), [one])[one.id].chunks == wanted.chunks
    assert codec.on_thread


def test_frames_are_made_until_the_ring_is_full(
    make: Make,
    codec: GatedCodec,
    numbers: dict[str, int],
    undisturbed: dict[str, Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the thread has a chunk, frames leave it its share of the threads. Then the engine waits to be woken."""
    made = kept_parts("custom_voice")
    threads: list[int] = []
    step = made.runner.decode_step

    def decode_step(*args: Any, **options: Any) -> bool:
        threads.append(numbers["MainThread"])
        return step(*args, **options)

    monkeypatch.setattr(made.runner, "decode_step", decode_step)
    speaker = make(made, codec)
    outcomes = until_blocked(speaker, JOB)
    assert threads == [4] * 16 + [3] * 8  # 8 frames in chunks of 1, 1, 2 and 4, then twice 8
    assert speaker._sequences[JOB.id].pending_frames == RING_FRAMES
    assert numbers == {"MainThread": 4, "codec": 1}
    assert len(outcomes[JOB.id].chunks) == 4
    codec.gate.set()
    finish(speaker, outcomes)
    assert outcomes[JOB.id].chunks == undisturbed[JOB.id].chunks
    assert end_of(outcomes[JOB.id]) == ("length", FRAMES)
    assert codec.on_thread == (FRAMES - 8) // 8


def test_a_newcomer_waits_for_no_large_chunk(make: Make, codec: GatedCodec, undisturbed: dict[str, Outcome]) -> None:
    """All of its speech comes while the chunk of another job is being decoded."""
    speaker = make(kept_parts("custom_voice"), codec)
    outcomes = until_blocked(speaker, JOB) | until_blocked(speaker, OTHER)
    assert outcomes[OTHER.id].chunks == undisturbed[OTHER.id].chunks
    assert codec.on_thread == 1
    codec.gate.set()
    finish(speaker, outcomes)
    assert outcomes[JOB.id].pcm == undisturbed[JOB.id].pcm


@pytest.mark.parametrize("slots", [1, 2])
def test_a_cancelled_chunk_disturbs_nobody(
    slots: int, make: Make, codec: GatedCodec, undisturbed: dict[str, Outcome]
) -> None:
    """The next job has another slot, or waits until the codec has left this one."""
    speaker = make(kept_parts("custom_voice"), codec, slots=slots)
    until_blocked(speaker, JOB)
    speaker.cancel(JOB.id)
    assert speaker.capacity() == slots
    assert not speaker.runnable(())
    timer = soon(codec.gate.set) if slots == 1 else None
    outcomes = until_blocked(speaker, OTHER)
    if timer is not None:
        timer.join()
    finish(speaker, outcomes)
    assert outcomes[OTHER.id].chunks == undisturbed[OTHER.id].chunks
    assert codec.gate.is_set() == (slots == 1)
    codec.gate.set()


def test_a_job_is_parked_behind_its_chunk(make: Make, codec: GatedCodec, undisturbed: dict[str, Outcome]) -> None:
    """Its codec stream is that behind the chunk, whose audio comes from the next step."""
    speaker = make(kept_parts("custom_voice"), codec, slots=1)
    outcomes = until_blocked(speaker, JOB)
    timer = soon(codec.gate.set)
    speaker.park(JOB.id)
    timer.join()
    outcomes[OTHER.id] = Outcome()
    speaker.admit(OTHER)
    while outcomes[OTHER.id].end is None:
        wait_until_runnable(speaker)
        take(speaker, outcomes, 0)
    assert len(outcomes[JOB.id].chunks) == 5
    speaker.unpark(JOB.id)
    finish(speaker, outcomes)
    assert [outcome.chunks for outcome in outcomes.values()] == [undisturbed[name].chunks for name in outcomes]


def test_a_step_fails_with_the_thread(make: Make, codec: GatedCodec, undisturbed: dict[str, Outcome]) -> None:
    """The chunk is due again, and the next step itself decodes it: a fault that stays fails two steps in a row."""
    codec.gate.set()
    codec.faults = 2
    speaker = make(kept_parts("custom_voice"), codec)
    outcomes = {JOB.id: Outcome()}
    speaker.admit(JOB)
    failed: list[bool] = []
    while outcomes[JOB.id].end is None:
        wait_until_runnable(speaker)
        try:
            take(speaker, outcomes, 0)
            failed.append(False)
            codec.gate.set()
        except torch.OutOfMemoryError:
            failed.append(True)
            codec.gate.clear()
    first = failed.index(True)
    assert failed[first : first + 3] == [True, True, False]
    assert sum(failed) == 2
    assert outcomes[JOB.id].chunks == undisturbed[JOB.id].chunks


def test_a_thread_outlives_an_offload_and_ends_with_the_engine(
    make: Make, codec: GatedCodec, undisturbed: dict[str, Outcome]
) -> None:
    """Both wait for the chunk of a job that is gone. Without a large chunk there is no thread."""
    speaker = make(parts("custom_voice"), codec)
    running = {thread.name for thread in threading.enumerate()}
    assert "codec" not in running
    until_blocked(speaker, JOB)
    speaker.cancel(JOB.id)
    timer = soon(codec.gate.set)
    speaker.offload()
    timer.join()
    speaker.restore()
    assert run(speaker, [OTHER])[OTHER.id].chunks == undisturbed[OTHER.id].chunks
    assert "codec" in {thread.name for thread in threading.enumerate()}
    speaker.close()
    assert "codec" not in {thread.name for thread in threading.enumerate()}


def test_a_silent_model_is_stopped_at_the_same_frame(make: Make, codec: GatedCodec) -> None:
    """The frames that were made while the last chunk was being decoded are dropped."""
    codec._codec = SilentCodec(codec._codec)
    speaker = make(kept_parts("custom_voice"), codec)
    outcomes = until_blocked(speaker, a_job(0, sampling=sampling(10, 190)))
    while outcomes["job 0"].end is None:
        codec.gate.set()
        wait_until_runnable(speaker)
        codec.gate.clear()
        while speaker.runnable(()):
            take(speaker, outcomes, 0)
    assert end_of(outcomes["job 0"]) == ("length", 80)  # as in test_engine_faults.py
