"""The engine's speed, beside the official package's: `python -m tests.benchmarks.engine`.

Closed loop: a number of streams at once, each with a forced number of frames, codec included.
Both use the same checkpoint, run and threads. The default is a small random checkpoint.
The figures say nothing about quality, natural lengths or audible latency.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import msgspec
import torch

from gpu_worker.engines.base import Job, Pcm
from gpu_worker.engines.qwen.build import QwenOptions, codec_dtype, compute_dtype, open_engine
from gpu_worker.engines.qwen.checkpoint.model_config import read_config
from gpu_worker.engines.qwen.chunk_schedule import MAX_CHUNK_FRAMES
from gpu_worker.engines.qwen.codec.shared_codecs import SharedCodecs
from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.model import qwen3_tts
from gpu_worker.engines.qwen.planner import TASKS
from shared.protocol import Sampling, Segment
from tests.benchmarks import machine, stages
from tests.benchmarks.endless import SIZES, endless
from tests.benchmarks.official import TEXT
from tests.benchmarks.stages import Clock
from tests.checkpoints import tiny

PROFILED_STEPS: Final = 8
"""As many as the codec's longest chunk, so that the count includes one codec call."""


class Result(msgspec.Struct, frozen=True):
    """One measurement: the milliseconds of each step (one frame of every stream), and of each of its stages."""

    streams: int
    frames: int
    seconds: float
    steps_ms: list[float]
    first_audio_ms: float
    stages_ms: dict[str, float]

    @property
    def frame_ms(self) -> float:
        """Milliseconds of the whole run, divided by its streams and frames."""
        return 1000 * self.seconds / (self.streams * self.frames)


def measure(
    engine: QwenEngine, job: Callable[[int], Job], streams: int, frames: int, *, clock: Clock, staged: bool = False
) -> Result:
    """Run `streams` jobs of exactly `frames` frames at once. RuntimeError if a job ends early."""
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
        raise RuntimeError(f"{spoken / 3840} frames instead of {streams * frames}")
    per_step = {name: 1000 * value / len(steps) for name, value in parts.items()}
    return Result(streams, frames, seconds, steps, first, per_step)


def _open(arguments: argparse.Namespace, directory: Path) -> QwenEngine:
    options = QwenOptions(
        codecs=SharedCodecs(dtype=_codec_dtype(arguments), device=torch.device(arguments.device)),
        device=arguments.device,
        dtype=arguments.dtype,
        attention_backend=arguments.attention,
        kernels=arguments.kernels,
        quantization=arguments.quantization,
        slots=max(arguments.streams),
        max_model_len=512,
    )
    # The model masks the end of speech before this frame. It is captured with the graphs, so it is set before them.
    setattr(qwen3_tts, "MIN_FRAMES", 10_000)  # noqa: B010 -- mypy refuses assignment to a constant
    return open_engine(directory, options)


def _codec_dtype(arguments: argparse.Namespace) -> torch.dtype:
    """The dtype that the service chooses for the codec."""
    return codec_dtype(arguments.device, arguments.dtype, arguments.codec_dtype)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.engine", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a CustomVoice or VoiceDesign directory; default: a small one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--codec-dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--attention", choices=("auto", "eager", "sdpa", "flash_attention_2"), default="auto")
    parser.add_argument("--kernels", choices=("auto", "torch", "triton"), default="auto")
    parser.add_argument("--quantization", choices=("none", "fp16", "int8", "fp8"), default="none")
    parser.add_argument("--size", choices=SIZES, help="in place of --checkpoint: a random one of this size, made once")
    parser.add_argument("--streams", type=int, nargs="+")
    parser.add_argument("--frames", type=int, default=72, help="frames a stream; 72 fill chunks of 1, 1, 2, 4 and 8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the fastest is shown")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU time of this process, for busy machines; only with --threads 1",
    )
    parser.add_argument("--no-official", action="store_true")
    parser.add_argument(
        "--brief", action="store_true", help="one run of each, and neither the official package nor stages"
    )
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    arguments.repeat = 1 if arguments.brief else arguments.repeat
    if arguments.clock == "cpu" and (cuda or arguments.threads != 1):
        parser.error("--clock cpu measures one thread of a CPU")
    if arguments.frames <= stages.WARM_UP_STEPS + PROFILED_STEPS:
        parser.error(
            f"--frames must exceed {stages.WARM_UP_STEPS + PROFILED_STEPS}: launches are counted after a warm-up"
        )
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    arguments.streams = arguments.streams or ([1, 8, 16, 32, 64, 128] if cuda else [1, 4, 8, 16])
    torch.set_num_threads(arguments.threads)
    directory = endless(arguments.size) if arguments.size else arguments.checkpoint or tiny("custom_voice")
    config = read_config(directory)
    task = TASKS[config.tts_model_type]

    def job(number: int) -> Job:
        return Job(
            id=str(number),
            task=task,
            segments=[Segment(text=TEXT)],
            voice=next(iter(config.talker_config.spk_id), "") if task == "CustomVoice" else "",
            language="english",
            instructions="a deep voice" if task == "VoiceDesign" else "",
            sampling=Sampling(seed=number, max_new_tokens=arguments.frames),
        )

    print("\n".join(f"- {line}" for line in machine.describe()))
    where = f"on {arguments.device}" if cuda else f"{arguments.threads} threads"
    weights = f"{compute_dtype(arguments.device, arguments.dtype)}, quantization {arguments.quantization}"
    print(f"- {directory.name}, {weights}, codec {_codec_dtype(arguments)}, {where}")
    print(f"- {arguments.frames} forced frames a stream, codec included, {arguments.clock} time\n")
    base = None
    if not (arguments.no_official or arguments.brief):
        base = _official_ms(arguments, directory)
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
    if not arguments.brief:
        _print_stages(engine, job, arguments, clock)


def _official_ms(arguments: argparse.Namespace, directory: Path) -> float:
    """The official package's milliseconds a frame, from a process of its own: its memory is free afterwards."""
    options = {
        "frames": arguments.frames,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "clock": arguments.clock,
    }
    command = [sys.executable, "-m", "tests.benchmarks.official", str(directory)]
    command += [f"--{name}={value}" for name, value in options.items()]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def _print_stages(engine: QwenEngine, job: Callable[[int], Job], arguments: argparse.Namespace, clock: Clock) -> None:
    """Print the time of a step's stages beside their floors, and the number of launches."""
    cuda = arguments.device == "cuda"
    bandwidth = stages.copy_bandwidth(torch.device(arguments.device), clock)
    counted = "kernels" if cuda else "operators"
    print("\nmilliseconds of a step by stage (a run of its own, slightly slower),")
    print(f"and the floor: reading the bytes alone, at the {bandwidth / 1e9:.0f} GB/s that a copy reached")
    for streams in arguments.streams:
        result = measure(engine, job, streams, arguments.frames, clock=clock, staged=True)
        shown = [f"{name} {value:.2f}" for name, value in result.stages_ms.items()]
        if not cuda:  # on CUDA the stages overlap, and their sum is not a part of the step
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
