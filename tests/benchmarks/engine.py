"""How fast frames are made, beside the official package: `python -m tests.benchmarks.engine`.

Closed loop: so many streams at once, each of a forced number of frames, codec included.
Same checkpoint, same run, same threads. By default the small random checkpoint; nothing here says anything about
quality, natural lengths or audible latency.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import msgspec
import torch

from gpu_worker.engines.base import Job, Pcm, Sampling
from gpu_worker.engines.qwen.build import QwenOptions, compute_dtype, open_engine
from gpu_worker.engines.qwen.checkpoint.model_config import read_config
from gpu_worker.engines.qwen.chunk_schedule import MAX_CHUNK_FRAMES
from gpu_worker.engines.qwen.codec.shared_codecs import SharedCodecs
from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.model import qwen3_tts
from gpu_worker.engines.qwen.planner import TASKS
from tests.benchmarks import machine, stages
from tests.benchmarks.official import TEXT, frame_ms
from tests.benchmarks.stages import Clock
from tests.checkpoints import tiny

PROFILED_STEPS: Final = 8
"""A longest chunk of the codec's, so that its share is in it."""


class Result(msgspec.Struct, frozen=True):
    """One measurement: milliseconds a step (a frame of every stream), by percentile, and where they went."""

    streams: int
    frames: int
    seconds: float
    steps_ms: list[float]
    first_audio_ms: float
    stages_ms: dict[str, float]

    @property
    def frame_ms(self) -> float:
        """Milliseconds of the whole run a frame and stream."""
        return 1000 * self.seconds / (self.streams * self.frames)


def measure(
    engine: QwenEngine, job: Callable[[int], Job], streams: int, frames: int, *, clock: Clock, staged: bool = False
) -> Result:
    """Speak `streams` jobs of exactly `frames` frames at once."""
    with stages.staged(engine, clock) if staged else nullcontext({}) as parts:
        for number in range(streams):
            engine.admit(job(number))
        steps: list[float] = []
        first = 0.0
        spoken = 0
        start = before = clock()
        while engine.runnable(()):
            events = engine.step(())
            now = clock()
            steps.append(1000 * (now - before))
            before = now
            spoken += sum(len(event.data) for event in events if isinstance(event, Pcm))
            if spoken and not first:
                first = 1000 * (now - start)
        seconds = clock() - start
    if spoken != streams * frames * 3840:
        raise RuntimeError(f"{spoken / 3840} frames were spoken instead of {streams * frames}")
    per_step = {name: 1000 * value / len(steps) for name, value in parts.items()}
    return Result(streams, frames, seconds, steps, first, per_step)


def _open(arguments: argparse.Namespace, directory: Path) -> QwenEngine:
    options = QwenOptions(
        codecs=SharedCodecs(dtype=_codec_dtype(arguments), device=torch.device(arguments.device)),
        device=arguments.device,
        dtype=arguments.dtype,
        attention_backend=arguments.attention,
        slots=max(arguments.streams),
        max_model_len=512,
    )
    # The model masks the end of speech before this frame. It is captured with the graphs, so it is set before them.
    setattr(qwen3_tts, "MIN_FRAMES", 10_000)  # noqa: B010 -- mypy refuses assignment to a constant
    return open_engine(directory, options)


def _codec_dtype(arguments: argparse.Namespace) -> torch.dtype:
    """What was asked for, or what the service takes: the model's."""
    return compute_dtype(arguments.device, arguments.codec_dtype or arguments.dtype)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.engine", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a CustomVoice or VoiceDesign directory; default: a small one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument(
        "--codec-dtype", choices=("float32", "bfloat16"), help="default: the model's, as in the service"
    )
    parser.add_argument("--attention", choices=("eager", "sdpa", "flash_attention_2"), default="sdpa")
    parser.add_argument("--streams", type=int, nargs="+")
    parser.add_argument("--frames", type=int, default=72, help="frames a stream; 72 fill chunks of 1, 1, 2, 4 and 8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the fastest is shown")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: time of this process alone, for machines that others use too; only with --threads 1",
    )
    parser.add_argument("--no-official", action="store_true")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if arguments.clock == "cpu" and (cuda or arguments.threads != 1):
        parser.error("--clock cpu measures one thread of a CPU")
    if arguments.frames <= stages.WARM_UP_STEPS + PROFILED_STEPS:
        parser.error(
            f"--frames is more than {stages.WARM_UP_STEPS + PROFILED_STEPS}: launches are counted behind a warm-up"
        )
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    arguments.streams = arguments.streams or ([1, 8, 16, 32, 64, 128] if cuda else [1, 4, 8, 16])
    torch.set_num_threads(arguments.threads)
    directory = arguments.checkpoint or tiny("custom_voice")
    config = read_config(directory)
    task = TASKS[config.tts_model_type]

    def job(number: int) -> Job:
        return Job(
            id=str(number),
            task=task,
            text=TEXT,
            voice=next(iter(config.talker_config.spk_id), "") if task == "CustomVoice" else "",
            language="english",
            instructions="a deep voice" if task == "VoiceDesign" else "",
            sampling=Sampling(seed=number, max_new_tokens=arguments.frames),
        )

    print("\n".join(f"- {line}" for line in machine.describe()))
    where = f"on {arguments.device}" if cuda else f"{arguments.threads} threads"
    dtype = compute_dtype(arguments.device, arguments.dtype)
    print(f"- {directory.name}, random or real weights as they are, {dtype}, codec {_codec_dtype(arguments)}, {where}")
    print(f"- {arguments.frames} forced frames a stream, codec included, {arguments.clock} time\n")
    base = None
    if not arguments.no_official:
        base = frame_ms(directory, arguments.frames, arguments.device, dtype, clock)
        print(f"official package, one stream: {base:.2f} ms a frame\n")
    engine = _open(arguments, directory)
    measure(engine, job, 1, arguments.frames, clock=clock)
    print("streams  ms/step p50    p95    p99  ms/frame/stream  audio-s/s  first audio ms  x official")
    for streams in arguments.streams:
        runs = [measure(engine, job, streams, arguments.frames, clock=clock) for _ in range(arguments.repeat)]
        best = min(runs, key=lambda result: result.seconds)
        p50, p95, p99 = (_percentile(best.steps_ms, share) for share in (0.5, 0.95, 0.99))
        times = f"{base / best.frame_ms:10.1f}" if base else ""
        print(
            f"{streams:7d} {p50:12.2f} {p95:6.2f} {p99:6.2f} {best.frame_ms:16.3f} {80 / best.frame_ms:10.1f}"
            f" {best.first_audio_ms:15.1f}  {times}"
        )
    _print_stages(engine, job, arguments, clock)


def _print_stages(engine: QwenEngine, job: Callable[[int], Job], arguments: argparse.Namespace, clock: Clock) -> None:
    """Where a step's time goes, beside its floor, and what it launches."""
    cuda = arguments.device == "cuda"
    bandwidth = stages.copy_bandwidth(torch.device(arguments.device), clock)
    counted = "kernels" if cuda else "operators"
    print("\nwhere a step's time goes, ms (timed apart, so a little slower),")
    print(f"and what reading the bytes alone takes, at the {bandwidth / 1e9:.0f} GB/s that a copy reached")
    for streams in arguments.streams:
        result = measure(engine, job, streams, arguments.frames, clock=clock, staged=True)
        shown = [f"{name} {value:.2f}" for name, value in result.stages_ms.items()]
        if not cuda:  # there the parts overlap, and their sum is no part of a step
            total = 1000 * result.seconds / len(result.steps_ms)
            inner = sum(value for name, value in result.stages_ms.items() if "of which" not in name)
            shown.append(f"python and the rest {total - inner:.2f}")
        floors = stages.floors_ms(engine, streams, arguments.frames // 2, chunk=MAX_CHUNK_FRAMES, bandwidth=bandwidth)
        floor = ", ".join(f"{name} {value:.2f}" for name, value in floors.items())
        for number in range(streams):
            engine.admit(job(number))
        launched = stages.launches(engine, PROFILED_STEPS)
        for number in range(streams):
            engine.cancel(str(number))
        print(f"{streams:7d}  {', '.join(shown)}; {launched:.0f} {counted} a step")
        print(f"  floor  {floor}")


def _percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]


if __name__ == "__main__":
    main()
