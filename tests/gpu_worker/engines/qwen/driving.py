"""Driving an engine in tests: opening one on a small checkpoint, and running jobs to their ends."""

import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import wait
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from gpu_worker.engines.base import Done, Fault, Job, Pcm, Reference, Sampling
from gpu_worker.engines.qwen.build import QwenOptions, open_engine
from gpu_worker.engines.qwen.codec.shared_codecs import SharedCodecs
from gpu_worker.engines.qwen.engine import QwenEngine
from tests.checkpoints import Kind, Size, tiny


class Outcome(msgspec.Struct):
    """What came of a job: its PCM chunks, its end, and the number of the step that brought each."""

    chunks: list[bytes] = []
    steps: list[int] = []
    end: Done | Fault | None = None

    @property
    def pcm(self) -> bytes:
        """All that was spoken."""
        return b"".join(self.chunks)


@functools.cache
def shared(device: Literal["cpu", "cuda"] = "cpu") -> QwenOptions:
    """What all engines on a device share: streams, and the speech tokenizer of all small checkpoints, which stays."""
    codecs = SharedCodecs(dtype=torch.float32, device=torch.device(device))
    codecs.acquire(tiny("custom_voice"))
    return QwenOptions(codecs=codecs, device=device)


def engine(kind: Kind, size: Size | None = None, device: Literal["cpu", "cuda"] = "cpu", **options: Any) -> QwenEngine:
    """A new engine, float32 unless told otherwise."""
    options = {"slots": 4, "max_model_len": 512, "dtype": "float32", **options}
    return open_engine(tiny(kind, size), msgspec.structs.replace(shared(device), **options))


def job(number: int, text: str = "Hello world, good morning.", **fields: Any) -> Job:
    """A CustomVoice job with a seed of its own; `fields` replace or add."""
    sampling = fields.pop("sampling", Sampling(seed=number, max_new_tokens=24))
    return Job(
        **{"id": f"job {number}", "task": "CustomVoice", "text": text, "voice": "vivian", **fields}, sampling=sampling
    )


def recording(seconds: float = 1.0, seed: int = 0) -> bytes:
    """A made-up recording: noise under a slow envelope."""
    samples = round(seconds * 24_000)
    noise = np.random.default_rng(seed).normal(size=samples) * (1.2 + np.sin(np.arange(samples) / 3000))
    return (noise * 3000).clip(-32767, 32767).astype("<i2").tobytes()


def clone(number: int, *, text: str | None = "the speech of today", **fields: Any) -> Job:
    """A job that speaks like a recording, in context where `text`, its transcript, is given."""
    reference = Reference.of(recording(seed=number), text=text, x_vector_only=text is None)
    return job(number, task="Base", voice="", reference=reference, **fields)


def run(
    speaker: QwenEngine, jobs: Iterable[Job], *, every: int = 0, stalled: Sequence[str] = (), limit: int = 5000
) -> dict[str, Outcome]:
    """Admit jobs as slots allow (one every `every` steps), step until all have ended."""
    waiting = list(jobs)
    outcomes = {waited.id: Outcome() for waited in waiting}
    for number in range(limit):
        if waiting and speaker.capacity() and (not every or number % every == 0):
            speaker.admit(waiting.pop(0))
            continue
        if not speaker.runnable(stalled):
            wait([held.reference for held in speaker._sequences.values() if held.reference])
        take(speaker, outcomes, number, stalled)
        if not waiting and all(outcome.end or name in stalled for name, outcome in outcomes.items()):
            return outcomes
    raise AssertionError(f"not done after {limit} steps: {outcomes}")


def take(speaker: QwenEngine, outcomes: dict[str, Outcome], number: int, stalled: Sequence[str] = ()) -> None:
    """One step."""
    for event in speaker.step(stalled):
        outcome = outcomes[event.job_id]
        assert outcome.end is None, "an event after the end"
        if isinstance(event, Pcm):
            outcome.chunks.append(event.data)
            outcome.steps.append(number)
        else:
            outcome.end = event
