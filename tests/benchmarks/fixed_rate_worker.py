"""`python -m tests.benchmarks.fixed_rate_worker URL SECONDS`: a GPU worker that sends audio in real time.

Every request gets SECONDS of recorded speech, one frame of 80 ms each 80 ms, as from a GPU that just keeps up.
The worker needs almost no CPU time, so that the front end is measured.
"""

import asyncio
import sys
from itertools import cycle, islice
from typing import Any, Final

import uvloop
import zmq
import zmq.asyncio

from gpu_worker.engines.base import Job, Pcm
from gpu_worker.engines.espeak import EspeakEngine
from shared.catalog import load_catalog
from shared.pcm import BYTES_PER_SAMPLE, FRAME_SAMPLES, SAMPLE_RATE
from shared.protocol import (
    VERSION,
    Audio,
    Cancel,
    Credit,
    Finished,
    Hello,
    Ping,
    Pong,
    Segment,
    Speak,
    Started,
    Timings,
    Usage,
    Welcome,
    decode_from_web,
    encode,
)
from shared.sockets import bind_router
from tests.fakes import a_snapshot

FRAME_S: Final = FRAME_SAMPLES / SAMPLE_RATE
TEXT: Final = "This is speech that goes on for a while, so that an encoder has the work that it usually has. " * 2


async def serve(url: str, frames: int) -> None:
    """Answer every Speak with `frames` frames in real time, until the process ends."""
    context = zmq.asyncio.Context()
    router: Any = bind_router(context, url)
    catalog = load_catalog()
    snapshot = a_snapshot(catalog, slots=4096)
    pcm = list(islice(cycle(_recorded_frames()), frames))
    speaking: dict[str, asyncio.Task[None]] = {}
    allowed: dict[str, asyncio.Semaphore] = {}

    async def speak(peer: bytes, request: Speak) -> None:
        loop = asyncio.get_running_loop()
        credit = allowed[request.id] = asyncio.Semaphore(request.credit)
        began = loop.time()
        await router.send_multipart([peer, *encode(Started(id=request.id, model=request.model, sample_rate=24_000))])
        for seq, frame in enumerate(pcm):
            await asyncio.sleep(began + seq * FRAME_S - loop.time())
            await credit.acquire()
            await router.send_multipart([peer, *encode(Audio(id=request.id, seq=seq), frame)])
        usage = Usage(input_tokens=1, output_tokens=frames)
        timings = Timings(queue_s=0.0, load_s=0.0, first_audio_s=0.0, total_s=loop.time() - began)
        finished = Finished(id=request.id, reason="stop", usage=usage, timings=timings)
        await router.send_multipart([peer, *encode(finished)])
        del speaking[request.id], allowed[request.id]

    while True:
        peer, *received = await router.recv_multipart()
        message, _ = decode_from_web(received)
        match message:
            case Hello():
                welcome = Welcome(version=VERSION, boot_id=snapshot.boot_id, catalog=catalog, snapshot=snapshot)
                await router.send_multipart([peer, *encode(welcome)])
            case Ping():
                await router.send_multipart([peer, *encode(Pong(boot_id=snapshot.boot_id, snapshot=snapshot))])
            case Speak():
                speaking[message.id] = asyncio.create_task(speak(peer, message))
            case Credit() if message.id in allowed:
                for _ in range(message.chunks):
                    allowed[message.id].release()
            case Cancel() if message.id in speaking:
                speaking.pop(message.id).cancel()
                allowed.pop(message.id, None)


def _recorded_frames() -> list[bytes]:
    engine = EspeakEngine(next(spec for spec in load_catalog() if spec.engine == "espeak"))
    engine.admit(Job(id="recording", task="CustomVoice", segments=[Segment(text=TEXT)], voice="en-us+f2"))
    pcm = b""
    while engine.runnable(()):
        pcm += b"".join(event.data for event in engine.step(()) if isinstance(event, Pcm))
    size = FRAME_SAMPLES * BYTES_PER_SAMPLE
    return [pcm[start : start + size] for start in range(0, len(pcm) - size + 1, size)]


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], round(float(sys.argv[2]) / FRAME_S)))
