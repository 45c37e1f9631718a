"""Finished audio on disk, for a while: TTS_AUDIO_STORE_MB in all, TTS_AUDIO_STORE_TTL each.

Several processes share the folder. A file's name is its id, which is random and of the server's making.
A file begins with a line of JSON about the audio. Its modification time is when it was stored, its access time when it
was asked for last. Files are written under another name and renamed, under a lock that the kernel releases
when a process dies: what lies there under such a name while the lock is held is a left-over.
"""

import asyncio
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final, Self

import msgspec
import structlog

log = structlog.get_logger(__name__)

SWEEP_S: Final = 60.0
"""Seconds between two searches for expired files."""

BLOCK_BYTES: Final = 4096
"""A file takes whole blocks of a disk: without that, small files would have no bound on their number."""

_ID: Final = re.compile(r"[0-9a-f]{32}")
_PARTIAL: Final = ".part"
_LOCK: Final = ".lock"
_PIECE_BYTES: Final = 256 * 1024
_LONGEST_HEAD: Final = 200


class AudioFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about stored audio that a player needs. `designed`: a voice-design model made its voice."""

    media_type: str
    sample_rate: int
    designed: bool = False


class StoredAudio:
    """Stored audio, open for reading. It stays readable when the store drops it meanwhile. `close` it."""

    def __init__(self, file: BinaryIO, facts: AudioFacts, *, stored_at: float, expires_in_s: float) -> None:
        self._file = file
        self._start = file.tell()
        self.facts = facts
        self.size = os.fstat(file.fileno()).st_size - self._start
        self.stored_at = stored_at
        self.expires_in_s = expires_in_s

    async def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`, and no more than one piece of 256 KiB."""
        wanted = min(length, _PIECE_BYTES)
        return await asyncio.to_thread(os.pread, self._file.fileno(), wanted, self._start + offset)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class AudioStore:
    """The store in `folder`, an async context manager: it drops expired files while it is open.

    `wall` gives Unix seconds. With `max_bytes` 0 nothing can be stored.
    """

    _sweeping: asyncio.Task[None]

    def __init__(self, folder: Path, *, max_bytes: int, ttl_s: float, wall: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._wall = wall
        self.hits = self.misses = 0
        """How often this process found what it was asked for, and how often not."""

    def limit(self, *, max_bytes: int, ttl_s: float) -> None:
        """Keep so much from now on: with less room, until the next audio is stored."""
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s

    async def __aenter__(self) -> Self:
        self._sweeping = asyncio.create_task(self._sweep_forever())
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._sweeping.cancel()
        await asyncio.gather(self._sweeping, return_exceptions=True)

    async def put(self, audio_id: str, audio: bytes, facts: AudioFacts, *, request_id: str = "") -> bool:
        """Store `audio`, and drop what was not asked for the longest if there is no room. False, and a log line with
        `request_id`, if it cannot be stored. `audio_id` is 32 hexadecimal digits.
        """
        if not _ID.fullmatch(audio_id):
            raise ValueError("an id of stored audio has 32 hexadecimal digits")
        try:
            await asyncio.to_thread(self._put, audio_id, msgspec.json.encode(facts) + b"\n", audio)
        except (OSError, _TooLargeError) as error:
            log.warning("audio_not_stored", request_id=request_id, reason=str(error))
            return False
        return True

    async def open(self, audio_id: str) -> StoredAudio | None:
        """The audio with that id; None if it is not there, or not any more."""
        if not _ID.fullmatch(audio_id):
            return None
        audio = await asyncio.to_thread(self._open, audio_id)
        if audio is None:
            self.misses += 1
        else:
            self.hits += 1
        return audio

    async def usage(self) -> tuple[int, int]:
        """How many files there are, expired ones included, and their bytes on the disk."""
        return await asyncio.to_thread(self._usage)

    async def clear(self) -> None:
        """Drop all audio."""
        await asyncio.to_thread(self._clear)

    async def _sweep_forever(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._sweep)
            except OSError as error:
                log.warning("audio_store_not_swept", reason=str(error))
            await asyncio.sleep(min(SWEEP_S, self._ttl_s))

    def _put(self, audio_id: str, head: bytes, audio: bytes) -> None:
        size = len(head) + len(audio)
        if _on_disk(size) > self._max_bytes:
            raise _TooLargeError(f"{size} bytes are more than the store may hold")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = self._folder / (audio_id + _PARTIAL)
        with self._locked():
            self._make_room(size)
            try:
                with open(scratch, "xb", opener=_private) as file:
                    file.write(head)
                    file.write(audio)
                now = self._wall()
                os.utime(scratch, (now, now))
                scratch.replace(self._folder / audio_id)
            except OSError:
                scratch.unlink(missing_ok=True)
                raise

    def _open(self, audio_id: str) -> StoredAudio | None:
        try:
            file = (self._folder / audio_id).open("rb")
        except FileNotFoundError:
            return None
        now, stored_at = self._wall(), os.fstat(file.fileno()).st_mtime
        left_s = stored_at + self._ttl_s - now
        if left_s <= 0:
            file.close()
            return None
        try:
            os.utime(file.fileno(), (now, stored_at))
            facts = msgspec.json.decode(file.readline(_LONGEST_HEAD), type=AudioFacts)
        except msgspec.DecodeError as error:  # a power cut may leave an empty file
            file.close()
            log.warning("stored_audio_dropped", reason=str(error))
            (self._folder / audio_id).unlink(missing_ok=True)
            return None
        except BaseException:
            file.close()
            raise
        return StoredAudio(file, facts, stored_at=stored_at, expires_in_s=left_s)

    def _usage(self) -> tuple[int, int]:
        sizes = []
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if _ID.fullmatch(path.name):
                with suppress(FileNotFoundError):  # dropped a moment ago
                    sizes.append(_on_disk(path.stat().st_size))
        return len(sizes), sum(sizes)

    def _clear(self) -> None:
        if not self._folder.is_dir():
            return
        with self._locked():
            for path in self._folder.iterdir():
                if _ID.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        if self._folder.is_dir():
            with self._locked():
                self._make_room(0)

    def _make_room(self, size: int) -> None:
        """Drop left-overs and expired files, then the least recent ones until `size` bytes fit. Holds the lock."""
        kept: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            if path.name.endswith(_PARTIAL) and _ID.fullmatch(path.name.removesuffix(_PARTIAL)):
                path.unlink(missing_ok=True)
            elif _ID.fullmatch(path.name):
                status = path.stat()
                # A file of the future was stored before the clock was set back.
                if abs(self._wall() - status.st_mtime) >= self._ttl_s:
                    path.unlink(missing_ok=True)
                else:
                    kept.append((status.st_atime, _on_disk(status.st_size), path))
        kept.sort(reverse=True)
        total = sum(n_bytes for _, n_bytes, _ in kept) + (_on_disk(size) if size else 0)
        while kept and total > self._max_bytes:
            _, n_bytes, path = kept.pop()
            path.unlink(missing_ok=True)
            total -= n_bytes

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder, among threads and processes."""
        with open(self._folder / _LOCK, "wb", opener=_private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class _TooLargeError(Exception):
    pass


def _on_disk(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)
