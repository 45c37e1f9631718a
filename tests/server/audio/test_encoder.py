"""Encoder: in each format the audio is complete, of the right length, and playable from its first bytes."""

import array
import gc
import io
import itertools
import resource
import struct
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from server.audio.encoder import Encoder
from server.audio.formats import CONTENT_TYPES, SAMPLE_RATES, Format
from shared.pcm import bytes_for, samples_of, seconds_of
from tests.audio import decode, likeness, tone, waveform

FORMATS: list[Format] = ["mp3", "opus", "aac", "flac", "wav", "pcm"]
EXACT: list[Format] = ["opus", "flac", "wav", "pcm"]
SPEECH = tone(2.5)


def encoded(
    pcm: bytes, audio_format: Format, *, speed: float = 1.0, streaming: bool = True, piece: int = 4801
) -> bytes:
    """`pcm` through an Encoder, in pieces that also cut through samples."""
    encoder = Encoder(audio_format, speed=speed, streaming=streaming)
    parts = [encoder.feed(pcm[start : start + piece]) for start in range(0, len(pcm), piece)]
    return b"".join([*parts, encoder.finish()])


def rising_zero_crossings(pcm: bytes) -> int:
    """The number of periods of a tone."""
    return sum(before < 0 <= after for before, after in itertools.pairwise(array.array("h", pcm)))


@pytest.mark.parametrize("speed", [0.25, 1.0, 4.0])
def test_the_rate_of_a_piece_multiplies_the_speed(speed: float) -> None:
    """Each piece is exact in length: within the limits of the speed, and a pause at any speed as it is."""
    pieces = [(tone(0.5), 1.0), (bytes(bytes_for(1.5)), None), (tone(0.25), 2.0), (tone(0.25), 0.5), (b"", 1.0)]
    encoder = Encoder("pcm", speed=speed)
    heard = b"".join([*(encoder.feed(pcm, rate) for pcm, rate in pieces), encoder.finish()])
    factors = [1.0 if rate is None else min(max(speed * rate, 0.25), 4.0) for _, rate in pieces]
    lengths = [round(samples_of(pcm) / factor) for (pcm, _), factor in zip(pieces, factors, strict=True)]
    assert samples_of(heard) == sum(lengths)
    pause = heard[lengths[0] * 2 :][: bytes_for(1.5)]
    assert pause == bytes(bytes_for(1.5))
    if speed == 1.0:
        assert heard.startswith(tone(0.5))


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("speed", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("audio_format", FORMATS)
def test_length_is_kept(audio_format: Format, speed: float, *, streaming: bool) -> None:
    """The decoded length is that of the speech divided by the speed; of MP3 streams and AAC within two packets."""
    heard = decode(encoded(SPEECH, audio_format, speed=speed, streaming=streaming), audio_format)
    surplus = samples_of(heard) - round(samples_of(SPEECH) / speed)
    if audio_format in EXACT:
        assert surplus == 0
    elif audio_format == "mp3" and not streaming:
        assert abs(surplus) <= 24
    else:
        packet, longest = {"mp3": (576, 1_465), "aac": (1_024, 2_152)}[audio_format]
        assert -packet / 2 <= surplus <= longest


@pytest.mark.parametrize("audio_format", ["mp3", "aac"])
def test_quiet_padding_is_cut(audio_format: Format) -> None:
    """If speech ends in silence, as usual, MP3 and AAC streams are at most half a packet off."""
    heard = decode(encoded(tone(2.0) + bytes(bytes_for(0.15)), audio_format), audio_format)
    packet = {"mp3": 576, "aac": 1024}[audio_format]
    assert abs(samples_of(heard) - samples_of(SPEECH) * 2.15 / 2.5) <= packet / 2


@pytest.mark.parametrize("audio_format", ["mp3", "aac"])
def test_loud_end_is_not_cut(audio_format: Format) -> None:
    """Of speech that breaks off at full level at most 1 ms is lost, and the answer is not much longer."""
    lead_in, packet = {"mp3": (913, 576), "aac": (1152, 1024)}[audio_format]
    for samples in range(6_000, 6_000 + packet, 48):
        heard = decode(encoded(tone(samples / 24_000, fade_s=0.001), audio_format), audio_format)
        assert -24 <= samples_of(heard) - samples - lead_in <= packet - 24
        periods = rising_zero_crossings(heard[: 2 * (samples + lead_in)])
        assert periods >= (samples - 24) // 80 - 1


@pytest.mark.parametrize("audio_format", FORMATS)
def test_the_first_frame_decodes_alone(audio_format: Format) -> None:
    """The bytes of the first 80 ms of speech, a frame of Qwen3-TTS, can be decoded alone; those of 100 ms too."""
    for first in (bytes_for(0.08), bytes_for(0.1)):
        sent = Encoder(audio_format).feed(SPEECH[:first])
        assert 0.02 <= seconds_of(decode(sent, audio_format)) <= first / bytes_for(1.0) + 0.001


@pytest.mark.parametrize("audio_format", FORMATS)
def test_every_chunk_sent_is_decodable_or_nothing(audio_format: Format) -> None:
    """However small the pieces are, the first bytes come within 80 ms of speech and can be decoded."""
    encoder = Encoder(audio_format)
    for start in range(0, bytes_for(0.08), 480):
        if sent := encoder.feed(SPEECH[start : start + 480]):
            assert seconds_of(decode(sent, audio_format)) > 0
            return
    pytest.fail("nothing left in time")


@pytest.mark.parametrize("audio_format", FORMATS)
def test_the_sound_is_the_speech(audio_format: Format) -> None:
    """The decoded sound correlates with the speech, from its beginning."""
    spoken = tone(1.0, hertz=150) + tone(0.4, hertz=800)
    heard = decode(encoded(spoken, audio_format), audio_format)
    assert likeness(waveform(heard), waveform(spoken)[:24_000]) > 0.95


def voice(samples: int) -> bytes:
    """A loud voice of two tones that sways, and stops within 5 ms."""
    time = np.arange(samples) / 24_000
    sound = (7_000 + 4_000 * np.sin(17 * time)) * np.sin(1_400 * time) + 2_500 * np.sin(10_900 * time)
    sound[-120:] *= np.sin(np.pi / 2 * np.arange(119.5, 0, -1) / 120) ** 2
    return sound.astype("<i2").tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("samples", [24_231, 24_900])
@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("audio_format", FORMATS)
def test_the_end_is_the_speech(audio_format: Format, samples: int, *, streaming: bool) -> None:
    """The last 300 ms are those of the speech, its last loud wave included, and the answer ends without a click."""
    spoken = voice(samples)
    heard = waveform(decode(encoded(spoken, audio_format, streaming=streaming), audio_format))
    wanted = waveform(spoken[-2 * 7_200 :])
    exact = audio_format in EXACT or (audio_format == "mp3" and not streaming)
    lead_in = 0 if exact else {"mp3": 913, "aac": 1_152 if streaming else 1_024}[audio_format]
    got = heard[lead_in + samples - 7_200 : lead_in + samples]
    short = wanted.size - got.size
    assert short <= 24
    wanted = wanted[: got.size]
    assert np.dot(got, wanted) / np.sqrt(np.dot(got, got) * np.dot(wanted, wanted)) > 0.99
    assert abs(heard[-1]) < 400
    assert heard.size - lead_in - samples <= (24 if exact else 1_024)


@pytest.mark.slow
@pytest.mark.parametrize("speed", [0.25, 0.4, 0.5, 1.5, 4.0])
def test_speed_keeps_the_pitch(speed: float) -> None:
    """Another speed does not change the frequency of a tone."""
    heard = encoded(tone(4.0, hertz=200, fade_s=0.01), "pcm", speed=speed)
    assert rising_zero_crossings(heard) / seconds_of(heard) == pytest.approx(200, rel=0.03)


def test_speed_works_while_streaming() -> None:
    """With another speed, the first bytes come within 0.4 s of speech."""
    encoder = Encoder("pcm", speed=0.5)
    assert len(encoder.feed(SPEECH[: bytes_for(0.4)])) > 0


@pytest.mark.parametrize("speed", [0.25, 0.77, 1.0, 3.1])
@pytest.mark.parametrize("milliseconds", [0, 1, 20, 100])
def test_tiny_answers_are_complete(milliseconds: int, speed: float) -> None:
    """Even a millisecond of speech has its exact length, at any speed."""
    pcm = tone(milliseconds / 1000)
    assert samples_of(encoded(pcm, "pcm", speed=speed)) == round(samples_of(pcm) / speed)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("audio_format", FORMATS)
def test_tiny_answers_decode(audio_format: Format, *, streaming: bool) -> None:
    """Answers of up to 100 ms can be decoded in each format and keep their length, even if they are silent."""
    for samples, sound in itertools.product((0, 1, 24, 480, 2400), (bytes(4800), tone(0.5))):
        heard = samples_of(decode(encoded(sound[: samples * 2], audio_format, streaming=streaming), audio_format))
        if audio_format in {"wav", "pcm"}:
            assert heard == samples
        elif samples >= 24:
            assert heard >= samples - (4 if audio_format == "opus" else 0)  # Opus is four samples short of so little


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("audio_format", FORMATS)
def test_cuts_do_not_matter(audio_format: Format, *, streaming: bool) -> None:
    """Pieces of any size give the same sound."""
    pcm = SPEECH[: bytes_for(0.3)]
    whole = encoded(pcm, audio_format, streaming=streaming, piece=len(pcm))
    assert decode(encoded(pcm, audio_format, streaming=streaming, piece=7), audio_format) == decode(whole, audio_format)


def test_pcm_is_untouched() -> None:
    """At speed 1, pcm is the speech itself, and FLAC decodes to it bit by bit."""
    assert encoded(SPEECH, "pcm") == SPEECH
    assert decode(encoded(SPEECH, "flac"), "flac") == SPEECH


def test_a_streamed_wav_has_unknown_sizes() -> None:
    """Both sizes in the header are 0xFFFFFFFF, and the header comes with the first sound."""
    first = Encoder("wav").feed(SPEECH[:4800])
    assert first[:4] == b"RIFF"
    assert first[8:16] == b"WAVEfmt "
    assert struct.unpack("<I", first[4:8]) == struct.unpack("<I", first[40:44]) == (0xFFFFFFFF,)
    assert first[44:] == SPEECH[:4800]


@pytest.mark.parametrize("rate", [8_000, 24_000, 48_000])
def test_readers_of_a_streamed_wav_find_what_came(tmp_path: Path, rate: int) -> None:
    """Python's wave, libsndfile and FFmpeg read every sample and no more, from memory and from a file."""
    encoder = Encoder("wav", sample_rate=rate)
    data = encoder.feed(SPEECH) + encoder.finish()
    pcm = data[44:]
    assert len(pcm) == 2 * samples_of(SPEECH) * rate // 24_000
    file = tmp_path / "streamed.wav"
    file.write_bytes(data)
    for source in (io.BytesIO(data), str(file)):
        with wave.open(source) as reader:  # type: ignore[call-overload]  # either kind is fine
            assert (reader.getframerate(), reader.getnchannels(), reader.getsampwidth()) == (rate, 1, 2)
            assert reader.readframes(reader.getnframes()) == pcm
    samples, found = soundfile.read(io.BytesIO(data), dtype="int16")
    assert (samples.tobytes(), found) == (pcm, rate)
    with av.open(io.BytesIO(data)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) == len(pcm) // 2


def test_a_whole_wav_has_its_true_sizes() -> None:
    """A reader other than FFmpeg finds 24 kHz, mono, 16 bit and all samples."""
    data = encoded(SPEECH, "wav", streaming=False)
    assert struct.unpack("<I", data[4:8]) == (len(data) - 8,)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert (file.samplerate, file.channels, file.subtype) == (24_000, 1, "PCM_16")
        assert file.frames == samples_of(SPEECH)


@pytest.mark.parametrize("audio_format", ["mp3", "opus", "flac"])
def test_whole_files_declare_their_length(audio_format: Format) -> None:
    """A reader other than FFmpeg finds the exact length of a whole answer."""
    data = encoded(SPEECH, audio_format, streaming=False)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert file.frames / file.samplerate == pytest.approx(seconds_of(SPEECH), abs=0.0005)


def test_whole_answers_come_at_the_end() -> None:
    """Without streaming, all bytes come at the end, when the sizes in the header are known."""
    for audio_format in FORMATS:
        encoder = Encoder(audio_format, streaming=False)
        assert encoder.feed(SPEECH) == b""
        assert encoder.finish()


@pytest.mark.parametrize("speed", [0.24, 4.01, 0.0, -1.0, float("nan"), float("inf")])
def test_impossible_speeds_are_refused(speed: float) -> None:
    """A speed out of range is an error at once."""
    with pytest.raises(ValueError, match="speed is between"):
        Encoder("mp3", speed=speed)


def test_unknown_formats_are_refused() -> None:
    """An unknown format is an error."""
    with pytest.raises(ValueError, match="no audio format 'wma'"):
        Encoder("wma")  # type: ignore[arg-type]  # the point of the test


def test_half_a_sample_is_an_error() -> None:
    """PCM that ends inside a sample was cut, so it is an error."""
    encoder = Encoder("pcm")
    encoder.feed(b"\0\0\0")
    with pytest.raises(ValueError, match="inside a sample"):
        encoder.finish()


def test_every_format_has_a_content_type() -> None:
    """The table of content types has each format, in the order of the contract."""
    assert list(CONTENT_TYPES) == list(SAMPLE_RATES) == [*FORMATS, "ogg", "ulaw", "alaw"]


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [150, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_encoders_leave_nothing_behind(rounds: int) -> None:
    """Memory does not grow with the number of encoded answers."""

    def use(times: int) -> int:
        for count in range(times):
            encoded(SPEECH[:9600], FORMATS[count % len(FORMATS)], speed=(1.0, 1.5)[count % 4 // 2])
        return resident_bytes()

    settled = use(100)
    assert use(rounds) - settled < 24 * 2**20


def test_dropped_encoders_leave_nothing_behind() -> None:
    """A dropped encoder, whose client disconnected, frees its 7 MB at once, not in a later garbage collection."""
    gc.collect()
    gc.disable()
    try:
        before = resident_bytes()
        for _ in range(20):
            Encoder("flac").feed(SPEECH[:9600])
        assert resident_bytes() - before < 40 * 2**20
    finally:
        gc.enable()
