"""Driving an engine in tests: building one on a small checkpoint, and running jobs to their ends."""

import contextlib
import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Literal
from unittest.mock import patch

import msgspec
import numpy as np
import torch

from gpu_worker.engines.base import Done, Fault, Job, Pcm, Reference
from gpu_worker.engines.fades import FADE_IN_S, FADE_OUT_S
from gpu_worker.engines.qwen.build import QwenOptions, build_parts
from gpu_worker.engines.qwen.codec.shared_codecs import SharedCodecs
from gpu_worker.engines.qwen.engine import Parts, QwenEngine
from gpu_worker.engines.qwen.runtime import cpu_traces
from shared.pcm import SAMPLE_RATE
from shared.protocol import Sampling, Segment
from tests.checkpoints import Kind, Size, tiny

UNFADED = slice(round(FADE_IN_S * SAMPLE_RATE), -round(FADE_OUT_S * SAMPLE_RATE))
"""The samples of an utterance that no fade changes."""

_woken = threading.Event()
"""Set when an encoded reference may have made an engine runnable."""


class Outcome(msgspec.Struct):
    """The events of a job: its PCM chunks, the number of the step of each, and its end."""

    chunks: list[bytes] = []
    steps: list[int] = []
    end: Done | Fault | None = None

    @property
    def pcm(self) -> bytes:
        """The whole speech."""
        return b"".join(self.chunks)


@functools.cache
def shared(device: Literal["cpu", "cuda"] = "cpu") -> QwenOptions:
    """The options of all engines on a device. They share streams, and the codec of all small checkpoints."""
    codecs = SharedCodecs(dtype=torch.float32, device=torch.device(device))
    codecs.acquire(tiny("custom_voice"))  # so the codec is loaded once, and stays
    return QwenOptions(codecs=codecs, device=device, wake=_woken.set)


def untraced() -> Any:
    """Engines that are opened here call the code predictor as it is, without traces, and give the same samples.

    For a with statement, and a decorator of tests.
    A trace takes 0.2 s of CPU time, which 70 frames of a small model give back.
    """

    def as_it_is(_: object, function: cpu_traces.Function, arguments: Sequence[Any], _varied: object) -> Any:
        return cpu_traces._Untraced(function, len(arguments))

    return patch.object(cpu_traces.CpuTraces, "_trace", as_it_is)


def parts(
    kind: Kind,
    size: Size | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    *,
    traced: bool = False,
    **options: Any,
) -> Parts:
    """The parts of a new engine, in float32 by default. A test may replace some of them. `traced`: see `untraced`."""
    options = {"slots": 4, "max_model_len": 512, "dtype": "float32", **options}
    with contextlib.nullcontext() if traced else untraced():
        directory = options.pop("directory", tiny(kind, size))
        return build_parts(directory, msgspec.structs.replace(shared(device), **options))


def kept_parts(kind: Kind, size: Size | None = None, *, traced: bool = True, **options: Any) -> Parts:
    """Parts that are loaded once for all tests of a process: a load takes half a second.

    A new engine of them begins without jobs, whatever an earlier one left. None of them may be closed.
    """
    return _kept_parts(kind, size, traced=traced, **options)


_kept_parts = functools.cache(parts)


def kept_engine(
    kind: Kind, size: Size | None = None, *, slots: int = 4, run_ahead: bool = False, **options: Any
) -> QwenEngine:
    """A new engine of kept parts, see `kept_parts`. It uses `slots` of their four."""
    made = kept_parts(kind, size, **options)
    return assemble(msgspec.structs.replace(made, slots=slots), run_ahead=run_ahead)


def assemble(parts: Parts, *, run_ahead: bool = False, **options: Any) -> QwenEngine:
    """An engine of these parts. On CUDA it always runs ahead."""
    return QwenEngine(parts, pause_s=shared().pause_s, run_ahead=run_ahead or parts.state.active.is_cuda, **options)


def engine(kind: Kind, size: Size | None = None, device: Literal["cpu", "cuda"] = "cpu", **options: Any) -> QwenEngine:
    """A new engine, see `parts`."""
    return assemble(parts(kind, size, device, **options))


def job(number: int, text: str = "Hello world, good morning.", **fields: Any) -> Job:
    """A CustomVoice job with a seed of its own; `fields` replace or add."""
    sampling = fields.pop("sampling", Sampling(seed=number, max_new_tokens=24))
    return Job(
        **{"id": f"job {number}", "task": "CustomVoice", "segments": [Segment(text=text)], "voice": "vivian", **fields},
        sampling=sampling,
    )


def recording(seconds: float = 1.0, seed: int = 0) -> bytes:
    """A made-up recording: noise under a slow envelope, 24 kHz mono int16."""
    samples = round(seconds * 24_000)
    noise = np.random.default_rng(seed).normal(size=samples) * (1.2 + np.sin(np.arange(samples) / 3000))
    return (noise * 3000).clip(-32767, 32767).astype("<i2").tobytes()


def clone(number: int, *, text: str | None = "the speech of today", **fields: Any) -> Job:
    """A job that clones a recording: in context if `text`, its transcript, is given."""
    reference = Reference.of(recording(seed=number), text=text, x_vector_only=text is None)
    return job(number, task="Base", voice="", reference=reference, **fields)


def run(
    speaker: QwenEngine, jobs: Iterable[Job], *, every: int = 0, held_back: Sequence[str] = (), limit: int = 5000
) -> dict[str, Outcome]:
    """Admit jobs as slots allow (one every `every` steps), and step until all have ended."""
    waiting = list(jobs)
    outcomes = {waited.id: Outcome() for waited in waiting}
    for number in range(limit):
        if waiting and speaker.capacity() and (not every or number % every == 0):
            speaker.admit(waiting.pop(0))
            continue
        wait_until_runnable(speaker, held_back)
        take(speaker, outcomes, number, held_back)
        if not waiting and all(outcome.end or name in held_back for name, outcome in outcomes.items()):
            return outcomes
    raise AssertionError(f"not done after {limit} steps: {outcomes}")


def take_turns(speaker: QwenEngine, jobs: Sequence[Job], steps: int = 1) -> dict[str, Outcome]:
    """Let jobs take turns of `steps` steps in one slot: each is parked between its turns."""
    outcomes = {one.id: Outcome() for one in jobs}
    for one in jobs:
        speaker.admit(one)
        speaker.park(one.id)
    while any(outcome.end is None for outcome in outcomes.values()):
        for name in [name for name, outcome in outcomes.items() if outcome.end is None]:
            speaker.unpark(name)
            assert speaker.capacity() == 0
            for number in range(steps):
                if speaker.capacity() == 0:
                    wait_until_runnable(speaker)
                if speaker.runnable(()):
                    take(speaker, outcomes, number)
            expected = speaker.park_bytes(name)
            kept = speaker.park(name)
            assert expected <= kept <= expected + (4 << 20 if expected else 0)
            assert speaker.park(name) == speaker.park_bytes(name) == kept
            assert speaker.memory().host.get("parked", 0) >= kept
            assert speaker.capacity() == 1
    assert "parked" not in speaker.memory().host
    return outcomes


def wait_until_runnable(speaker: QwenEngine, held_back: Sequence[str] = ()) -> None:
    """Wait while the engine only waits for references that are being encoded."""
    _woken.clear()
    while not speaker.runnable(held_back):
        assert _woken.wait(60), "no reference was encoded"
        _woken.clear()


def take(speaker: QwenEngine, outcomes: dict[str, Outcome], number: int, held_back: Sequence[str] = ()) -> None:
    """Do one step, and add its events to the outcomes."""
    for event in speaker.step(held_back):
        outcome = outcomes[event.job_id]
        assert outcome.end is None, "an event after the end"
        if isinstance(event, Pcm):
            outcome.chunks.append(event.data)
            outcome.steps.append(number)
        else:
            outcome.end = event
