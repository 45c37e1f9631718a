"""The latency that the front end adds, and the streams that it carries: `python -m tests.benchmarks.frontend`.

- Time to the first byte over HTTP, and to the engine's first chunk (espeak-ng over bare ZeroMQ), in turns.
- Real-time streams: fixed_rate_worker sends every stream 80 ms of speech each 80 ms, and a client in this process
  reads them. A stream underruns if a player with a buffer of 200 ms would have run dry.
- Resident memory of a web worker, before and after.

All processes share the machine's cores, the client as well: read the figures with the machine's line above them.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop

from shared.protocol import Audio, Cancel, Segment, Speak
from tests.benchmarks import machine
from tests.system.service import Service, children_of, environment, resident_bytes
from tests.system.worker_client import WorkerClient

TEXT: Final = "Good morning, this is a short sentence."
PLAYER_BUFFER_S: Final = 0.2
BYTES_A_SECOND: Final = {"pcm": 48_000, "mp3": 8_000}


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One round of concurrent streams: how late the worst chunks were, and the CPU time of each process."""

    audio_format: str
    streams: int
    complete: int
    underruns: int
    late_p99_ms: float
    late_max_ms: float
    cpu_s: dict[str, float]
    wall_s: float


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.frontend", description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="requests for the time to the first byte")
    parser.add_argument("--streams", type=int, nargs="+", default=[50, 100, 150, 200], help="rounds of streams at once")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each stream is")
    parser.add_argument("--web-workers", type=int, default=2, help="web workers for the streams")
    chosen = parser.parse_args()
    print("\n".join(f"- {line}" for line in machine.describe()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print_first_bytes(folder, chosen.requests)
        print_streams(folder, chosen.streams, chosen.seconds, chosen.web_workers)


# --- time to the first byte -------------------------------------------------------------------------------------------


def print_first_bytes(folder: Path, requests: int) -> None:
    """Measure the engine alone, pcm and mp3 in turns, so that other load of the machine affects all of them alike."""
    times: dict[str, list[float]] = {"engine alone": [], "http pcm": [], "http mp3": []}
    with running(folder, "gpu_worker") as url:
        service = Service(folder, WORKER_URL=url)
        try:
            service.wait_ready()
            memory = resident_bytes(next(iter(children_of(service.process.pid))))
            connection = http.client.HTTPConnection("127.0.0.1", service.port)
            with WorkerClient(url) as worker:
                for count in range(requests + 10):
                    measured = {
                        "engine alone": first_chunk_s(worker, f"{count}"),
                        "http pcm": first_byte_s(connection, "pcm"),
                        "http mp3": first_byte_s(connection, "mp3"),
                    }
                    if count >= 10:  # the first ten are the warm-up
                        for name, seconds in measured.items():
                            times[name].append(seconds)
            connection.close()
            after = resident_bytes(next(iter(children_of(service.process.pid))))
        finally:
            service.stop()
    print(f"\n{'first audio, one client':28}{'p50 ms':>10}{'p95 ms':>10}{'over the engine p50':>22}{'p95':>8}")
    base = percentiles(times["engine alone"])
    for name, measurements in times.items():
        p50, p95 = percentiles(measurements)
        print(f"{name:28}{p50:10.1f}{p95:10.1f}{p50 - base[0]:22.1f}{p95 - base[1]:8.1f}")
    print(f"\nresident memory of a web worker: {memory / 2**20:.0f} MB at start, {after / 2**20:.0f} MB afterwards")


def first_chunk_s(worker: WorkerClient, name: str) -> float:
    """Seconds from a Speak to its first Audio."""
    speak = Speak(
        id=name,
        client="benchmark",
        model="espeak-ng",
        task="CustomVoice",
        segments=[Segment(text=TEXT)],
        voice="en-us+f2",
        credit=1,
    )
    began = time.perf_counter()
    worker.send(speak)
    while not isinstance(worker.receive(), Audio):
        pass
    seconds = time.perf_counter() - began
    worker.send(Cancel(id=name))
    return seconds


def first_byte_s(connection: http.client.HTTPConnection, audio_format: str, *, whole: bool = True) -> float:
    """Seconds from a request, on a connection that is already open, to the first byte of its body.

    `whole`: then read the rest.
    """
    body = json.dumps({"input": TEXT, "response_format": audio_format, "model": "espeak-ng"})
    began = time.perf_counter()
    connection.request("POST", "/v1/audio/speech", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read(1)
    seconds = time.perf_counter() - began
    if whole:
        answer.read()
    return seconds


# --- streams in real time ---------------------------------------------------------------------------------------------


def print_streams(folder: Path, rounds: Sequence[int], seconds: float, web_workers: int) -> None:
    """Print one line for each round, and the memory at the end."""
    print(f"\nreal-time streams of {seconds:g} s, {web_workers} web workers")
    print(f"{'':6}{'streams':>8}{'complete':>10}{'underruns':>11}{'late p99 ms':>13}{'max ms':>8}   cores used")
    with running(folder, "tests.benchmarks.fixed_rate_worker", str(seconds)) as url:
        service = Service(folder, WORKER_URL=url, WEB_WORKERS=web_workers)
        try:
            service.wait_ready()
            webs = sorted(children_of(service.process.pid))
            for audio_format in BYTES_A_SECOND:
                for streams in rounds:
                    load = uvloop.run(measure(service.port, audio_format, streams, webs))
                    used = "  ".join(f"{name} {cpu / load.wall_s:.2f}" for name, cpu in load.cpu_s.items())
                    print(
                        f"{audio_format:6}{load.streams:8}{load.complete:10}{load.underruns:11}"
                        f"{load.late_p99_ms:13.0f}{load.late_max_ms:8.0f}   {used}"
                    )
            memory = ", ".join(f"{resident_bytes(pid) / 2**20:.0f} MB" for pid in webs)
            print(f"\nresident memory of the web workers after this: {memory}")
        finally:
            service.stop()


async def measure(port: int, audio_format: str, streams: int, webs: Sequence[int]) -> Load:
    """Start `streams` streams within a second and follow all of them to their end."""
    before, client_before, began = cpu_seconds(webs), time.process_time(), time.monotonic()
    tasks = [asyncio.create_task(one_stream(port, audio_format, delay_s=index / streams)) for index in range(streams)]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    wall_s = time.monotonic() - began
    whole = [late for late in answers if isinstance(late, list)]
    late_ms = sorted(1000 * late for lates in whole for late in lates) or [0.0]
    return Load(
        audio_format=audio_format,
        streams=streams,
        complete=len(whole),
        underruns=sum(max(lates) > PLAYER_BUFFER_S for lates in whole),
        late_p99_ms=late_ms[int(len(late_ms) * 0.99) - 1],
        late_max_ms=late_ms[-1],
        cpu_s={"web": cpu_seconds(webs) - before, "client": time.process_time() - client_before},
        wall_s=wall_s,
    )


async def one_stream(port: int, audio_format: str, *, delay_s: float) -> list[float]:
    """Each piece's lateness in seconds, for a player that begins with the first piece. Raises if the stream breaks."""
    await asyncio.sleep(delay_s)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"input": TEXT, "response_format": audio_format, "model": "espeak-ng"}).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    try:
        writer.write(head.encode() + b"\r\n\r\n" + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise ConnectionError(status)
        await reader.readuntil(b"\r\n\r\n")
        lates, played_from, received = [], 0.0, 0
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
            now = time.monotonic()
            played_from = played_from or now
            lates.append(now - played_from - received / BYTES_A_SECOND[audio_format])
            received += size
    finally:
        writer.close()
    return lates


# --- helpers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(folder: Path, module: str, *arguments: str) -> Iterator[str]:
    """A worker process; the address at which it listens."""
    private = Path(tempfile.mkdtemp(dir=folder))
    url = f"ipc://{private}/w.ipc"
    environ = environment(WORKER_URL=url, LOG_LEVEL="warning")
    command = [sys.executable, "-m", module, *([url, *arguments] if arguments else [])]
    worker = subprocess.Popen(command, env=environ, cwd=folder)
    try:
        yield url
    finally:
        worker.terminate()
        worker.wait()


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The median and the 95th percentile, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=20)
    return 1000 * statistics.median(seconds), 1000 * cuts[-1]


def cpu_seconds(pids: Sequence[int]) -> float:
    """The processes' CPU time so far."""
    ticks = 0
    for pid in pids:
        fields: list[Any] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
