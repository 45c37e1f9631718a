"""What the front end adds to an engine, and how much it holds: `python -m tests.benchmarks.frontend`.

- Time to the first byte over HTTP beside the engine's own first chunk (espeak-ng over bare ZeroMQ), in turns.
- Real-time streams: a stand-in worker sends every stream 80 ms of speech each 80 ms, a client in this process takes
  them; a stream underruns where a player that starts with a buffer of 200 ms would have run dry.
- Resident memory of a web worker, before and after.

All processes, the client's too, share the machine's cores: read the figures with the machine's line above them.
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
from typing import Any, Final, Self

import msgspec
import uvloop
import zmq

from shared.protocol import VERSION, Audio, Cancel, Hello, Message, Speak, Welcome, decode_from_worker, encode
from shared.sockets import connect_dealer
from tests.benchmarks import machine
from tests.system.service import ROOT, Service, children_of, resident_bytes

TEXT: Final = "Good morning, this is a short sentence."
PLAYER_BUFFER_S: Final = 0.2
BYTES_A_SECOND: Final = {"pcm": 48_000, "mp3": 8_000}


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One round of concurrent streams: how late the worst chunks came, and what each process computed."""

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
    """Direct, pcm and mp3 in turns, so that whatever else the machine does falls on all alike."""
    times: dict[str, list[float]] = {"engine alone": [], "http pcm": [], "http mp3": []}
    with running(folder, "gpu_worker") as url:
        service = Service(folder, WORKER_URL=url)
        try:
            service.wait_ready()
            memory = resident_bytes(next(iter(children_of(service.process.pid))))
            connection = http.client.HTTPConnection("127.0.0.1", service.port)
            with Direct(url) as direct:
                for count in range(requests + 10):
                    measured = {
                        "engine alone": direct.first_chunk_s(f"{count}"),
                        "http pcm": first_byte_s(connection, "pcm"),
                        "http mp3": first_byte_s(connection, "mp3"),
                    }
                    if count >= 10:  # the first ten warm everything up
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


class Direct:
    """A web worker's end of the conversation and nothing else."""

    def __init__(self, url: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = connect_dealer(self._context, url)

    def __enter__(self) -> Self:
        self._dealer.poll(5_000, zmq.POLLOUT)
        self._send(Hello(version=VERSION, token=""))
        self._receive(Welcome)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._dealer.close()
        self._context.term()

    def first_chunk_s(self, name: str) -> float:
        """Seconds from a Speak to its first Audio."""
        began = time.perf_counter()
        self._send(
            Speak(
                id=name,
                client="benchmark",
                model="espeak-ng",
                task="CustomVoice",
                text=TEXT,
                voice="en-us+f2",
                credit=1,
            )
        )
        self._receive(Audio)
        seconds = time.perf_counter() - began
        self._send(Cancel(id=name))
        return seconds

    def _send(self, message: Message) -> None:
        self._dealer.send_multipart(encode(message))

    def _receive(self, kind: type[Message]) -> None:
        while not isinstance(decode_from_worker(self._dealer.recv_multipart())[0], kind):
            pass


def first_byte_s(connection: http.client.HTTPConnection, audio_format: str) -> float:
    """Seconds from a request, on a connection that is already open, to the first byte of its body."""
    body = json.dumps({"input": TEXT, "response_format": audio_format, "model": "espeak-ng"})
    began = time.perf_counter()
    connection.request("POST", "/v1/audio/speech", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read(1)
    seconds = time.perf_counter() - began
    answer.read()
    return seconds


# --- streams in real time ---------------------------------------------------------------------------------------------


def print_streams(folder: Path, rounds: Sequence[int], seconds: float, web_workers: int) -> None:
    """One line a round; memory at the end."""
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
    """How many seconds late each piece came, for a player that began with the first; raises if the stream breaks."""
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
    """A worker process at an address of its own, which is what this gives."""
    private = Path(tempfile.mkdtemp(dir=folder))
    url = f"ipc://{private}/w.ipc"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TTS_")}
    environ |= {"TTS_WORKER_URL": url, "TTS_LOG_LEVEL": "warning", "PYTHONPATH": str(ROOT)}
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
    """What the processes have computed so far."""
    ticks = 0
    for pid in pids:
        fields: list[Any] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
