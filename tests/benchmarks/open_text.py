"""`python -m tests.benchmarks.open_text`: from a word's arrival to its first audio, on a virtual device. No GPU needed.

Open requests get a word every 100 ms, beside requests whose text is whole. A word's first audio is the frame behind its
first token. The table shows the order of work: the times of the device are estimates, see simulation.py.
HTTP, sockets and the encoding of audio are not included.

The memory of a request is counted twice: Python objects on the host for each open request that waits for text, and what
its slot keeps in host RAM while it is parked, for the published 1.7B model in bfloat16.
"""

import random
import tracemalloc
from itertools import accumulate, count
from typing import Final

import msgspec
import numpy as np
import pytest

from gpu_worker.engines.base import Done, Job, Pcm
from gpu_worker.engines.qwen.engine import QwenEngine
from shared.pcm import FRAME_SAMPLES, samples_of
from shared.protocol import Sampling
from tests.gpu_worker.engines.qwen import simulation
from tests.gpu_worker.engines.qwen.driving import job
from tests.gpu_worker.engines.qwen.virtual_cuda import VirtualCuda, install

WORDS: Final = ("hello", "world", "good", "morning", "today", "voice", "speech", "the")
WORD_S: Final = 0.1
WORDS_A_REQUEST: Final = 12
SECONDS: Final = 6.0
WHOLE: Final = 16
TOKENS_PARKED: Final = 60
BYTES_A_TOKEN: Final = 112 << 10
"""Keys and values of a token in the published models."""

BYTES_OF_CODEC: Final = 2_900_000


class Open(msgspec.Struct):
    """An open request: its words with their moments, the first token of each, and the samples heard so far."""

    words: list[tuple[float, str]]
    first_tokens: list[int]
    came: list[float] = []
    samples: int = 0
    timed: int = 0


def measure(cuda: VirtualCuda, engine: QwenEngine, requests: int, seed: int = 0) -> list[float]:
    """The seconds from each word to its first audio, with so many open requests at a time beside WHOLE whole ones."""
    dice = random.Random(seed)  # noqa: S311 -- no secret
    names, end = count(), cuda.now + SECONDS
    opened: dict[str, Open] = {}
    whole: set[str] = set()
    times: list[float] = []
    while cuda.now < end or opened or whole:
        while cuda.now < end and len(opened) < requests:
            name = f"open {next(names)}"
            opened[name] = begin(cuda, engine, name, dice)
        while cuda.now < end and len(whole) < WHOLE:
            name = f"whole {next(names)}"
            whole.add(name)
            admit(cuda, engine, msgspec.structs.replace(job(1, sampling=Sampling(seed=1, max_new_tokens=50)), id=name))
        for name, one in opened.items():
            write(cuda, engine, name, one)
        cuda.arrivals = sorted(one.words[0][0] for one in opened.values() if one.words)
        if not engine.runnable(()):
            cuda.wait_until(cuda.arrivals[0])
            continue
        cuda.work(simulation.STEP_HOST_S)
        for event in engine.step(()):
            if isinstance(event, Pcm) and event.job_id in opened:
                times += hear(cuda.now, opened[event.job_id], samples_of(event.data))
            elif isinstance(event, Done):
                opened.pop(event.job_id, None)
                whole.discard(event.job_id)
    return times


def begin(cuda: VirtualCuda, engine: QwenEngine, name: str, dice: random.Random) -> Open:
    """Admit an open request; its words come from a random moment on."""
    words = [dice.choice(WORDS) + " " for _ in range(WORDS_A_REQUEST)]
    prompts = engine._parts.prompts
    tokens = [len(prompts.settled(text)) for text in accumulate(words)]
    start = cuda.now + dice.uniform(0, WORD_S)
    moments = [start + WORD_S * place * dice.uniform(0.9, 1.1) for place in range(len(words))]
    sampling = Sampling(seed=1, max_new_tokens=tokens[-1] + 4)
    admit(cuda, engine, msgspec.structs.replace(job(1, "", sampling=sampling), id=name, open=True))
    return Open([*zip(sorted(moments), words, strict=True)], [0, *tokens[:-1]])


def admit(cuda: VirtualCuda, engine: QwenEngine, one: Job) -> None:
    """Take a job into a slot."""
    engine.admit(one)
    cuda.work(simulation.ADMIT_S + simulation.PREFILL_HOST_S)


def write(cuda: VirtualCuda, engine: QwenEngine, name: str, one: Open) -> None:
    """Append the words that have come."""
    while one.words and one.words[0][0] <= cuda.now:
        moment, word = one.words.pop(0)
        one.came.append(moment)
        engine.append(name, word, flush=False)
        if not one.words:
            engine.end_text(name)


def hear(now: float, one: Open, samples: int) -> list[float]:
    """Count audio; the times of the words whose first frame has begun with it."""
    one.samples += samples
    times = []
    while one.timed < len(one.came) and one.samples > one.first_tokens[one.timed] * FRAME_SAMPLES:
        times.append(now - one.came[one.timed])
        one.timed += 1
    return times


def host_bytes(engine: QwenEngine, requests: int = 32) -> int:
    """Bytes of Python objects for an open request with 500 characters of text that waits for more."""
    engine.append("warm up", "", flush=False)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(requests):
        name = f"memory {number}"
        engine.admit(msgspec.structs.replace(job(1, ""), id=name, open=True))
        engine.append(name, "hello " * 80 + "voice", flush=False)
        engine.waits_for_text(name)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for number in range(requests):
        engine.cancel(f"memory {number}")
    return (after - before) // requests


def main() -> None:
    """Print both tables."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda = install(monkeypatch, simulation.device_time, computes=False)
        engine = cuda.engine(slots=64, dtype="bfloat16")
        print(f"open requests, beside {WHOLE} whole ones | words | p50 ms | p95 ms")
        for requests in (1, 8, 32):
            times = measure(cuda, engine, requests)
            p50, p95 = (1000 * float(np.percentile(times, percent)) for percent in (50, 95))
            print(f"{requests:40} | {len(times):5} | {p50:6.1f} | {p95:6.1f}")
        print(f"host memory of an open request: {host_bytes(engine) / 1024:.0f} KiB of Python objects")
        parked = (TOKENS_PARKED * BYTES_A_TOKEN + BYTES_OF_CODEC) / 2**20
        print(f"parked after {TOKENS_PARKED} tokens of prompt and speech: {parked:.1f} MiB (1.7B, bfloat16)")


if __name__ == "__main__":
    main()
