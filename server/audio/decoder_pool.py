"""A client's recording becomes PCM: an upload, base64, a data URL or an http(s) URL, decoded in one of a few processes.

`DecoderPool` owns the decoding processes: their number, their time, and that none outlives its request.
decoder.py is the program that they run.
"""

import asyncio
import base64
import binascii
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import structlog

from server.audio.decoder import MAX_REFERENCE_BYTES, REFUSED
from server.audio.fetching import fetch_reference
from server.audio.file_kinds import InvalidAudioError
from server.http.errors import ApiError
from shared.protocol import LimitName

DECODER: Final = (sys.executable, "-m", "server.audio.decoder")
MAX_PROCESSES: Final = 2
"""Decoding processes of one web worker: a minute of speech takes 0.2 s, and each may use memory up to its limit."""

MAX_WAITING: Final = 16
"""Recordings that are fetched or wait for a process, 10 MiB each at most; further ones are refused."""

DECODE_TIMEOUT_S: Final = 30.0
"""Only an overloaded machine reaches this: the limit of processor time is lower."""

_RETRY_AFTER_S: Final = 5.0

log = structlog.get_logger(__name__)


class DecoderPool:
    """Decodes the recordings that one web worker receives, a few at a time."""

    def __init__(
        self,
        *,
        allow_urls: bool,
        fetch: Callable[[str], Awaitable[bytes]] = fetch_reference,
        command: Sequence[str] = DECODER,
        timeout_s: float = DECODE_TIMEOUT_S,
        limit_hits: Counter[LimitName] | None = None,
    ) -> None:
        """`allow_urls`: a recording may be an http(s) URL. `limit_hits` counts refusals. The others are for tests."""
        self.allow_urls = allow_urls
        self._fetch = fetch
        self._command = command
        self._timeout_s = timeout_s
        self._processes = asyncio.Semaphore(MAX_PROCESSES)
        self._limit_hits = Counter() if limit_hits is None else limit_hits
        self._in_progress = 0

    async def decode(self, data: bytes, param: str) -> bytes:
        """The PCM (24 kHz mono int16 little-endian) of a recording, which came in the request field `param`.

        Raises ApiError: `invalid_audio` if it is not a usable recording, `queue_full` if too many are in progress.
        """
        with self._admit(param):
            return await self._decode(data, param)

    async def decode_ref_audio(self, ref_audio: str) -> bytes:
        """The PCM of `ref_audio`: a data URL, base64 or, with `allow_urls`, an http(s) URL. Raises as `decode` does."""
        is_url = ref_audio[:8].lower().startswith(("http://", "https://"))
        if is_url and not self.allow_urls:
            message = "ref_audio: URLs are not fetched here (TTS_ALLOW_REF_URLS); send the recording in base64."
            raise ApiError("invalid_value", message, param="ref_audio")
        with self._admit("ref_audio"):
            try:
                data = await (self._fetch(ref_audio) if is_url else asyncio.to_thread(_decode_base64, ref_audio))
            except InvalidAudioError as error:
                raise _invalid("ref_audio", str(error)) from None
            return await self._decode(data, "ref_audio")

    @contextmanager
    def _admit(self, param: str) -> Iterator[None]:
        """Count one recording from its first byte to its PCM; ApiError (`queue_full`) if too many are in progress."""
        if self._in_progress >= MAX_PROCESSES + MAX_WAITING:
            self._limit_hits["recordings"] += 1
            raise _busy(f"{param}: too many recordings wait to be decoded; try again.")
        self._in_progress += 1
        try:
            yield
        finally:
            self._in_progress -= 1

    async def _decode(self, data: bytes, param: str) -> bytes:
        if len(data) > MAX_REFERENCE_BYTES:
            raise _invalid(param, f"the recording is larger than {MAX_REFERENCE_BYTES // 2**20} MiB")
        async with self._processes:
            return await self._run_decoder(data, param)

    async def _run_decoder(self, data: bytes, param: str) -> bytes:
        """Decode `data` in a process, which has ended when this returns, raises or is cancelled."""
        # A process that decodes strangers' files must not have this server's keys.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TTS_")}
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ
            )
        except OSError as error:
            log.error("decoder_not_started", reason=str(error))  # noqa: TRY400 -- no traceback helps
            raise _busy(f"{param}: no recording can be decoded just now; try again.") from error
        try:
            async with asyncio.timeout(self._timeout_s):
                output, _ = await process.communicate(data)
        except TimeoutError:
            raise _busy(f"{param}: the server is too busy to decode the recording; try again.") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == REFUSED:
            raise _invalid(param, output.decode())
        if process.returncode != 0:
            # A limit or a fault in a codec killed the process, or an error of Python's, which it has printed (1).
            log.warning("decoder_died", exit_code=process.returncode, bytes=len(data))
            raise _invalid(param, "the recording is damaged and cannot be decoded")
        return output


def _decode_base64(ref_audio: str) -> bytes:
    """The bytes of a data URL or of base64. 10 MiB take 70 ms, which is too long for the event loop."""
    encoded = ref_audio
    if ref_audio[:5].lower() == "data:":
        head, comma, encoded = ref_audio.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ApiError("invalid_audio", "ref_audio: a data URL must hold base64.", param="ref_audio")
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        message = "ref_audio: neither a data URL nor base64; send the recording itself, not its path."
        raise ApiError("invalid_audio", message, param="ref_audio") from None


def _invalid(param: str, reason: str) -> ApiError:
    return ApiError("invalid_audio", f"{param}: {reason}", param=param)


def _busy(message: str) -> ApiError:
    return ApiError("queue_full", message, retry_after_s=_RETRY_AFTER_S)
