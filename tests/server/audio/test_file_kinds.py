"""File kinds: the container of a recording by its first bytes, and the names of what is refused."""

import pytest

from server.audio.decoder import decode_reference
from server.audio.file_kinds import InvalidAudioError, recognise


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x0b\x77" + bytes(100), "AC-3"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(100), "Windows Media (wma, asf)"),
        (b"RIFF\xa0\0\0\0AVI LIST" + bytes(100), "AVI"),
        (b"MThd" + bytes(100), "MIDI, which has no sound in it"),
        (b"wvpk" + bytes(100), "WavPack"),
        (b"\x02#!SILK_V3" + bytes(100), "SILK"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "a picture"),
        (b"PK\x03\x04" + bytes(100), "a ZIP archive"),
        (b"\n <!DOCTYPE html><title>404", "a web page or XML"),
        (b'{"error": "no such file"}', "JSON"),
    ],
)
def test_other_kinds_are_named(data: bytes, kind: str) -> None:
    """The refusal says what the file is, and what to send instead."""
    with pytest.raises(InvalidAudioError) as caught:
        decode_reference(data)
    assert str(caught.value) == f"this is {kind}, which cannot be used; send wav, flac, mp3, ogg, m4a or webm"


@pytest.mark.parametrize(
    ("head", "demuxer"),
    [
        (b"RIFF\0\0\0\0WAVE", "wav"),
        (b"RF64\xff\xff\xff\xffWAVE", "wav"),
        (b"fLaC\0\0\0\x22", "flac"),
        (b"OggS\0\x02", "ogg"),
        (b"\0\0\0\x1cftypM4A ", "mov"),
        (b"\0\0\0\x08wide", "mov"),
        (b"\0\x01\0\0moov", "mov"),
        (b"\x1a\x45\xdf\xa3", "matroska"),
        (b"FORM\0\0\0\0AIFC", "aiff"),
        (b".snd\0\0\0\x18", "au"),
        (b"caff\0\x01", "caf"),
        (b"riff\x2e\x91\xcf\x11", "w64"),
        (b"#!AMR\n", "amr"),
        (b"#!AMR-WB\n", "amr"),
    ],
)
@pytest.mark.parametrize("tag", [b"", b"ID3\x03\0\0\0\0\0\x03abc"], ids=["bare", "tagged"])
def test_containers(head: bytes, demuxer: str, tag: bytes) -> None:
    """Each container is found by its mark, also behind an ID3 tag."""
    assert recognise(tag + head + bytes(20)) == (demuxer, len(tag))


@pytest.mark.parametrize(
    ("header", "size", "demuxer"),
    [
        (b"\xff\xfb\x90\x00", 417, "mp3"),  # version 1, 128 kbit/s, 44.1 kHz
        (b"\xff\xfb\x92\x00", 418, "mp3"),  # and padding
        (b"\xff\xfb\xe4\x00", 960, "mp3"),  # 320 kbit/s, 48 kHz
        (b"\xff\xf3\x84\xc4", 192, "mp3"),  # version 2, 64 kbit/s, 24 kHz
        (b"\xff\xe3\x88\xc4", 576, "mp3"),  # version 2.5, 64 kbit/s, 8 kHz
        (b"\xff\xf1\x58\x40\x19\xff\xfc", 207, "aac"),
    ],
)
def test_two_frames_make_a_stream(header: bytes, size: int, demuxer: str) -> None:
    """A frame counts if another one follows where it ends, and nowhere else; the sizes are those of the standards."""
    frame = header.ljust(size, b"\x55")
    assert recognise(b"junk" + frame + frame) == (demuxer, 4)
    for other in (frame, frame + b"\0" + frame, frame[:-1] + frame):
        with pytest.raises(InvalidAudioError, match="not an audio file"):
            recognise(b"junk" + other)


@pytest.mark.parametrize(
    "header", [b"\xff\xfb\x0c\x00", b"\xff\xfb\xf0\x00", b"\xff\xfb\x9c\x00", b"\xff\xf9\x58\x40\0\0\0"]
)
def test_headers_without_a_size_are_none(header: bytes) -> None:
    """A free or forbidden bit rate, a reserved sample rate, a frame of no bytes: the search goes on and ends."""
    with pytest.raises(InvalidAudioError, match="not an audio file"):
        recognise(header * 50)


def test_an_empty_file() -> None:
    """It is called empty: a wrong path in a script sends one."""
    with pytest.raises(InvalidAudioError, match="the file is empty; send wav"):
        recognise(b"")
