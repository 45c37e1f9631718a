"""The caches of a web worker: the pronunciations of the service, and the store of finished audio.

`WebCaches` owns none of them. It gives their figures, and empties them when an admin says so.
The catalogue is the engine client's, which counts for itself.
"""

from pathlib import Path

import msgspec
import structlog

from server.audio import AudioStore
from server.engine import EngineClient
from server.text import PronunciationsError, check_pronunciations, load_pronunciations, reload_pronunciations
from shared.protocol import CacheCounts, CacheName, CacheStats

log = structlog.get_logger(__name__)


class WebCaches:
    """Figures of the caches of this web worker, and their emptying."""

    def __init__(self, pronunciations: Path | None, audio_store: AudioStore) -> None:
        self._path = pronunciations
        self._audio_store = audio_store
        self._words = self._count_words()

    def counts(self) -> dict[CacheName, CacheCounts]:
        """Hits and misses of the caches in this web worker."""
        words = load_pronunciations.cache_info()
        return {
            "pronunciations": CacheCounts(words.hits, words.misses),
            "stored_audio": CacheCounts(self._audio_store.hits, self._audio_store.misses),
        }

    async def list(self, engine: EngineClient, counts: dict[CacheName, CacheCounts]) -> list[CacheStats]:
        """The caches now, with the `counts` of all web workers."""

        def stats(name: CacheName, entries: int, n_bytes: int | None) -> CacheStats:
            count = counts.get(name, CacheCounts())
            return CacheStats(name=name, entries=entries, bytes=n_bytes, hits=count.hits, misses=count.misses)

        catalog = engine.catalog
        return [
            stats("catalog", len(catalog), len(msgspec.msgpack.encode(catalog))),
            stats("pronunciations", self._words, None),
            stats("stored_audio", *await self._audio_store.usage()),
        ]

    async def clear_stored_audio(self) -> None:
        """Drop all stored audio; all web workers share it."""
        await self._audio_store.clear()

    def check_pronunciations(self) -> None:
        """PronunciationsError if the file cannot be used now."""
        check_pronunciations(self._path)

    def use_pronunciations(self, path: Path | None) -> None:
        """Read the words of the service from this file, anew."""
        self._path = path
        self.on_emptied("pronunciations")

    def on_emptied(self, name: CacheName) -> None:
        """An admin has emptied a cache of all web workers."""
        if name != "pronunciations":
            return
        try:
            reload_pronunciations(self._path)
            self._words = self._count_words()
        except PronunciationsError as error:
            log.warning("pronunciations_kept", reason=str(error))

    def _count_words(self) -> int:
        return sum(table.count for table in load_pronunciations(self._path).values())
