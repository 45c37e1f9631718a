"""The kind of a recording's file, by its first bytes, and the place in the file where the recording begins.

It reads bytes and opens nothing. decoder.py gives FFmpeg no other demuxer than the one that is found here.
"""

import re
from typing import Final

_MAX_JUNK_BYTES: Final = 65_536
"""So much may stand before the first frame of MP3 or AAC: zeros, a broken tag, the rest of a frame that was cut."""

_FRAME_SYNC: Final = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb\xf0\xf1\xf8\xf9]")
"""The first two bytes of a frame of MP3 (version 2.5, 2 or 1) or of AAC (ADTS)."""

_MP3_RATES: Final = (44_100, 48_000, 32_000)
_MP3_KILOBITS: Final = {
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
}
"""By version 1, or 2 and 2.5."""

SEND: Final = "send wav, flac, mp3, ogg, m4a or webm"

_DEMUXERS: Final = (
    (re.compile(rb"(RIFF|RF64)....WAVE", re.DOTALL), "wav"),
    (re.compile(rb"fLaC"), "flac"),
    (re.compile(rb"OggS"), "ogg"),
    (re.compile(rb"....(ftyp|moov|mdat|wide|free|skip)", re.DOTALL), "mov"),
    (re.compile(rb"\x1a\x45\xdf\xa3"), "matroska"),
    (re.compile(rb"FORM....AIF[FC]", re.DOTALL), "aiff"),
    (re.compile(rb"\.snd"), "au"),
    (re.compile(rb"caff"), "caf"),
    (re.compile(rb"riff\x2e\x91\xcf\x11"), "w64"),
    (re.compile(rb"#!AMR(-WB)?\n"), "amr"),
)
"""The first bytes of a container -> FFmpeg's name of it."""

_OTHER_KINDS: Final = (
    (re.compile(rb"\x0b\x77"), "AC-3"),
    (re.compile(rb"\x7f\xfe\x80\x01"), "DTS"),
    (re.compile(rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"), "Windows Media (wma, asf)"),
    (re.compile(rb"wvpk"), "WavPack"),
    (re.compile(rb"MAC "), "Monkey's Audio"),
    (re.compile(rb"\.RMF|\.ra\xfd"), "RealAudio"),
    (re.compile(rb"DSD |FRM8"), "DSD"),
    (re.compile(rb"RIFF....AVI ", re.DOTALL), "AVI"),
    (re.compile(rb"MThd"), "MIDI, which has no sound in it"),
    (re.compile(rb"#!SILK|\x02#!SILK"), "SILK"),
    (re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8"), "a picture"),
    (re.compile(rb"PK\x03\x04"), "a ZIP archive"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), "a web page or XML"),
    (re.compile(rb"\s*\{\s*\""), "JSON"),
)
"""The first bytes of files that are sent by mistake -> what they are."""


class InvalidAudioError(Exception):
    """The recording cannot be used; the message is a clause without a capital that tells the client why."""


def recognise(data: bytes) -> tuple[str, int]:
    """FFmpeg's name of the container, and the position where it begins, behind tags and junk.

    Raises InvalidAudioError for a file of another kind.
    """
    if not data:
        raise InvalidAudioError(f"the file is empty; {SEND}")
    start = _behind_tags(data)
    head = data[start : start + 16]
    for pattern, demuxer in _DEMUXERS:
        if pattern.match(head):
            return demuxer, start
    for pattern, kind in _OTHER_KINDS:
        if pattern.match(head):
            raise InvalidAudioError(f"this is {kind}, which cannot be used; {SEND}")
    for sync in _FRAME_SYNC.finditer(data, start, start + _MAX_JUNK_BYTES):
        size = _frame_bytes(data, sync.start())
        if size and data.startswith(sync[0], sync.start() + size):
            return "mp3" if sync[0][1] & 0x06 else "aac", sync.start()
    raise InvalidAudioError(f"this is not an audio file of a known kind; {SEND}")


def _behind_tags(data: bytes) -> int:
    """The position behind the ID3 tags at the beginning, which some programs put before FLAC and AAC too."""
    start = 0
    while data.startswith(b"ID3", start) and start + 10 <= len(data):
        flags, *size = data[start + 5 : start + 10]
        start += 10 + sum(byte << shift for byte, shift in zip(size, (21, 14, 7, 0), strict=True))
        if flags & 0x10:  # a footer as long as the header
            start += 10
    return start


def _frame_bytes(data: bytes, start: int) -> int:
    """The size of the MP3 or AAC frame whose header is at `start`; 0 if that is no header."""
    header = int.from_bytes(data[start : start + 7].ljust(7, b"\0"), "big")
    if not header >> 41 & 3:  # the layer, which is 0 in AAC
        return header >> 13 & 0x1FFF
    version = {3: 1, 2: 2, 0: 4}.get(header >> 43 & 3, 0)  # 4: 2.5, which has a quarter of the rates of version 1
    rate_index = header >> 34 & 3
    if not version or rate_index == len(_MP3_RATES):
        return 0
    kilobits = _MP3_KILOBITS[min(version, 2)][header >> 36 & 15]
    samples = 1152 if version == 1 else 576
    return kilobits and samples * 125 * kilobits * version // _MP3_RATES[rate_index] + (header >> 33 & 1)
