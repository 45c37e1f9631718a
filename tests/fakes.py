"""Small fakes of the parts of the system that a test leaves out."""

import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import zmq

from shared.catalog import ModelSpec, load_catalog
from shared.pcm import bytes_for
from shared.protocol import (
    VERSION,
    Append,
    Audio,
    BufferMemory,
    Call,
    Cancel,
    Counters,
    Credit,
    DeviceMemory,
    EndText,
    Failed,
    FindVoice,
    Finished,
    FromWeb,
    Hello,
    HostMemory,
    Message,
    ModelStatus,
    Ping,
    Pong,
    RateLimit,
    Reply,
    SavedVoice,
    Snapshot,
    Speak,
    Started,
    Timings,
    Usage,
    Welcome,
    Word,
    decode_from_web,
    encode,
)
from shared.sockets import bind_router


def text_of(speak: Speak) -> str:
    """The text of all segments."""
    return "".join(segment.text for segment in speak.segments)


def tone(text: str, chunks: int, samples: int = 1920) -> list[bytes]:
    """Recognisable PCM: `chunks` pieces of `samples` samples with one constant value that depends on `text`."""
    level = sum(text.encode()) % 8000 + 1
    return [struct.pack("<h", level) * samples] * chunks


def a_snapshot(catalog: list[ModelSpec], **changes: Any) -> Snapshot:
    """The snapshot of an idle worker on a CPU with the models of `catalog`, with some fields changed."""
    plain = Snapshot(
        pid=4711,
        boot_id="boot-1",
        uptime_s=12.5,
        accepting=True,
        default_model="espeak-ng",
        running=0,
        queued=0,
        slots=8,
        buffered=0,
        stalled=0,
        audio_buffer=BufferMemory(used_bytes=96_000, budget_bytes=480_000),
        requests=Counters(started=5, finished=3, failed=1, cancelled=1),
        models=[
            ModelStatus(
                id=spec.id, state="resident" if spec.engine == "espeak" else "absent", last_used=1.0, idle_s=2.0
            )
            for spec in catalog
        ],
        device=DeviceMemory(
            name="a CPU",
            kind="cpu",
            total_bytes=16_000,
            used_bytes=6_000,
            free_bytes=10_000,
            ours_bytes=1_000,
            others_bytes=5_000,
            budget_bytes=8_000,
        ),
        host=HostMemory(
            total_bytes=16_000, free_bytes=10_000, ours_bytes=1_000, offloaded_bytes=500, budget_bytes=8_000
        ),
        shared_bytes={"codec": 123},
        voices=[],
    )
    return msgspec.structs.replace(plain, **changes)


class FakeWorker:
    """A GPU worker in a thread: a real socket and the real protocol, with fixed answers.

    It answers each segment of a Speak, and each Append to an open one, with `chunks` pieces of `tone` and its pause,
    as credit allows, and each Call with `on_call`.
    A test may change its behaviour: `hold` keeps requests queued (no Started), `mute` answers no Ping,
    `late` delays the Pongs, `skip_seq` leaves out a sequence number,
    `fail_with` fails every Speak, at once or after `break_after` chunks.
    `rate_limit` is in each Started. `words` are those of each piece, by its number, for a Speak with `timestamps`.
    `seen` holds the messages that arrived, except pings. `reset` undoes all changes.
    """

    def __init__(self, path: Path, *, chunks: int = 3, **snapshot: Any) -> None:
        self.url = f"ipc://{path}"
        self.catalog = load_catalog()
        self.settings: dict[str, Any] = {"idle_timeout": 300.0}
        self.version = VERSION
        self.token = ""
        self._initial = chunks, snapshot
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}
        self.pongs: list[tuple[bytes, Pong]] = []
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._thread: threading.Thread | None = None
        self.reset()

    def reset(self) -> None:
        """Return to the behaviour and the snapshot of the beginning, and forget the messages seen."""
        self.chunks, snapshot = self._initial
        self.snapshot = a_snapshot(self.catalog, **snapshot)
        self.hold = False
        self.mute = False
        self.late = False
        self.skip_seq = False
        self.words: dict[int, list[Word]] = {}
        self.rate_limit: RateLimit | None = None
        self.fail_with: Failed | None = None
        self.break_after: int | None = None
        self.saved: list[SavedVoice] = []
        self.on_call: Callable[[Call, bytes | None], Reply | Failed] = self._find_voice
        self.seen: list[FromWeb] = []
        self.payloads: list[bytes | None] = []

    def __enter__(self) -> Self:
        self._stop.clear()
        self._router = bind_router(self._context, self.url)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()
        self._context.term()

    def stop(self) -> None:
        """Die: close the socket, and drop every request."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def restart(self, boot_id: str) -> None:
        """Start again as a new process would."""
        restarts = self.snapshot.restarts + 1
        self.snapshot = msgspec.structs.replace(self.snapshot, boot_id=boot_id, restarts=restarts)
        self._jobs.clear()
        self.__enter__()

    def wait_for(self, kind: type[Message], count: int = 1, timeout_s: float = 20.0) -> list[Any]:
        """The messages of that kind, as soon as `count` of them have arrived; AssertionError on timeout."""
        with self._changed:
            ok = self._changed.wait_for(lambda: len(self.of(kind)) >= count, timeout_s)
        assert ok, f"{count} {kind.__name__} expected, seen: {self.seen}"
        return self.of(kind)

    def of(self, kind: type[Message]) -> list[Any]:
        """The messages of that kind that have arrived so far."""
        return [message for message in self.seen if isinstance(message, kind)]

    @property
    def busy(self) -> int:
        """The number of requests that are neither finished nor cancelled."""
        return len(self._jobs)

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._router.poll(5):
                peer, *frames = self._router.recv_multipart()
                message, payload = decode_from_web(frames)
                self._take(peer, message, payload)
            while self.pongs and not self.late:
                self._send(*self.pongs.pop(0))
            self._speak()
        self._router.close()

    def _take_ping(self, peer: bytes, ping: Ping) -> None:
        if ping.limit_hits:
            hits = Counter(self.snapshot.limit_hits) + Counter(ping.limit_hits)
            self.snapshot = msgspec.structs.replace(self.snapshot, limit_hits=dict(hits))
        if not self.mute:
            # It knows of one web worker alone, so that one's counts are the sums.
            snapshot = msgspec.structs.replace(self.snapshot, web_caches=ping.caches)
            self.pongs.append((peer, Pong(boot_id=snapshot.boot_id, snapshot=snapshot)))

    def _take(self, peer: bytes, message: FromWeb, payload: bytes | None) -> None:
        if isinstance(message, Ping):
            self._take_ping(peer, message)
            return
        refused = self.fail_with is not None and self.break_after is None
        if isinstance(message, Speak) and not refused:
            # Before `wait_for` wakes the test, which may read `busy` next.
            self._jobs[message.id] = _Job(peer, message, list(self._pieces(message)))
        with self._changed:
            self.seen.append(message)
            self.payloads.append(payload)
            self._changed.notify_all()
        match message:
            case Hello() if message.token != self.token:
                self._send(peer, Failed(id="", code="invalid_api_key", message="wrong token"))
            case Hello():
                self._send(
                    peer,
                    Welcome(
                        version=self.version,
                        boot_id=self.snapshot.boot_id,
                        catalog=self.catalog,
                        snapshot=self.snapshot,
                        settings=self.settings,
                    ),
                )
            case Speak() if refused and self.fail_with is not None:
                self._send(peer, msgspec.structs.replace(self.fail_with, id=message.id))
            case Cancel():
                self._jobs.pop(message.id, None)
            case Call():
                self._send(peer, self.on_call(message, payload))
            case Append() | EndText() | Credit() if message.id in self._jobs:
                self._go_on(self._jobs[message.id], message)

    def _go_on(self, job: "_Job", message: Append | EndText | Credit) -> None:
        match message:
            case Append(text=text):
                job.pcm += self._pieces_of(text, 1.0)
            case EndText():
                job.text_open = False
            case Credit(chunks=chunks):
                job.credit += chunks

    def _find_voice(self, call: Call, _payload: bytes | None) -> Reply | Failed:
        if isinstance(call.action, FindVoice):
            for voice in self.saved:
                if call.action.name in (voice.id, voice.name):
                    return Reply(id=call.id, voice=voice)
        return Failed(id=call.id, code="voice_not_found", message="there is no such voice")

    def _speak(self) -> None:
        if self.hold:
            return
        for job in list(self._jobs.values()):
            request = job.request
            if job.sent == 0 and not job.started:
                job.started = True
                started = Started(id=request.id, model=request.model, sample_rate=24_000, rate_limit=self.rate_limit)
                self._send(job.peer, started)
            while job.credit and job.sent < len(job.pcm) and job.sent != self.break_after:
                pcm, rate = job.pcm[job.sent]
                seq = job.sent + (1 if self.skip_seq and job.sent else 0)
                words = self.words.get(job.sent, []) if request.timestamps else []
                self._send(job.peer, Audio(id=request.id, seq=seq, rate=rate, words=words), pcm)
                job.sent += 1
                job.credit -= 1
            if job.sent == self.break_after and self.fail_with is not None:
                self._end(job, msgspec.structs.replace(self.fail_with, id=request.id))
            elif job.sent == len(job.pcm) and not job.text_open:
                usage = Usage(input_tokens=len(text_of(request)), output_tokens=job.sent)
                timings = Timings(queue_s=0.001, load_s=0.0, first_audio_s=0.002, total_s=0.003)
                self._end(job, Finished(id=request.id, reason="stop", usage=usage, timings=timings))

    def _pieces(self, request: Speak) -> Iterator[tuple[bytes, float | None]]:
        for segment in request.segments:
            yield from self._pieces_of(segment.text, segment.rate)
            if segment.pause_ms:
                yield bytes(bytes_for(segment.pause_ms / 1000)), None

    def _pieces_of(self, text: str, rate: float) -> list[tuple[bytes, float | None]]:
        return [(piece, rate) for piece in tone(text, self.chunks)] if text else []

    def _end(self, job: "_Job", message: Message) -> None:
        self._send(job.peer, message)
        self._jobs.pop(job.request.id, None)

    def _send(self, peer: bytes, message: Message, payload: bytes | None = None) -> None:
        try:
            self._router.send_multipart([peer, *encode(message, payload)], flags=zmq.NOBLOCK)
        except zmq.ZMQError:
            # The web worker has disconnected.
            self._jobs = {key: job for key, job in self._jobs.items() if job.peer != peer}


class _Job:
    def __init__(self, peer: bytes, request: Speak, pcm: list[tuple[bytes, float | None]]) -> None:
        self.peer = peer
        self.request = request
        self.pcm = pcm
        self.credit = request.credit
        self.sent = 0
        self.text_open = request.open
        self.started = False
