"""FFmpeg's program decodes every format at every sample rate, from a whole file and from a pipe, without an error."""

import subprocess
from pathlib import Path

import pytest

from server.audio import SAMPLE_RATES
from shared.pcm import SAMPLE_RATE
from tests.recogniser import SENTENCES
from tests.system.service import Service

pytestmark = pytest.mark.clients

RAW = {"pcm": "s16le", "ulaw": "mulaw", "alaw": "alaw"}
"""Formats without a header: the listener has to know them, and their rate."""


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("audio_format", "rate"),
    [(audio_format, rate) for audio_format, rates in SAMPLE_RATES.items() for rate in rates],
)
def test_every_format_at_every_rate(
    espeak: Service, ffmpeg: str, tmp_path: Path, audio_format: str, rate: int, *, stream: bool
) -> None:
    """FFmpeg finds as much audio as was sent as pcm, within two of the format's packets."""
    pcm = espeak.speech(SENTENCES[0], response_format="pcm").content
    request = {"response_format": audio_format, "sample_rate": rate, "stream": stream}
    data = espeak.speech(SENTENCES[0], **request).content
    raw = ["-f", RAW[audio_format], "-ar", str(rate)] if audio_format in RAW else []
    file = tmp_path / "said"
    file.write_bytes(data)
    source, piped = ("pipe:0", data) if stream else (file, b"")
    command = [ffmpeg, "-v", "error", *raw, "-i", source, "-f", "s16le", "-ac", "1", "-ar", str(SAMPLE_RATE), "pipe:1"]
    done = subprocess.run(command, input=piped, capture_output=True, check=False)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    # espeak-ng's own length differs a little from run to run.
    assert len(done.stdout) / 2 / SAMPLE_RATE == pytest.approx(len(pcm) / 2 / SAMPLE_RATE, abs=2 * 1152 / rate + 0.02)
