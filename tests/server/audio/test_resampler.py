"""Sample rates: each format at each of its rates has the rate, the length and the sound; cuts do not matter."""

import io
import math
import struct

import av
import numpy as np
import pytest
import soundfile

from server.audio.encoder import Encoder
from server.audio.formats import SAMPLE_RATES, Format
from shared.pcm import SAMPLE_RATE, bytes_for, seconds_of
from tests.audio import Samples, likeness, tone, waveform

SPEECH = tone(1.2, hertz=440)
PAIRS = [(audio_format, rate) for audio_format, rates in SAMPLE_RATES.items() for rate in rates]
WHOLE_RATES = {8_000, 24_000, 44_100, 48_000}
"""One of each version of MPEG, and one that is no multiple of 8 kHz."""
OTHER_RATES = [rate for rate in SAMPLE_RATES["pcm"] if rate != SAMPLE_RATE]
RAW = {"pcm": "PCM_16", "ulaw": "ULAW", "alaw": "ALAW"}


def encoded(
    pcm: bytes, audio_format: Format, rate: int, *, streaming: bool, piece: int = 3840, speed: float = 1
) -> bytes:
    """`pcm` through an Encoder, in pieces."""
    encoder = Encoder(audio_format, sample_rate=rate, streaming=streaming, speed=speed)
    parts = [encoder.feed(pcm[start : start + piece]) for start in range(0, len(pcm), piece)]
    return b"".join([*parts, encoder.finish()])


def heard(data: bytes, audio_format: Format, rate: int) -> tuple[Samples, int]:
    """The samples in `data` and their rate: by libsndfile, which knows neither AAC nor FLAC of an unknown length."""
    if audio_format in {"aac", "flac"}:
        with av.open(io.BytesIO(data), "r", format=audio_format) as container:
            frames = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
            return np.concatenate(frames).astype(np.float64), container.streams.audio[0].rate
    if audio_format in RAW:
        options = {"samplerate": rate, "channels": 1, "format": "RAW", "endian": "LITTLE"}
        return soundfile.read(io.BytesIO(data), subtype=RAW[audio_format], **options)
    samples, found = soundfile.read(io.BytesIO(data))
    return samples, found


def hertz_of(samples: Samples, rate: int) -> float:
    """The frequency of the tone in the middle of `samples`."""
    middle = samples[round(0.3 * rate) : round(0.8 * rate)]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(middle.size), 1 << 17))
    return float(spectrum.argmax()) * rate / (1 << 17)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("audio_format", "rate", "streaming"),
    [*((*pair, True) for pair in PAIRS), *((*pair, False) for pair in PAIRS if pair[1] in WHOLE_RATES)],
)
def test_every_format_at_every_rate(audio_format: Format, rate: int, *, streaming: bool) -> None:
    """Another program finds the rate, the length, the pitch and the last 300 ms; a whole file is exact but for AAC."""
    samples, found = heard(encoded(SPEECH, audio_format, rate, streaming=streaming), audio_format, rate)
    pcm = waveform(encoded(SPEECH, "pcm", rate, streaming=True))
    end = pcm[: -round(0.3 * rate) : -1]
    assert likeness(samples[::-1], end, shift=round(0.2 * rate)) > 0.97
    assert found == rate
    assert hertz_of(samples, found) == pytest.approx(440, abs=1)
    surplus_s = samples.size / found - seconds_of(SPEECH)
    if audio_format == "aac" or (audio_format == "mp3" and streaming):
        packet_s = {"mp3": 576 if rate < 32_000 else 1152, "aac": 1024}[audio_format] / rate
        assert -0.5 * packet_s <= surplus_s <= 2.5 * packet_s
    else:
        assert abs(surplus_s) <= 1 / found


@pytest.mark.parametrize("rate", OTHER_RATES)
@pytest.mark.parametrize("speed", [1.0, 1.5])
def test_streamed_and_whole_pcm_are_equal(rate: int, speed: float) -> None:
    """However the speech is cut, every sample is the same; loud noise would show a dither."""
    pcm = np.random.default_rng(1).integers(-32_768, 32_767, 4_801, "<i2").tobytes()
    whole = encoded(pcm, "pcm", rate, streaming=False, piece=len(pcm), speed=speed)
    assert len(whole) == pytest.approx(len(pcm) / SAMPLE_RATE * rate / speed, abs=2)
    for piece in (3840, 1000, 337):
        assert encoded(pcm, "pcm", rate, streaming=True, piece=piece, speed=speed) == whole


@pytest.mark.parametrize("rate", OTHER_RATES)
def test_the_wave_is_the_same_wave(rate: int) -> None:
    """Sample for sample it is the tone that the other rate would have recorded: 60 dB above the error, undelayed."""
    pcm = encoded(tone(0.5, hertz=700, fade_s=0.001), "pcm", rate, streaming=True)
    got = np.frombuffer(pcm, "<i2")
    wanted = 9_000 * np.sin(2 * math.pi * 700 * np.arange(got.size) / rate)
    middle = slice(round(0.1 * rate), round(0.4 * rate))
    error = got[middle] - wanted[middle]
    assert np.sqrt(np.mean(error**2)) < 9_000 / math.sqrt(2) / 1_000


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000])
def test_nothing_above_half_the_rate_folds_back(rate: int) -> None:
    """A tone that the rate cannot hold is gone, and does not come back as another one."""
    pcm = encoded(tone(0.5, hertz=rate * 0.6, fade_s=0.1), "pcm", rate, streaming=True)
    assert np.abs(np.frombuffer(pcm, "<i2")[rate // 20 : -rate // 20].astype(int)).max() < 10


def test_loud_speech_does_not_wrap_around() -> None:
    """A sample that overshoots full scale after resampling is clipped: a square wave keeps its sign."""
    square = np.where(np.arange(4_800) // 60 % 2 == 0, 32_767, -32_768).astype("<i2")
    got = np.frombuffer(encoded(square.tobytes(), "pcm", 48_000, streaming=True), "<i2")
    halves = got.reshape(-1, 120)[:, 30:90].astype(int)
    assert (np.sign(halves[0::2]) > 0).all()
    assert (np.sign(halves[1::2]) < 0).all()


@pytest.mark.parametrize("rate", SAMPLE_RATES["pcm"])
@pytest.mark.parametrize("audio_format", ["pcm", "wav", "flac", "opus"])
def test_the_first_sound_comes_soon(audio_format: Format, rate: int) -> None:
    """The bytes of the first 100 ms of speech can be decoded at every rate."""
    if rate not in SAMPLE_RATES[audio_format]:
        rate = 48_000
    samples, found = heard(Encoder(audio_format, sample_rate=rate).feed(SPEECH[: bytes_for(0.1)]), audio_format, rate)
    assert samples.size / found > 0.005


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("audio_format", ["mp3", "aac"])
def test_a_tenth_of_a_second_of_silence_stays(audio_format: Format, *, streaming: bool) -> None:
    """Packets of silence that are left out do not make it shorter at any rate: players refuse what is too short."""
    for rate in SAMPLE_RATES[audio_format]:
        sent = encoded(bytes(bytes_for(0.1)), audio_format, rate, streaming=streaming)
        samples, found = heard(sent, audio_format, rate)
        assert samples.size >= 0.1 * found


@pytest.mark.parametrize("rate", OTHER_RATES)
def test_pieces_are_whole_samples(rate: int) -> None:
    """A client that plays each piece as it comes never meets half a sample."""
    encoder = Encoder("pcm", sample_rate=rate)
    pieces = [encoder.feed(SPEECH[start : start + 1_001]) for start in range(0, 30_030, 1_001)]
    assert all(len(piece) % 2 == 0 for piece in pieces)


@pytest.mark.parametrize(("audio_format", "expand"), [("ulaw", 0), ("alaw", 1)])
def test_g711_is_the_standards(audio_format: Format, expand: int) -> None:
    """Each byte is the code of G.711 for its sample, by the formulas of the standard."""

    def ulaw(code: int) -> int:
        code ^= 0xFF
        magnitude = (((code & 0x0F) << 3) + 0x84) << (code >> 4 & 7)
        return 0x84 - magnitude if code & 0x80 else magnitude - 0x84

    def alaw(code: int) -> int:
        code ^= 0x55
        exponent = code >> 4 & 7
        magnitude = (code & 0x0F) << 4 | 8
        if exponent:
            magnitude = (magnitude | 0x100) << (exponent - 1)
        return magnitude if code & 0x80 else -magnitude

    table = np.array([(ulaw, alaw)[expand](code) for code in range(256)])
    data = encoded(SPEECH, audio_format, 8_000, streaming=True)
    samples = np.frombuffer(encoded(SPEECH, "pcm", 8_000, streaming=True), "<i2").astype(int)
    assert len(data) == samples.size
    assert np.abs(table[list(data)] - samples).max() <= 2 + np.abs(samples).max() // 32
    assert np.abs(table[list(data)] - samples)[np.abs(samples) < 100].max() <= 16


@pytest.mark.parametrize("audio_format", ["ulaw", "alaw"])
def test_telephone_formats_need_no_rate(audio_format: Format) -> None:
    """G.711 has 8 kHz without being asked, and streamed and whole are equal."""
    encoder = Encoder(audio_format)
    assert encoder.sample_rate == 8_000
    assert encoder.feed(SPEECH) + encoder.finish() == encoded(SPEECH, audio_format, 8_000, streaming=False)


def test_ogg_is_opus() -> None:
    """`ogg` is another name of opus."""
    opus = heard(encoded(SPEECH, "opus", 24_000, streaming=True), "opus", 24_000)[0]
    assert np.array_equal(opus, heard(encoded(SPEECH, "ogg", 24_000, streaming=True), "ogg", 24_000)[0])


@pytest.mark.parametrize(("audio_format", "rate"), [("opus", 44_100), ("ulaw", 24_000), ("pcm", 96_000), ("mp3", 1)])
def test_other_rates_are_refused(audio_format: Format, rate: int) -> None:
    """A rate that the format cannot have is an error at once."""
    with pytest.raises(ValueError, match=f"no sample rate {rate}"):
        Encoder(audio_format, sample_rate=rate)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("rate", [8_000, 44_100])
@pytest.mark.parametrize("samples", [0, 1, 24, 480])
def test_tiny_answers_are_complete(rate: int, samples: int, *, streaming: bool) -> None:
    """Even a sample of speech becomes its share of samples, and a WAV says so."""
    wav = encoded(tone(0.5)[: 2 * samples], "wav", rate, streaming=streaming)
    assert abs((len(wav) - 44) // 2 - samples * rate / SAMPLE_RATE) <= 0.5
    assert struct.unpack_from("<I", wav, 24) == (rate,)
