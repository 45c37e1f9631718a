"""Time to first audio in the engine, without HTTP and encoding: `python -m tests.benchmarks.first_audio`.

With `--device virtual` (the default): on a virtual GPU, at several rates. No GPU is needed. The table shows the order
of work alone, with times that are estimates, see simulation.py.

With `--device cpu`: in CPU time of one thread, so a busy machine changes little. A newcomer comes to an idle engine,
and to one whose slots are all taken. The last two rows say what it may have to wait for: a step ends behind a frame or
a call of the vocoder if there is a command.
"""

import argparse
import statistics
import time

import pytest
import torch

from gpu_worker.engines.base import Pcm
from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.sequence import RunningJob
from shared.protocol import Sampling
from tests.benchmarks import machine
from tests.gpu_worker.engines.qwen import simulation
from tests.gpu_worker.engines.qwen.driving import engine, job
from tests.gpu_worker.engines.qwen.virtual_cuda import install

SLOTS = 8
NEWCOMER = job(100, "Good morning.", sampling=Sampling(seed=1, max_new_tokens=12))
LONG = "The old clock struck midnight, and nobody in the house was awake to hear it. " * 50


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.first_audio", description=__doc__)
    parser.add_argument("--device", choices=("virtual", "cpu"), default="virtual")
    parser.add_argument("--repeat", type=int, default=20, help="newcomers of each kind, on a CPU")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        on_cpu(arguments.repeat)
    else:
        on_virtual_device()


def on_virtual_device() -> None:
    """The median and the 95th percentile at several rates."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda = install(monkeypatch, simulation.device_time, computes=False)
        virtual = cuda.engine(slots=64, dtype="bfloat16")
        print("requests a second | p50 ms | p95 ms")
        for rate in simulation.SECONDS:
            p50, p95 = simulation.first_audio(cuda, virtual, rate)
            print(f"{rate:17} | {p50 * 1000:6.1f} | {p95 * 1000:6.1f}")


def on_cpu(repeat: int) -> None:
    """CPU milliseconds with the small checkpoint."""
    torch.set_num_threads(1)
    speaker = engine("custom_voice", slots=SLOTS, max_model_len=2048, traced=True)
    print("\n".join(f"- {line}" for line in machine.describe()))
    print(f"- {SLOTS} slots of the small checkpoint, CPU time of one thread\n")
    print("| CPU ms | p50 | p95 | most |\n|---|---|---|---|")
    heard_alone(speaker)  # warms up
    show("newcomer to an idle engine", [heard_alone(speaker) for _ in range(repeat)])
    for parked in (0, SLOTS - 1):
        show(f"newcomer in the place of slot {parked}, alone", [among_others(speaker, parked) for _ in range(repeat)])
    show("the same in a step of all", [among_others(speaker, 0, alone=False) for _ in range(repeat)])
    steps, decodes = full_steps(speaker, 8 * repeat)
    show(f"a step of {SLOTS}", steps)
    show("a call of the vocoder in it", decodes)
    speaker.close()


def heard_alone(speaker: QwenEngine) -> float:
    """A newcomer to an idle engine."""
    took_s = first_audio_s(speaker, [])
    empty(speaker)
    return took_s


def among_others(speaker: QwenEngine, parked: int, *, alone: bool = True) -> float:
    """A newcomer to a full engine: the job of slot `parked` is parked for it. `alone`: the others leave it the step."""
    fill(speaker)
    others = [sequence.job.id for sequence in speaker._sequences.values()]
    leaves = next(sequence.job.id for sequence in speaker._sequences.values() if sequence.slot == parked)
    began = time.process_time()
    speaker.park(leaves)
    park_s = time.process_time() - began
    took_s = first_audio_s(speaker, others if alone else [])
    empty(speaker)
    return park_s + took_s


def first_audio_s(speaker: QwenEngine, held_back: list[str]) -> float:
    """CPU seconds from the newcomer's admission to its first audio."""
    began = time.process_time()
    speaker.admit(NEWCOMER)
    while not any(isinstance(event, Pcm) and event.job_id == NEWCOMER.id for event in speaker.step(held_back)):
        pass
    return time.process_time() - began


def full_steps(speaker: QwenEngine, number: int) -> tuple[list[float], list[float]]:
    """CPU seconds of each step with all slots taken, and of each call of the vocoder in one."""
    fill(speaker)
    steps, decodes, decode = [], [], speaker._parts.vocoder.decode

    def timed(group: list[RunningJob]) -> object:
        began = time.process_time()
        try:
            return decode(group)
        finally:
            decodes.append(time.process_time() - began)

    speaker._parts.vocoder.decode = timed  # type: ignore[method-assign, assignment] # times it, and does the same
    for _ in range(number):
        began = time.process_time()
        speaker.step(())
        steps.append(time.process_time() - began)
    speaker._parts.vocoder.decode = decode  # type: ignore[method-assign]
    empty(speaker)
    return steps, decodes


def fill(speaker: QwenEngine) -> None:
    """Take all slots, a step apart, and speak for a while."""
    for number in range(SLOTS):
        speaker.admit(job(number, LONG, sampling=Sampling(seed=number)))
        speaker.step(())
    for _ in range(16):
        speaker.step(())


def empty(speaker: QwenEngine) -> None:
    """Drop all jobs."""
    for job_id in [*speaker._sequences, *speaker._parked]:
        speaker.cancel(job_id)
    while speaker.runnable(()):
        speaker.step(())


def show(what: str, seconds: list[float]) -> None:
    """A row of the table."""
    shares = statistics.quantiles(seconds, n=20, method="inclusive")
    print(f"| {what} | {1000 * shares[9]:.1f} | {1000 * shares[18]:.1f} | {1000 * max(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
