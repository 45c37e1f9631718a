"""Provenance: the containers carry the label, common libraries read it, and nothing else of the audio changes."""

import io
import wave
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Final

import pytest

from server.audio import SAMPLE_RATES, Encoder, Format, Provenance
from shared.pcm import bytes_for, seconds_of
from tests.audio import decode, tags_of, tone

SPEECH: Final = tone(1.0)
ORIGIN: Final = Provenance(
    model="qwen3-tts-1.7b-base",
    request_id="req-42",
    made_at=datetime(2026, 11, 29, 18, 30, 1, 250, tzinfo=timezone(timedelta(hours=2))),
)
TAGS: Final = {
    "artist": "qwen3-tts-1.7b-base (synthetic speech)",
    "comment": "Synthetic speech, artificially generated. Model: qwen3-tts-1.7b-base. Request: req-42.",
    "date": "2026-11-29T16:30:01Z",
}
TAGGED: Final[list[Format]] = ["mp3", "opus", "ogg", "flac"]


def encoded(audio_format: Format, provenance: Provenance | None, **options: Any) -> bytes:
    """SPEECH through an Encoder, in pieces."""
    encoder = Encoder(audio_format, provenance=provenance, **options)
    parts = [encoder.feed(SPEECH[start : start + 9_600]) for start in range(0, len(SPEECH), 9_600)]
    return b"".join([*parts, encoder.finish()])


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("audio_format", TAGGED)
def test_the_label_is_read_and_the_sound_is_the_same(audio_format: Format, *, streaming: bool) -> None:
    """FFmpeg finds the tags, and decodes the same samples as without them; by default there are none."""
    for rate in (None, SAMPLE_RATES[audio_format][-1]):
        labelled = encoded(audio_format, ORIGIN, streaming=streaming, sample_rate=rate)
        plain = encoded(audio_format, None, streaming=streaming, sample_rate=rate)
        assert tags_of(labelled) == TAGS
        assert tags_of(plain) == {}
        assert decode(labelled, audio_format) == decode(plain, audio_format)


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
def test_mp3_behind_its_tag(*, streaming: bool) -> None:
    """Behind the ID3 tag each byte is that of the plain file, so its gapless header and its cuts are as they were."""
    labelled = encoded("mp3", ORIGIN, streaming=streaming)
    plain = encoded("mp3", None, streaming=streaming)
    assert labelled.startswith(b"ID3\x04")
    assert labelled.endswith(plain)


@pytest.mark.parametrize("audio_format", TAGGED)
def test_the_first_chunk_decodes_alone(audio_format: Format) -> None:
    """The label does not hold the first sound back: the bytes of 80 ms play by themselves, and have the label."""
    first = Encoder(audio_format, provenance=ORIGIN).feed(SPEECH[: bytes_for(0.08)])
    assert seconds_of(decode(first, audio_format)) >= 0.02
    assert tags_of(first) == TAGS


def test_a_whole_wav() -> None:
    """The tags stand behind the sound: from byte 44 on there is PCM, all sizes are true, and `wave` reads the sound."""
    labelled, plain = (encoded("wav", origin, streaming=False) for origin in (ORIGIN, None))
    assert labelled[44 : 44 + len(SPEECH)] == SPEECH == plain[44:]
    assert int.from_bytes(labelled[4:8], "little") == len(labelled) - 8
    assert labelled[40:44] == plain[40:44]
    assert labelled[44 + len(SPEECH) :].startswith(b"LIST")
    assert tags_of(labelled) == TAGS
    with wave.open(io.BytesIO(labelled)) as file:
        assert file.readframes(10**6) == SPEECH
    assert decode(labelled, "wav") == SPEECH


def test_odd_tags_are_padded() -> None:
    """Every chunk of a RIFF file begins at an even byte, whatever the length of a request id."""
    for request_id in ("a", "ab", "ü" * 3, ""):
        origin = Provenance(model="m", request_id=request_id, made_at=datetime(2026, 1, 1, tzinfo=UTC))
        labelled = encoded("wav", origin, streaming=False)
        assert len(labelled) % 2 == 0
        assert tags_of(labelled)["comment"].endswith(f"Request: {request_id}.")


@pytest.mark.parametrize(
    ("audio_format", "streaming"),
    [("wav", True), ("pcm", True), ("pcm", False), ("aac", True), ("aac", False), ("ulaw", False), ("alaw", True)],
)
def test_where_there_is_no_place_for_it(audio_format: Format, *, streaming: bool) -> None:
    """A streamed wav, whose sound goes on to its end, and formats without tags are as they were."""
    labelled, plain = (encoded(audio_format, origin, streaming=streaming) for origin in (ORIGIN, None))
    assert labelled == plain
