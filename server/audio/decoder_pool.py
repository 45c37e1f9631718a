"""A client's recording on its way to PCM: what form it came in, and decoding where it can harm nobody.

It owns the decoding processes: how many there are, how long they may take, and that none outlives its request.
What they do is decoding.py's.
"""

import asyncio
import base64
import binascii
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import structlog

from server.audio.decoder import MAX_REFERENCE_BYTES, REFUSED, InvalidAudioError
from server.audio.fetching import fetch_reference
from server.http.errors import ApiError

MIN_SECONDS: Final = 1.0
MAX_SECONDS: Final = 60.0
"""What a recording to clone may last: less says too little about a voice, more is not listened to."""

DECODER: Final = (sys.executable, "-m", "server.audio.decoder")
AT_ONCE: Final = 2
"""Decoding processes of one web process: a minute of speech takes 0.2 s, and each may take memory to its limit."""
MAX_WAITING: Final = 16
"""Recordings that are fetched or wait for their turn, 10 MiB each at most; further ones are refused."""
DECODE_TIMEOUT_S: Final = 30.0
"""Only a machine with far too much to do gets here: processor time has a lower limit."""
_RETRY_AFTER_S: Final = 5.0

_log = structlog.stdlib.get_logger(__name__)


class DecoderPool:
    """Decodes the recordings that one web process is sent, a few at a time."""

    def __init__(
        self,
        *,
        allow_urls: bool,
        fetch: Callable[[str], Awaitable[bytes]] = fetch_reference,
        command: Sequence[str] = DECODER,
        timeout_s: float = DECODE_TIMEOUT_S,
    ) -> None:
        """`allow_urls`: whether a recording may be named by an http(s) URL. The others are there for tests."""
        self._allow_urls = allow_urls
        self._fetch = fetch
        self._command = [*command, str(MIN_SECONDS), str(MAX_SECONDS)]
        self._timeout_s = timeout_s
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._present = 0

    async def pcm_of(self, data: bytes, param: str) -> bytes:
        """The recording `data`, which came as the field `param`, as 24 kHz mono int16 little-endian.

        Raises ApiError: `invalid_audio` where it is no recording, `queue_full` where there are too many already.
        """
        with self._place(param):
            return await self._in_turn(data, param)

    async def pcm_in(self, ref_audio: str) -> bytes:
        """`ref_audio` (a data URL, base64, or where that is allowed an http(s) URL) as PCM; raises as `pcm_of`."""
        is_url = ref_audio[:8].lower().startswith(("http://", "https://"))
        if is_url and not self._allow_urls:
            raise ApiError("invalid_value", "ref_audio: URLs are not fetched here; send base64.", param="ref_audio")
        with self._place("ref_audio"):
            try:
                data = await (self._fetch(ref_audio) if is_url else asyncio.to_thread(_bytes_in, ref_audio))
            except InvalidAudioError as error:
                raise _invalid("ref_audio", str(error)) from None
            return await self._in_turn(data, "ref_audio")

    @contextmanager
    def _place(self, param: str) -> Iterator[None]:
        """A place for one recording from its first byte to its PCM; ApiError (`queue_full`) where all are taken."""
        if self._present >= AT_ONCE + MAX_WAITING:
            raise _busy(f"{param}: too many recordings wait to be decoded; try again.")
        self._present += 1
        try:
            yield
        finally:
            self._present -= 1

    async def _in_turn(self, data: bytes, param: str) -> bytes:
        if len(data) > MAX_REFERENCE_BYTES:
            raise _invalid(param, f"the recording is larger than {MAX_REFERENCE_BYTES // 2**20} MiB")
        async with self._turn:
            return await self._decoded(data, param)

    async def _decoded(self, data: bytes, param: str) -> bytes:
        """What the decoding process says of `data`; it is gone when this returns, raises or is cancelled."""
        # What decodes strangers' files has no use for this server's keys.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TTS_")}
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ
            )
        except OSError as error:
            _log.error("no process to decode a recording in", reason=str(error))
            raise _busy(f"{param}: no recording can be decoded just now; try again.") from error
        try:
            async with asyncio.timeout(self._timeout_s):
                output, _ = await process.communicate(data)
        except TimeoutError:
            raise _busy(f"{param}: this server has too much to do to decode the recording; try again.") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == REFUSED:
            raise _invalid(param, output.decode())
        if process.returncode != 0:
            # Killed at a limit or by a decoder's fault, or (1) by an error of Python's, which it has printed.
            _log.warning("a recording ended its decoding", exit_code=process.returncode, bytes=len(data))
            raise _invalid(param, "the recording is damaged and cannot be decoded")
        return output


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


def _invalid(param: str, reason: str) -> ApiError:
    return ApiError("invalid_audio", f"{param}: {reason}", param=param)


def _busy(message: str) -> ApiError:
    return ApiError("queue_full", message, retry_after_s=_RETRY_AFTER_S)
