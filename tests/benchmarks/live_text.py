"""Speech of a text that is still being written: `python -m tests.benchmarks.live_text`.

Each of some WebSockets sends a word every 400 ms, beside whole requests over HTTP. The time from a word to the next
audio is measured by the client: a small random model has said everything when the next word comes, so that audio is
the word's. With random weights the figures say nothing about quality or audible latency.
The memory of a socket is that of a web worker with and without idle ones.
All processes share the machine's cores, the client as well: read the figures with the machine's line above them.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import httpx
import uvloop
import websockets

from tests.benchmarks import machine
from tests.system.service import Service, resident_bytes

MODEL: Final = "qwen3-tts-0.6b-customvoice"
WORD_PAUSE_S: Final = 0.4
WORDS: Final = "Hello to the world of today, where speech begins before it ends."
IDLE: Final = 200
"""Sockets whose memory is measured."""

CONFIG: Final = {"type": "session.config", "model": MODEL, "response_format": "pcm", "seed": 7, "max_new_tokens": 60}


@contextlib.asynccontextmanager
async def configured(service: Service) -> AsyncIterator[websockets.ClientConnection]:
    """A socket that is ready for text."""
    async with websockets.connect(f"ws://127.0.0.1:{service.port}/v1/audio/speech/stream", proxy=None) as socket:
        await socket.send(json.dumps(CONFIG))
        await socket.recv()
        yield socket


async def talk(service: Service, utterances: int, delay_s: float) -> tuple[list[float], list[float]]:
    """Say some utterances; seconds from their first words to audio, and from their other words."""
    first, later = [], []
    await asyncio.sleep(delay_s)
    async with configured(service) as socket:
        for _ in range(utterances):
            sent: list[float] = []
            heard: list[float] = []

            async def listen(heard: list[float] = heard) -> None:
                while True:
                    message = await socket.recv()
                    if isinstance(message, bytes):
                        heard.append(time.perf_counter())
                    elif json.loads(message)["type"] == "session.done":
                        return

            listening = asyncio.create_task(listen())
            for word in WORDS.split():
                sent.append(time.perf_counter())
                await socket.send(json.dumps({"type": "input.text", "text": word + " "}))
                await asyncio.sleep(WORD_PAUSE_S)
            await socket.send(json.dumps({"type": "input.done"}))
            await listening
            delays = [next((at for at in heard if at > word), float("inf")) - word for word in sent]
            first.append(delays[0])
            later += delays[1:]
    return first, later


async def ask(service: Service, client: httpx.AsyncClient) -> None:
    """Whole requests, one after the other, until the task is cancelled."""
    body = {"model": MODEL, "input": WORDS, "response_format": "pcm", "max_new_tokens": 60}
    while True:
        (await client.post(f"{service.url}/v1/audio/speech", json=body)).raise_for_status()


async def measure(service: Service, sockets: int, whole: int, utterances: int) -> str:
    """A line of the table."""
    async with httpx.AsyncClient(timeout=300, trust_env=False) as client:
        asking = [asyncio.create_task(ask(service, client)) for _ in range(whole)]
        spread = (WORD_PAUSE_S * number / sockets for number in range(sockets))
        talks = await asyncio.gather(*(talk(service, utterances, delay_s) for delay_s in spread))
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    first = [delay for firsts, _ in talks for delay in firsts]
    later = [delay for _, laters in talks for delay in laters]
    return f"| {sockets} | {whole} | {_spread(first)} | {_spread(later)} | {len(first) + len(later)} |"


async def socket_bytes(service: Service) -> float:
    """The bytes that an idle socket takes in a web worker."""
    (web,) = service.web_pids()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(IDLE // 4):  # the first ones take what all of them share
            await stack.enter_async_context(configured(service))
        before = resident_bytes(web)
        for _ in range(IDLE):
            await stack.enter_async_context(configured(service))
        return (resident_bytes(web) - before) / IDLE


def _spread(seconds: list[float]) -> str:
    cuts = statistics.quantiles([1000 * value for value in seconds], n=20, method="inclusive")
    return f"{cuts[9]:.0f} / {cuts[18]:.0f}"


async def tables(service: Service, utterances: int) -> None:
    """Measure, and print the table."""
    print(f"- {MODEL}, small random checkpoint; {utterances} utterances of {len(WORDS.split())} words a socket")
    print(f"- an idle socket takes {await socket_bytes(service) / 1000:.0f} kB in a web worker\n")
    print("| sockets | whole requests | first word: ms p50 / p95 | later words: ms p50 / p95 | words |")
    print("|---|---|---|---|---|", flush=True)
    for sockets, whole in ((1, 0), (1, 4), (8, 0), (8, 4), (32, 0), (32, 4)):
        print(await measure(service, sockets, whole, utterances), flush=True)


def main() -> None:
    """Start a service, and measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--utterances", type=int, default=3, help="of each socket")
    utterances = parser.parse_args().utterances
    print("\n".join(f"- {line}" for line in machine.describe()))
    command = [sys.executable, "-m", "tests.benchmarks.endless", "--size", "tiny"]
    checkpoint = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()).resolve()
    paths = {"MODEL_PATHS": f"{MODEL}={checkpoint}", "DEFAULT_MODEL": MODEL, "DEFAULT_DEVICE": "cpu"}
    with tempfile.TemporaryDirectory() as directory:
        service = Service(Path(directory), **paths, MAX_CONCURRENCY=64, WEB_WORKERS=1)
        try:
            uvloop.run(tables(service.wait_ready(120), utterances))
            service.stop()
        finally:
            service.kill()


if __name__ == "__main__":
    main()
