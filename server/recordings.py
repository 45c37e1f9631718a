"""A client's recording on its way to PCM: what form it came in, and decoding where it delays nobody."""

import asyncio
import base64
import binascii
from typing import Final

from server.errors import ApiError
from server.references import InvalidAudioError, decode_reference, fetch_reference
from shared.settings import Settings

MIN_SECONDS: Final = 1.0
MAX_SECONDS: Final = 60.0
"""What a recording to clone may last: less says too little about a voice, more is not listened to."""


async def pcm_of(data: bytes, param: str) -> bytes:
    """The recording as 24 kHz mono int16 little-endian; ApiError (`invalid_audio`) where it is none, about `param`."""
    try:
        return await asyncio.to_thread(decode_reference, data, max_seconds=MAX_SECONDS, min_seconds=MIN_SECONDS)
    except InvalidAudioError as error:
        raise ApiError("invalid_audio", f"{param}: {error}", param=param) from None


async def recording_in(ref_audio: str, settings: Settings) -> bytes:
    """`ref_audio` (a data URL, base64, or where settings allow it an http(s) URL) as PCM; ApiError where it is none."""
    if ref_audio[:8].lower().startswith(("http://", "https://")):
        if not settings.allow_ref_urls:
            raise ApiError("invalid_value", "ref_audio: URLs are not fetched here; send base64.", param="ref_audio")
        try:
            return await pcm_of(await asyncio.to_thread(fetch_reference, ref_audio), "ref_audio")
        except InvalidAudioError as error:
            raise ApiError("invalid_audio", f"ref_audio: {error}", param="ref_audio") from None
    return await pcm_of(await asyncio.to_thread(_bytes_in, ref_audio), "ref_audio")


def _bytes_in(ref_audio: str) -> bytes:
    """What a data URL or base64 holds. Takes 70 ms for 10 MiB, which is too long for the event loop."""
    encoded = ref_audio
    if ref_audio[:5].lower() == "data:":
        head, comma, encoded = ref_audio.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ApiError("invalid_audio", "ref_audio: a data URL must hold base64.", param="ref_audio")
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError("invalid_audio", "ref_audio: neither a data URL nor base64.", param="ref_audio") from None
