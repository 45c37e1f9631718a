"""A model's way to the device and back, step by step: `python -m tests.benchmarks.moves`.

Loads an engine, lets it speak, offloads and restores it, and prints where the time and the device's memory go.
On a CPU the weights stay where they are, and nothing is captured: the table shows that the program works.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpu_worker.engines.base import Job, Pcm
from gpu_worker.engines.qwen.build import QwenOptions, codec_dtype, open_engine
from gpu_worker.engines.qwen.codec.shared_codecs import SharedCodecs
from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.runtime import captured_buckets, cuda_graphs
from shared.protocol import Sampling, Segment
from tests.benchmarks import machine
from tests.benchmarks.endless import SIZES, endless

SPOTS: list[tuple[Any, str]] = [
    (captured_buckets, "warm_up"),
    (captured_buckets, "capture_graphs"),
    (cuda_graphs.torch.cuda.CUDAGraph, "capture_end"),
]
"""Functions whose time is a part of a load or a restore; `capture_end` instantiates a graph."""


class Spans:
    """Seconds by function, as far as `timed` has seen them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which adds to its seconds."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
                self.calls[name] = self.calls.get(name, 0) + 1

        return call


@contextmanager
def spans() -> Iterator[Spans]:
    """Time SPOTS inside the block."""
    found, before = Spans(), [getattr(owner, name) for owner, name in SPOTS]
    for (owner, name), function in zip(SPOTS, before, strict=True):
        setattr(owner, name, found.timed(name, function))
    try:
        yield found
    finally:
        for (owner, name), function in zip(SPOTS, before, strict=True):
            setattr(owner, name, function)


def first_audio_s(engine: QwenEngine) -> float:
    """Seconds from the admission of a job to its first audio; the job is dropped then."""
    began = time.perf_counter()
    segments = [Segment(text="Hello world, good morning.")]
    engine.admit(Job(id="j", task="CustomVoice", segments=segments, voice="ryan", sampling=Sampling(seed=1)))
    while not any(isinstance(event, Pcm) for event in engine.step(())):
        pass
    took_s = time.perf_counter() - began
    engine.cancel("j")
    while engine.runnable(()):
        engine.step(())
    return took_s


def used_mb(device: str) -> float:
    """The device's memory in use, whoever uses it."""
    if device != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def moves(directory: Path, device: str, slots: int) -> Iterator[tuple[str, float, float, Spans]]:
    """Each move: its name, its seconds, the MB of the device that it took, and the spans inside it."""
    codecs = SharedCodecs(dtype=codec_dtype(device, "auto"), device=torch.device(device))
    options = QwenOptions(codecs=codecs, device=device, slots=slots, max_model_len=2048)
    engine: QwenEngine | None = None

    def load() -> None:
        nonlocal engine
        engine = open_engine(directory, options)

    def timed(name: str, move: Callable[[], object]) -> tuple[str, float, float, Spans]:
        before = used_mb(device)
        with spans() as inside:
            began = time.perf_counter()
            move()
            took_s = time.perf_counter() - began
        return name, took_s, used_mb(device) - before, inside

    yield timed("load", load)
    assert engine is not None
    yield timed("warm-up of the synthesis thread", engine.warm_up)
    for which in ("first", "second", "third"):
        yield timed(f"{which} request's first audio", lambda: first_audio_s(engine))
    for which in ("first", "second"):
        yield timed(f"{which} offload", engine.offload)
        yield timed(f"{which} restore", engine.restore)
        yield timed("first audio after it", lambda: first_audio_s(engine))
    engine.close()


def main(arguments: list[str] | None = None) -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.moves", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the random checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--slots", type=int, default=16)
    chosen = parser.parse_args(arguments)
    print("\n".join(f"- {line}" for line in machine.describe()))
    print(f"- {chosen.size}, {chosen.slots} slots, on {chosen.device}\n")
    names = [name for _, name in SPOTS]
    print(f"| move | ms | MB | {' | '.join(f'{name} ms (calls)' for name in names)} |\n|{'---|' * (3 + len(names))}")
    for name, seconds, taken_mb, inside in moves(endless(chosen.size), chosen.device, chosen.slots):
        parts = [f"{1000 * inside.seconds.get(part, 0):.0f} ({inside.calls.get(part, 0)})" for part in names]
        print(f"| {name} | {1000 * seconds:.1f} | {taken_mb:+.0f} | {' | '.join(parts)} |", flush=True)


if __name__ == "__main__":
    main()
