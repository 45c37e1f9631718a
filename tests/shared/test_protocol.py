"""The protocol: each message survives encoding and decoding, and nothing else is accepted."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from shared.catalog import load_catalog
from shared.protocol import (
    VERSION,
    Audio,
    CacheCounts,
    CacheStats,
    Call,
    Cancel,
    Cleanup,
    CleanupPass,
    CloneVoice,
    CreateConsent,
    Credit,
    DeleteConsent,
    DeleteVoice,
    DesignVoice,
    EmptyCache,
    Failed,
    FindConsent,
    FindVoice,
    Finished,
    Hello,
    Histogram,
    ListConsents,
    LoadModel,
    ModelStats,
    ModelStatus,
    Ping,
    PinModel,
    Pong,
    ProtocolError,
    RenameConsent,
    Reply,
    Sampling,
    SavedVoice,
    Segment,
    Speak,
    Started,
    StreamState,
    Timings,
    UnloadModel,
    Usage,
    VoiceConsent,
    Welcome,
    decode_from_web,
    decode_from_worker,
    encode,
)
from tests.fakes import a_snapshot

PLAIN_SPEAK = {"type": "Speak", "id": "r", "client": "c", "model": "m", "task": "Base", "segments": [], "credit": 1}
VOICE = SavedVoice(id="voice_1", name="Ada", kind="clone", created_at=1, seconds=2.5, in_context=True)
PASS = CleanupPass(
    timestamp=1.5, vram_before_bytes=3, vram_after_bytes=2, models_checked=["a", "b"], models_unloaded=["a"]
)

FROM_WEB = [
    Hello(version=VERSION, token=""),
    Speak(id="r", client="c", model="m", task="CustomVoice", segments=[Segment(text="Grüße \0 😀 \u2028")], credit=0),
    Speak(
        id="r",
        client="c",
        model="m",
        task="Base",
        segments=[Segment(text="t")],
        credit=8,
        voice="voice_1",
        saved_voice=True,
        language="german",
        instructions="softly",
        reference_text="",
        x_vector_only=True,
        sampling=Sampling(seed=2**63, temperature=0.0, top_k=1, top_p=0.5, repetition_penalty=1.1, max_new_tokens=9),
        non_streaming_mode=False,
        keep_alive_s=-1.0,
    ),
    Credit(id="r", chunks=3),
    Cancel(id="r"),
    Ping(),
    Ping(caches={"catalog": CacheCounts(hits=2, misses=1)}),
    *[
        Call(id="c", client="c", action=action)
        for action in (
            LoadModel(model="m"),
            UnloadModel(model="m"),
            PinModel(model="m", pinned=False),
            Cleanup(),
            FindVoice(name="n"),
            CloneVoice(name="n", text="t", description="d", consent="c"),
            DesignVoice(name="n", prompt="p"),
            DeleteVoice(id="voice_1"),
            CreateConsent(name="n", language="en"),
            FindConsent(id="cons_1"),
            ListConsents(limit=20, after="cons_1"),
            RenameConsent(id="cons_1", name="n"),
            DeleteConsent(id="cons_1"),
            EmptyCache(name="stored_audio"),
        )
    ],
]

CONSENT = VoiceConsent(id="cons_1", name="n", language="en", created_at=1)

FROM_WORKER = [
    Welcome(version=VERSION, boot_id="b", catalog=load_catalog(), snapshot=a_snapshot(load_catalog(), voices=[VOICE])),
    Welcome(
        version=VERSION,
        boot_id="b",
        catalog=[],
        snapshot=a_snapshot([]),
        settings={"idle_timeout": 300.0, "cleanup_enabled": True, "vram_budget_mb": None, "preload": ["m"]},
    ),
    Started(id="r", model="m", sample_rate=24_000),
    Audio(id="r", seq=0),
    Finished(
        id="r",
        reason="length",
        usage=Usage(input_tokens=1, output_tokens=2),
        timings=Timings(queue_s=0.5, load_s=0.25, first_audio_s=0.75, total_s=1.0),
    ),
    Failed(id="r", code="queue_full", message="m", param="input", retry_after_s=1.5),
    Reply(id="c"),
    Reply(id="c", consent=CONSENT),
    Reply(id="c", consents=[CONSENT], has_more=True),
    Reply(id="c", voice=VOICE, model=ModelStatus(id="m", state="resident", bytes={"weights": 5}), cleanup=PASS),
    Pong(boot_id="b", snapshot=a_snapshot(load_catalog(), cleanup=PASS)),
    Pong(
        boot_id="b",
        snapshot=a_snapshot(
            load_catalog(),
            restarts=2,
            caches=[CacheStats(name="tokens", model="m", entries=1, bytes=None, hits=2, misses=3)],
            web_caches={"catalog": CacheCounts(hits=2)},
            emptied={"catalog": 1},
            model_stats={
                "m": ModelStats(first_audio_s=Histogram(counts=[0, 3], sum=1.5), failed_transitions={"load": 1}),
                "n": ModelStats(transitions_s={"offload": Histogram(counts=[2, 0], sum=0.5)}, out_of_memory=1),
            },
            streams=[
                StreamState(id="r", model="m", client="c", state="stalled", age_s=2.5, audio_s=1.0, buffered_s=0.5)
            ],
        ),
    ),
]


def _named(message: Any) -> str:
    return type(message).__name__


class TestRoundTrip:
    """A decoded message equals the encoded one."""

    @pytest.mark.parametrize("message", FROM_WEB, ids=_named)
    def test_from_web(self, message: Any) -> None:
        """Each message of a web worker, with and without a payload."""
        assert decode_from_web(encode(message)) == (message, None)
        assert decode_from_web(encode(message, b"\1\2")) == (message, b"\1\2")

    @pytest.mark.parametrize("message", FROM_WORKER, ids=_named)
    def test_from_worker(self, message: Any) -> None:
        """Each message of the GPU worker."""
        assert decode_from_worker(encode(message)) == (message, None)

    def test_empty_payload(self) -> None:
        """An empty payload is not the same as none."""
        assert decode_from_worker(encode(Audio(id="r", seq=0), b"")) == (Audio(id="r", seq=0), b"")

    def test_small_audio_header(self) -> None:
        """The header of the most frequent message is short."""
        assert len(encode(Audio(id="0" * 32, seq=1_000))[0]) < 70

    def test_immutable(self) -> None:
        """Messages cross threads, so they cannot be changed."""
        credit: Any = Credit(id="r", chunks=1)
        with pytest.raises(AttributeError):
            credit.chunks = 2


class TestRefused:
    """Other bytes are a ProtocolError."""

    @pytest.mark.parametrize("message", FROM_WORKER, ids=_named)
    def test_worker_message_from_web(self, message: Any) -> None:
        """A web worker must not send a message of the GPU worker."""
        with pytest.raises(ProtocolError):
            decode_from_web(encode(message))

    @pytest.mark.parametrize("message", FROM_WEB, ids=_named)
    def test_web_message_from_worker(self, message: Any) -> None:
        """The GPU worker must not send a message of a web worker."""
        with pytest.raises(ProtocolError):
            decode_from_worker(encode(message))

    @pytest.mark.parametrize("count", [0, 3, 10])
    def test_number_of_frames(self, count: int) -> None:
        """A message has one or two frames."""
        with pytest.raises(ProtocolError, match=f"not {count}"):
            decode_from_web([b"x"] * count)

    @pytest.mark.parametrize(
        "header",
        [
            b"",
            b"\x00",
            b"\xc1",
            b'{"type": "Ping"}',
            encode(Cancel(id="r"))[0][:-1],
            encode(Cancel(id="r"))[0] + b"\0",
            msgspec.msgpack.encode([1, 2]),
            msgspec.msgpack.encode({"id": "r"}),
            msgspec.msgpack.encode({"type": "Exec", "id": "r"}),
            msgspec.msgpack.encode({"type": "Cancel"}),
            msgspec.msgpack.encode({"type": "Credit", "id": "r", "chunks": "many"}),
            msgspec.msgpack.encode({"type": "Call", "id": "c", "client": "c", "action": {"type": "Format"}}),
            msgspec.msgpack.encode({"type": "Speak", "id": "r", "client": "c", "model": "m", "task": "Sing"}),
            b"\x82\xa4type\xa6Cancel\xa2id\xa1\xff",
            b"\x82\xa4type\xa4Ping\xa1x" + b"\x91" * 100_000 + b"\xc0",
        ],
    )
    def test_garbage(self, header: bytes) -> None:
        """A header that is truncated, too long, of a wrong type, unknown or deeply nested is a ProtocolError."""
        with pytest.raises(ProtocolError, match=f"not a message of version {VERSION}"):
            decode_from_web([header])

    @pytest.mark.parametrize(
        "fields",
        [
            {"type": "UsedElsewhere", "source": "s", "clients": {"key:a": [math.inf, 0, 0, 0]}},
            {"type": "UsedElsewhere", "source": "s", "clients": {"key:a": [math.nan, 0, 0, 0]}},
            {"type": "UsedElsewhere", "source": "s", "clients": {"key:a": [-1e308, 0, 0, 0]}},
            {"type": "UsedElsewhere", "source": "s", "clients": {"key:a": [1e308, 0, 0, 0]}},
            {"type": "UsedElsewhere", "source": "s", "clients": {"key:a": [0, -1, 0, 0]}},
            {"type": "UsedElsewhere", "source": "s", "clients": {"key:a": [0, 0, -1, 0]}},
            {"type": "UsedElsewhere", "source": "s", "clients": {"key:a": [0, 0, 0, -1]}},
            {"type": "Ping", "open_sockets": -1},
            {"type": "Ping", "open_sockets": 2**64 - 1},
            {"type": "Ping", "limit_hits": {"queue": -1}},
            {"type": "Ping", "limit_hits": {"queue": 2**64 - 1}},
            {"type": "Ping", "caches": {"catalog": [-1, 0]}},
            {"type": "Ping", "caches": {"catalog": [0, 2**64 - 1]}},
            {**PLAIN_SPEAK, "segments": [{"text": "a", "pause_ms": -1}]},
            {**PLAIN_SPEAK, "sampling": {"top_k": -1}},
            {**PLAIN_SPEAK, "sampling": {"max_new_tokens": -1}},
            {**PLAIN_SPEAK, "sampling": {"temperature": math.nan}},
            {**PLAIN_SPEAK, "limits": {"requests_per_minute": 0}},
            {**PLAIN_SPEAK, "limits": {"requests_per_minute": 2**64 - 1}},
            {**PLAIN_SPEAK, "limits": {"characters_per_day": -1}},
            {**PLAIN_SPEAK, "limits": {"concurrent_requests": -1}},
        ],
    )
    def test_impossible_numbers(self, fields: dict[str, Any]) -> None:
        """A number that no web worker can have counted, or that would divide by zero or overflow, is refused."""
        with pytest.raises(ProtocolError, match="Expected"):
            decode_from_web([msgspec.msgpack.encode(fields)])

    @pytest.mark.parametrize(
        ("fields", "longest"),
        [
            (lambda text: {**PLAIN_SPEAK, "id": text}, 200),
            (lambda text: {**PLAIN_SPEAK, "client": text}, 200),
            (lambda text: {**PLAIN_SPEAK, "model": text}, 200),
            (lambda text: {**PLAIN_SPEAK, "voice": text}, 200),
            (lambda text: {**PLAIN_SPEAK, "language": text}, 200),
            (lambda text: {**PLAIN_SPEAK, "instructions": text}, 4096),
            (lambda text: {**PLAIN_SPEAK, "reference_text": text}, 4096),
            (lambda text: {**PLAIN_SPEAK, "segments": [{"text": text}]}, 2_000_000),
            (lambda text: {"type": "Append", "id": "r", "text": text}, 2_000_000),
        ],
        ids=["id", "client", "model", "voice", "language", "instructions", "reference_text", "text", "more text"],
    )
    def test_the_longest_texts(self, fields: Callable[[str], dict[str, Any]], longest: int) -> None:
        """No web worker sends a longer one: the routes have the same bounds."""
        decode_from_web([msgspec.msgpack.encode(fields("x" * longest))])
        with pytest.raises(ProtocolError, match=f"length <= {longest}"):
            decode_from_web([msgspec.msgpack.encode(fields("x" * (longest + 1)))])

    def test_every_prefix(self) -> None:
        """A message that is cut anywhere is a ProtocolError."""
        header = encode(FROM_WEB[2])[0]
        for length in range(len(header)):
            with pytest.raises(ProtocolError):
                decode_from_web([header[:length]])

    def test_newer_fields(self) -> None:
        """A field that this version does not know is ignored."""
        header = msgspec.msgpack.encode({"type": "Cancel", "id": "r", "why": {"deep": [1]}})
        assert decode_from_web([header]) == (Cancel(id="r"), None)
