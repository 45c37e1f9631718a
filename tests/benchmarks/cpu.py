"""What a CPU can do: our engine in every mode beside others, at published size: `python -m tests.benchmarks.cpu`.

Every engine speaks the same text for the same number of frames, with the same random checkpoint, codec included.
The engines take turns in rounds, each in a process of its own, because all of them together do not fit into 16 GB.
A turn counts as quiet if other processes used less than a fifth of a core. The table has minima and medians.

Others are measured where they are installed: the official package, vox-tts and qwentts.cpp (the extra "peers").
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import msgspec

from tests.benchmarks import machine
from tests.benchmarks.qwentts_files import QUANTIZATIONS, gguf_files

TEXT: Final = "Hello world, good morning to the speech of today."
OURS: Final = {"ours none": "none", "ours fp16": "fp16", "ours int8": "int8"}
VOX: Final = {"vox-tts bf16": "", "vox-tts q8": "q8", "vox-tts q4full": "q4full"}
QWENTTS: Final = {f"qwentts.cpp {quantization}": quantization for quantization in QUANTIZATIONS}
QUIET_CORES: Final = 0.2
SEED: Final = 1

Speak = Callable[[int, int], float]
"""Speaks a number of streams of a number of frames at once; returns the milliseconds to the first audio."""


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. `ms`, `cpu_ms`: of a frame of one stream. `others`: cores that other processes used."""

    engine: str
    threads: int
    streams: int
    ms: float
    cpu_ms: float
    first_audio_ms: float
    others: float
    load_cpu_s: float
    memory_mb: int


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cpu", description=__doc__)
    parser.add_argument("--engines", nargs="+", metavar="NAME", help="default: all that are installed")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="of CustomVoice; default: a random 0.6B, kept in .cache")
    parser.add_argument("--turn", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        _turn(arguments)
        return
    from tests.benchmarks.endless import endless  # noqa: PLC0415 -- imports torch, and every engine has its own process

    directory = arguments.checkpoint or endless("0.6B")
    installed = _installed()
    engines = arguments.engines or installed
    if unknown := set(engines) - set(installed):
        parser.error(f"not installed: {', '.join(sorted(unknown))}; there are {', '.join(installed)}")
    print("\n".join(f"- {line}" for line in machine.describe()))
    print(f"- {_instructions()}")
    print(f"- {directory.name}, {arguments.frames} forced frames a stream, codec and prefill included; quiet: others")
    print(f"  use less than {QUIET_CORES} cores; {arguments.rounds} rounds, engines in turns, a process each\n")
    turns: list[Turn] = []
    for _ in range(arguments.rounds):
        for engine in engines:
            turns += _run(engine, directory, arguments)
    _print(turns)


def _installed() -> list[str]:
    """The engines that can be measured here."""
    found = [*OURS]
    found += ["official float32"] if importlib.util.find_spec("qwen_tts") else []
    found += [*QWENTTS] if all(map(importlib.util.find_spec, ("qwentts_cpp_cpu", "gguf"))) else []
    return found + ([*VOX] if importlib.util.find_spec("vox") else [])


def _instructions() -> str:
    """What of the processor's instructions decides the speed."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8")
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    return "instructions: " + (", ".join(name for name in wanted if name in flags) or "none of " + ", ".join(wanted))


def _run(engine: str, directory: Path, arguments: argparse.Namespace) -> list[Turn]:
    """The turns of an engine in a new process."""
    lists = [
        *("--threads", *map(str, arguments.threads), "--streams", *map(str, arguments.streams)),
        *("--frames", str(arguments.frames), "--checkpoint", str(directory)),
    ]
    command = [sys.executable, "-m", "tests.benchmarks.cpu", "--turn", engine, *lists]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(arguments.threads))}
    if engine in OURS:  # as the service starts its GPU worker
        from server.processes import HUGE_PAGES  # noqa: PLC0415 -- 28 MB that a GPU worker does not hold

        environment = HUGE_PAGES | {"GOMP_SPINCOUNT": "1000"} | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        print(f"{engine}: failed with exit code {done.returncode}", file=sys.stderr)
    turns = [msgspec.json.decode(line, type=Turn) for line in done.stdout.splitlines() if line.startswith("{")]
    for turn in turns:
        print(turn, file=sys.stderr)
    return turns


def _turn(arguments: argparse.Namespace) -> None:
    """Measure one engine in this process, and print its turns."""
    name, directory = arguments.turn, arguments.checkpoint
    start = time.process_time()
    speak, set_threads = _open(name, directory, arguments)
    speak(1, 2)
    load = time.process_time() - start
    for threads in arguments.threads:
        set_threads(threads)
        for streams in arguments.streams:
            if streams > 1 and name.startswith("official"):
                continue  # it speaks one request after the other
            wall, cpu, busy = time.perf_counter(), time.process_time(), _busy_s()
            first = speak(streams, arguments.frames)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            each = 1000 / (streams * arguments.frames)
            turn = Turn(
                engine=name,
                threads=threads,
                streams=streams,
                ms=wall * each,
                cpu_ms=cpu * each,
                first_audio_ms=first,
                others=max(0.0, (_busy_s() - busy - cpu) / wall),
                load_cpu_s=load,
                memory_mb=_resident_mb(),
            )
            print(msgspec.json.encode(turn).decode(), flush=True)


def _open(name: str, directory: Path, arguments: argparse.Namespace) -> tuple[Speak, Callable[[int], None]]:
    """An engine's way to speak, and to set its threads."""
    if name in VOX:
        return _vox(directory, VOX[name])
    if name in QWENTTS:
        return _qwentts(directory, QWENTTS[name], max(arguments.streams))
    import torch  # noqa: PLC0415 -- not for engines without it

    open_one = _official if name.startswith("official") else _ours
    return open_one(directory, OURS.get(name, ""), max(arguments.streams)), torch.set_num_threads


def _ours(directory: Path, quantization: Any, slots: int) -> Speak:
    import torch  # noqa: PLC0415 -- as above

    from gpu_worker.engines.base import Job  # noqa: PLC0415 -- as above
    from gpu_worker.engines.factory import trial_file  # noqa: PLC0415 -- as above
    from gpu_worker.engines.qwen.build import QwenOptions, open_engine  # noqa: PLC0415 -- as above
    from gpu_worker.engines.qwen.codec.shared_codecs import SharedCodecs  # noqa: PLC0415 -- as above
    from shared.heap import trim_heap  # noqa: PLC0415 -- as above
    from shared.protocol import Sampling, Segment  # noqa: PLC0415 -- as above
    from tests.benchmarks.engine import measure  # noqa: PLC0415 -- as above

    options = QwenOptions(
        codecs=SharedCodecs(dtype=torch.float32, device=torch.device("cpu"), trial_file=trial_file(os.environ)),
        device="cpu",
        dtype="float32",
        slots=slots,
        max_model_len=256,
        quantization=quantization,
        trial_file=trial_file(os.environ),
    )
    engine = open_engine(directory, options)
    trim_heap()

    def speak(streams: int, frames: int) -> float:
        def job(number: int) -> Job:
            return Job(
                id=str(number),
                task="CustomVoice",
                segments=[Segment(text=TEXT)],
                voice="ryan",
                language="english",
                sampling=Sampling(seed=SEED + number, max_new_tokens=frames),
            )

        return measure(engine, job, streams, frames, clock=time.perf_counter).first_audio_ms

    return speak


def _official(directory: Path, _: str, __: int) -> Speak:
    import torch  # noqa: PLC0415 -- as above

    from tests.official_package import official_package  # noqa: PLC0415 -- as above

    model = official_package().Model.from_pretrained(
        str(directory), dtype=torch.float32, attn_implementation="sdpa", device_map="cpu"
    )
    talk = model.model.talker.generate
    forced = {"frames": 2}
    model.model.talker.generate = lambda **kwargs: talk(  # the package makes one frame less
        **{**kwargs, "min_new_tokens": forced["frames"], "max_new_tokens": forced["frames"] + 1}
    )

    def speak(_: int, frames: int) -> float:
        forced["frames"] = frames
        start = time.perf_counter()
        model.generate_custom_voice(text=TEXT, speaker="ryan", language="english")
        return 1000 * (time.perf_counter() - start)  # it does not stream

    return speak


def _vox(directory: Path, quant: str) -> tuple[Speak, Callable[[int], None]]:
    vox = importlib.import_module("vox")
    file = directory.parent / f"{directory.name}.{quant or 'bf16'}.tmod"
    if not file.exists():
        build = [sys.executable, "-m", "vox.build", "--model", str(directory), "--dtype", "bf16", "--no-hash"]
        subprocess.run([*build, *(("--quant", quant) if quant else ()), "-o", str(file)], check=True, stdout=sys.stderr)
    opened: dict[str, Any] = {}

    def set_threads(threads: int) -> None:
        opened["engine"] = vox.Engine(str(file), resources={"device": "cpu", "threads": threads, "max_sessions": 8})
        opened["voice"] = opened["engine"].speaker_voice("ryan")
        one(2)

    def one(frames: int) -> float:
        options = {"max_frames": frames, "seed": SEED, "language": "english", "chunk_frames": 4}
        return _listen(lambda: opened["engine"].stream(TEXT, opened["voice"], **options), frames)

    set_threads(2)
    return lambda streams, frames: _together(one, streams, frames), set_threads


def _qwentts(directory: Path, quantization: str, streams: int) -> tuple[Speak, Callable[[int], None]]:
    qwentts = importlib.import_module("qwentts_cpp_cpu")
    files = gguf_files(directory, quantization)
    if not all(file.exists() for file in files):
        command = [sys.executable, "-m", "tests.benchmarks.qwentts_files", str(directory), quantization]
        subprocess.run(command, check=True, stdout=sys.stderr)
    opened: dict[str, Any] = {}

    def set_threads(threads: int) -> None:
        opened.clear()  # both at once would hold two caches of 896 MB a stream
        opened["engine"] = engine = qwentts.QwenTTS(*files, max_batch=streams, cpu_threads=threads)
        engine._lock = nullcontext()  # it lets in one stream at a time, but the library speaks several as a batch
        one(2)

    def one(frames: int) -> float:
        options = {"text": TEXT, "lang": "english", "speaker": "ryan", "seed": SEED, "max_new_tokens": frames}
        return _listen(lambda: (chunk for chunk, _ in opened["engine"].stream(**options)), frames)

    set_threads(2)
    return lambda streams, frames: _together(one, streams, frames), set_threads


def _listen(stream: Callable[[], Iterable[Any]], frames: int) -> float:
    """Milliseconds until a stream gives its first chunk of samples. All of its chunks must make `frames` frames."""
    start, first, samples = time.perf_counter(), 0.0, 0
    for chunk in stream():
        first = first or time.perf_counter()
        samples += len(chunk)
    if abs(samples - frames * 1920) > 1920:
        raise RuntimeError(f"{samples / 1920} frames instead of {frames}")
    return 1000 * (first - start)


def _together(one: Callable[[int], float], streams: int, frames: int) -> float:
    """Several calls at once; the first audio of the first of them."""
    with ThreadPoolExecutor(streams) as pool:
        return min(pool.map(one, [frames] * streams))


def _busy_s() -> float:
    """Seconds that all cores together were busy since the start of the machine."""
    fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    user, nice, system, _, _, interrupts, soft, steal = (int(field) for field in fields[:8])
    return (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")


def _resident_mb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def _print(turns: list[Turn]) -> None:
    """The table, best first within each number of threads and streams."""
    print(
        "| threads | streams | engine | ms a frame and stream: min (median) | audio-s/s | CPU ms | first audio ms |",
        end="",
    )
    print(" load CPU s | resident MB | quiet |\n|---|---|---|---|---|---|---|---|---|---|")
    for row in sorted(_rows(turns)):
        print(row[-1])


def _rows(turns: list[Turn]) -> Iterator[tuple[int, int, float, str]]:
    groups: dict[tuple[int, int, str], list[Turn]] = {}
    for turn in turns:
        groups.setdefault((turn.threads, turn.streams, turn.engine), []).append(turn)
    for (threads, streams, engine), group in groups.items():
        quiet = [turn for turn in group if turn.others < QUIET_CORES]
        counted = quiet or group
        best = min(counted, key=lambda turn: turn.ms)
        median = statistics.median(turn.ms for turn in counted)
        cells = [
            *(threads, streams, engine, f"{best.ms:.0f} ({median:.0f})", f"{80 / best.ms:.2f}"),
            f"{min(turn.cpu_ms for turn in counted):.0f}",
            f"{min(turn.first_audio_ms for turn in counted):.0f}",
            *(f"{best.load_cpu_s:.1f}", max(turn.memory_mb for turn in group), f"{len(quiet)} of {len(group)}"),
        ]
        yield -threads, streams, best.ms, f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
