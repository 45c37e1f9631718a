"""The service under open-loop load: `python -m tests.benchmarks.load`.

Requests arrive as a Poisson process at a given rate, each with a declared length (`max_new_tokens`).
The client measures over HTTP from the instant a request was due: first byte, first playable sample, real-time factor,
and the underruns of a player that begins with the first sample it can decode.

Without `--url` it starts the service itself, with a random checkpoint that never ends by itself (see endless.py).
With random weights the figures say nothing about quality, natural lengths or audible latency.
This process is only the client: other processes make the checkpoint and run the service.
Exit code 1 if a request failed. A refusal (429) is counted separately: an open loop may exceed the capacity.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import uvloop

from shared.pcm import FRAME_SAMPLES, SAMPLE_RATE
from tests.benchmarks import client, machine
from tests.benchmarks.playback import FORMATS, Playback, play
from tests.system.service import Service

MODELS: Final = {
    "tiny": "qwen3-tts-0.6b-customvoice",
    "0.6B": "qwen3-tts-0.6b-customvoice",
    "1.7B": "qwen3-tts-1.7b-customvoice",
}
TEXTS: Final = (
    "Hello world, good morning to the speech of today.",
    "The voice and the world are today what they were this morning.",
    "Good speech is hearing and reading, morning after morning.",
    "Today the assistant and the user say hello to the world.",
)
FRAME_S: Final = FRAME_SAMPLES / SAMPLE_RATE
MOST_FRAMES: Final = 192
"""The engine limits short texts to so many frames, whatever a request declares."""

CLIENT_LATE_MS: Final = 20.0
"""If the client fell behind by more than this, its latencies include its own delay."""

HEADER: Final = (
    "| req/s | format | asked | spoken | refused | failed "
    "| first byte ms p50 / p95 / p99 | first playable ms p50 / p95 / p99 | RTF p50 / p95 / p99 "
    "| underrun requests | stalled s | audio-s/s | cut short |"
)


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One rate with one format. `played`: playback of the complete answers."""

    rate: float
    audio_format: str
    answers: list[client.Answer]
    played: list[Playback]
    wall_s: float
    frames: int

    @property
    def refused(self) -> int:
        """Requests that were refused because the queue was full."""
        return sum(answer.refused for answer in self.answers)

    @property
    def errors(self) -> list[str]:
        """The errors of the requests that were neither complete nor refused."""
        return [answer.error for answer in self.answers if answer.error and not answer.refused]

    @property
    def cut_short(self) -> int:
        """Answers at least half a frame shorter than declared."""
        return sum(playback.audio_s < (self.frames - 0.5) * FRAME_S for playback in self.played)

    def row(self) -> str:
        """A line of the table."""
        spoken = [answer for answer in self.answers if not answer.error]
        columns = [
            f"{self.rate:g}",
            self.audio_format,
            str(len(self.answers)),
            str(len(spoken)),
            str(self.refused),
            str(len(self.errors)),
            _spread([1000 * playback.first_byte_s for playback in self.played], ".0f"),
            _spread([1000 * playback.first_playable_s for playback in self.played], ".0f"),
            _spread([a.ended_s / p.audio_s for a, p in zip(spoken, self.played, strict=True)], ".2f"),
            str(sum(playback.stalls > 0 for playback in self.played)),
            f"{sum(playback.stall_s for playback in self.played):.2f}",
            f"{sum(playback.audio_s for playback in self.played) / self.wall_s:.1f}",
            str(self.cut_short),
        ]
        return f"| {' | '.join(columns)} |"


def main() -> int:
    """Measure, and print the table."""
    arguments = _arguments()
    print("\n".join(f"- {line}" for line in machine.describe()))
    with contextlib.ExitStack() as stack:
        if arguments.url:
            url = arguments.url
        else:
            checkpoint = _run("tests.benchmarks.endless", "--size", arguments.size)
            if not arguments.no_official:
                print(f"- {_official(arguments, checkpoint)}", flush=True)
            url = stack.enter_context(_service(arguments, checkpoint))
        model = arguments.model or (None if arguments.url else MODELS[arguments.size])
        print("\n".join(f"- {line}" for line in _conditions(arguments, url, model)), flush=True)
        requester = Requester(url, model, arguments.frames, arguments.seed, arguments.timeout)
        problem = requester.warm_up(arguments.warm_up)
        if problem:
            print(f"\nthe warm-up failed: {problem}")
            return 1
        print(f"\n{HEADER}\n|{'---|' * HEADER.count(' |')}", flush=True)
        rounds = []
        for rate in arguments.rates:
            for audio_format in arguments.formats:
                rounds.append(requester.round(rate, audio_format, arguments.seconds, arguments.requests))
                print(rounds[-1].row(), flush=True)
    return _verdict(rounds)


class Requester:
    """Sends requests of one declared length to one service."""

    def __init__(self, url: str, model: str | None, frames: int, seed: int, timeout_s: float) -> None:
        self._url = url
        self._model = model
        self._frames = frames
        self._seed = seed
        self._timeout_s = timeout_s

    def warm_up(self, requests: int) -> str:
        """Request all formats, first one by one and then at once; the first error, or an empty string."""
        bodies = [self._body(number, FORMATS[number % len(FORMATS)]) for number in range(requests)]
        answers: list[client.Answer] = []
        for body in bodies[: len(FORMATS)]:
            answers += uvloop.run(client.load(self._url, [body], [0.0], self._timeout_s))[0]
        answers += uvloop.run(client.load(self._url, bodies, [0.0] * len(bodies), self._timeout_s))[0]
        return next((answer.error for answer in answers if answer.error and not answer.refused), "")

    def round(self, rate: float, audio_format: str, seconds: float, most: int) -> Round:
        """Send requests at `rate` for `seconds`, and wait for the last answer."""
        due = client.poisson(rate, seconds, most, self._seed)
        bodies = [self._body(number, audio_format) for number in range(len(due))]
        answers, wall_s = uvloop.run(client.load(self._url, bodies, due, self._timeout_s))
        played = [play(answer.arrivals, audio_format) for answer in answers if not answer.error]
        return Round(
            rate=rate, audio_format=audio_format, answers=answers, played=played, wall_s=wall_s, frames=self._frames
        )

    def _body(self, number: int, audio_format: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "input": TEXTS[number % len(TEXTS)],
            "language": "English",
            "response_format": audio_format,
            "max_new_tokens": self._frames,
            "seed": self._seed + number,
        }
        return body | ({"model": self._model} if self._model else {})


def _run(module: str, *arguments: str) -> str:
    """The output of a module that imports torch: the client's own process does not."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=machine.ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _official(arguments: argparse.Namespace, checkpoint: str) -> str:
    """The official package's figures with the same checkpoint and lengths, measured before the service starts."""
    frames = str(arguments.frames)
    options = ("--frames", frames, "--device", arguments.device, "--dtype", arguments.dtype)
    frame_ms = float(_run("tests.benchmarks.official", checkpoint, *options).splitlines()[-1])
    first_ms, rtf = frame_ms * arguments.frames, frame_ms / (1000 * FRAME_S)
    return (
        f"official package, no HTTP, one request after the other: {frame_ms:.2f} ms a frame, RTF {rtf:.2f}, "
        f"{1 / rtf:.1f} audio-s/s; it does not stream, so its first byte comes with the last, after {first_ms:.0f} ms"
    )


@contextlib.contextmanager
def _service(arguments: argparse.Namespace, checkpoint: str) -> Iterator[str]:
    """Run the service with this checkpoint; its address."""
    model = MODELS[arguments.size]
    settings: dict[str, object] = {
        "DEFAULT_MODEL": model,
        "MODEL_PATHS": f"{model}={checkpoint}",
        "DEFAULT_DEVICE": arguments.device,
        "DTYPE": arguments.dtype,
        "WEB_WORKERS": arguments.web_workers,
        "MAX_QUEUE": arguments.queue,
        "LOG_LEVEL": "warning",
    }
    if arguments.slots:
        settings["MAX_CONCURRENCY"] = arguments.slots
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder), **settings)
        try:
            service.wait_ready(timeout_s=600)
            yield service.url
            service.stop()
        finally:
            service.kill()


def _conditions(arguments: argparse.Namespace, url: str, model: str | None) -> list[str]:
    """The measured service, and the requests."""
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
        stats, device = http.get("/admin/stats").json(), http.get("/admin/vram").json()["device"]
    if arguments.url:
        what = f"the service at {url}, model {model or 'as it is by default'}, weights as they are there"
    else:
        dtypes = f"dtype {arguments.dtype} (auto: float32 on a CPU, bfloat16 on a GPU)"
        what = f"{model}, {arguments.size} shapes, RANDOM weights, {dtypes}, {arguments.web_workers} web workers"
    threads = os.environ.get("OMP_NUM_THREADS", "as torch chooses")
    lengths = f"{arguments.frames} forced frames ({arguments.frames * FRAME_S:.2f} s) a request, seed {arguments.seed}"
    return [
        f"{what}; on {device['kind']}, {stats['slots']} slots, threads: {threads}",
        f"{lengths}; open loop (Poisson), each line for {arguments.seconds:g} s or {arguments.requests} requests",
        "client-observed over HTTP on the same machine, whose cores the client shares; from when a request was due",
    ]


def _verdict(rounds: Sequence[Round]) -> int:
    """Print the client's delay and all errors; the exit code."""
    late_ms = max((1000 * answer.sent_s for round_ in rounds for answer in round_.answers), default=0.0)
    print(f"\nthe client was late by {late_ms:.0f} ms at most")
    if late_ms > CLIENT_LATE_MS:
        print("that is part of the latencies above: the machine was too busy for its client")
    errors = [error for round_ in rounds for error in round_.errors]
    for error in dict.fromkeys(errors):
        print(f"failed, {errors.count(error)} times: {error}")
    return 1 if errors else 0


def _spread(values: Sequence[float], form: str) -> str:
    """The 50th, 95th and 99th percentile, interpolated."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:{form}}"
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return " / ".join(f"{cuts[share - 1]:{form}}" for share in (50, 95, 99))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.load", description=__doc__)
    parser.add_argument("--url", help="a running service, whose model may end by itself")
    parser.add_argument("--model", help="with --url: the model to request; default: the service's")
    parser.add_argument("--size", choices=tuple(MODELS), default="tiny", help="of the random checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--slots", type=int, help="running requests at once; default: the engine's choice")
    parser.add_argument("--queue", type=int, default=64, help="most queued requests; more are refused")
    parser.add_argument("--web-workers", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 5, 10, 20], help="requests a second")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--frames", type=int, default=75, help="declared length of every request, 80 ms each")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long requests arrive, for each line")
    parser.add_argument("--requests", type=int, default=600, help="most requests, for each line")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds after which a request has failed")
    parser.add_argument("--warm-up", type=int, default=16, help="requests before the measurement")
    parser.add_argument("--no-official", action="store_true", help="leave out the official package")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if not 1 <= arguments.frames <= MOST_FRAMES:
        parser.error(f"--frames is from 1 to {MOST_FRAMES}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
