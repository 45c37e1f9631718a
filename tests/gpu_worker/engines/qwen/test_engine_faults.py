"""An engine that runs out of memory, and a model that goes silent."""

import functools
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import msgspec
import torch

from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.runtime.cuda_streams import CudaStreams
from gpu_worker.engines.qwen.vocoder import Vocoder
from shared.protocol import Sampling
from tests.checkpoints import tiny
from tests.gpu_worker.engines.qwen.driving import Outcome, assemble, job, kept_engine, kept_parts, run, shared, take
from tests.gpu_worker.engines.qwen.faulty_parts import (
    LastMemoryCodec,
    OutOfMemoryOperators,
    SilentCodec,
    out_of_memory_parts,
)
from tests.gpu_worker.engines.qwen.test_engine import LONG, end_of

JOBS = [job(17, sampling=Sampling(seed=17, max_new_tokens=14)), job(3, LONG, sampling=Sampling(seed=3)), job(6)]


@functools.cache
def _undisturbed() -> dict[str, Outcome]:
    """The speech of JOBS without errors."""
    return run(kept_engine("custom_voice"), JOBS)


def _check_repetition(faulty: QwenEngine, faults: AbstractContextManager[object]) -> None:
    """Repeat every admission and step that runs out of memory. The audio must be that of a run without errors."""
    waiting = list(JOBS)
    outcomes = {one.id: Outcome() for one in JOBS}
    failures = 0
    with faults:
        while not all(outcome.end for outcome in outcomes.values()):
            try:
                if waiting:
                    faulty.admit(waiting[0])
                    waiting.pop(0)
                else:
                    take(faulty, outcomes, 0)
            except torch.OutOfMemoryError:
                failures += 1
    assert failures >= 10
    for one in JOBS:
        assert outcomes[one.id].pcm == _undisturbed()[one.id].pcm
        assert end_of(outcomes[one.id]) == end_of(_undisturbed()[one.id])


def test_a_step_can_be_repeated_after_a_part_ran_out_of_memory() -> None:
    """The prompt, the prefill, the decode step and the decoder fail now and then, before they have changed anything."""
    _check_repetition(assemble(out_of_memory_parts(kept_parts("custom_voice"), every=7)), nullcontext())


def test_a_step_can_be_repeated_after_an_operator_ran_out_of_memory() -> None:
    """Operators in the midst of all parts fail now and then."""
    _check_repetition(kept_engine("custom_voice"), OutOfMemoryOperators(every=97))


def test_a_chunk_needs_no_memory_once_its_codec_stream_has_advanced() -> None:
    """Not all of the stream can be taken back: a step that is repeated would decode other samples."""
    made = kept_parts("custom_voice")
    codecs = shared().codecs
    codec = codecs.acquire(tiny("custom_voice"))
    faulty = LastMemoryCodec(codec)
    vocoder = Vocoder(faulty, made.state.ring_buffer, made.slots, CudaStreams())  # type: ignore[arg-type]
    chunk: Any = SimpleNamespace(next_chunk=2, slot=0, frames_ready=2, pending_frames=2)
    with torch.inference_mode(), faulty:
        pcm = vocoder.decode([chunk]).wait()
    assert pcm.numpy().any()
    codecs.release(codec)


def test_a_silent_model_is_stopped() -> None:
    """Six seconds of near silence end an utterance with the reason `length`."""
    made = kept_parts("custom_voice")
    codecs = shared().codecs
    codec = codecs.acquire(tiny("custom_voice"))
    vocoder = Vocoder(SilentCodec(codec), made.state.ring_buffer, made.slots, CudaStreams())
    speaker = assemble(msgspec.structs.replace(made, vocoder=vocoder))
    outcomes = run(speaker, [job(0, sampling=Sampling(seed=10, max_new_tokens=190))])
    codecs.release(codec)
    assert end_of(outcomes["job 0"]) == ("length", 80)  # chunks of 1, 1, 2, 4 and nine of 8 frames
