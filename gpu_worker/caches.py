"""The caches of the whole service: those of the engines and of this process, and what the web workers count of theirs.

`Caches` owns no cache. It asks engines and the VoiceStore, adds what web workers report with their pings,
and tells web workers through the snapshot which of their caches to empty. Owned by the synthesis thread.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from gpu_worker.engines.base import Engine
from gpu_worker.voices import VoiceStore
from shared.protocol import MAX_COUNT, CacheCounts, CacheName, CacheStats

_OF_WEB_WORKERS: Final = {"catalog", "pronunciations", "stored_audio"}


class Caches:
    """Figures of all caches, and their emptying. `engines` gives those of the resident models, by model."""

    def __init__(self, engines: Callable[[], Mapping[str, Engine]], voices: VoiceStore) -> None:
        self._engines = engines
        self._voices = voices
        self._reported: dict[bytes, dict[CacheName, CacheCounts]] = {}  # by web worker
        self._emptied: Counter[CacheName] = Counter()

    def record(self, peer: bytes, counts: dict[CacheName, CacheCounts]) -> None:
        """The web worker `peer` has counted so much since it started."""
        if counts:
            self._reported[peer] = counts

    def forget(self, peer: bytes) -> None:
        """The web worker is gone."""
        self._reported.pop(peer, None)

    def list(self) -> list[CacheStats]:
        """The caches of engines and of this process."""
        of_engines = [
            msgspec.structs.replace(cache, model=model)
            for model, engine in self._engines().items()
            for cache in engine.stats().caches
        ]
        return [*of_engines, self._voices.cache_stats()]

    def web_counts(self) -> dict[CacheName, CacheCounts]:
        """The sums of what the web workers have counted."""
        hits: Counter[CacheName] = Counter()
        misses: Counter[CacheName] = Counter()
        for counts in self._reported.values():
            for name, count in counts.items():
                hits[name] += count.hits
                misses[name] += count.misses
        return {name: CacheCounts(min(hits[name], MAX_COUNT), min(misses[name], MAX_COUNT)) for name in hits}

    @property
    def emptied(self) -> dict[CacheName, int]:
        """How often each cache of the web workers was to be emptied."""
        return dict(self._emptied)

    def empty(self, name: CacheName) -> None:
        """Empty a cache, of all models if engines have it."""
        if name in _OF_WEB_WORKERS:
            self._emptied[name] += 1
        elif name == "recordings":
            self._voices.empty_cache()
        else:
            for engine in self._engines().values():
                engine.empty_cache(name)
