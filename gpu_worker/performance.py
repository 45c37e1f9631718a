"""The last hour by model: time to first audio, real-time factor, queue wait, underruns and batch sizes.

`Performance` keeps fixed histograms in rings of time slots, so its memory does not grow with the number of requests:
a quarter of a megabyte for each model that spoke within the hour. Owned by the synthesis thread.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.performance import BOUNDS, window_of
from shared.protocol import PERFORMANCE_MINUTES, PLAYER_BUFFERS_S, WindowCounts, WindowPerformance

_BUCKETS: Final = len(BOUNDS) + 1
_MAX_BATCH: Final = 256
"""Larger batches count as this size; an engine has 128 slots at most."""

_FIRST_AUDIO: Final = 0
_REAL_TIME_FACTOR: Final = _BUCKETS
_QUEUE_WAIT: Final = 2 * _BUCKETS
_BATCH: Final = 3 * _BUCKETS
_STREAMS: Final = _BATCH + _MAX_BATCH + 1
_UNDERRUNS: Final = _STREAMS + 1
_COLUMNS: Final = _UNDERRUNS + len(PLAYER_BUFFERS_S)
"""The columns of a ring: three histograms, the batch sizes from 0 on, complete streams, underruns by player buffer."""

_SHORT_SLOT_S: Final = 10.0
_LONG_SLOT_S: Final = 60.0
_MAX_AGE_S: Final = 1.0
"""How long one report is used: each answer to a ping has it."""

Counts = NDArray[np.uint32]


class _Ring:
    """Counts by column in the latest `slots` slots of `slot_s` seconds."""

    def __init__(self, slots: int, slot_s: float, now: float) -> None:
        self._counts: Counts = np.zeros((slots, _COLUMNS), dtype=np.uint32)
        self._slot_s = slot_s
        self._latest = int(now // slot_s)

    def add(self, column: int, count: int, now: float) -> None:
        self._advance(now)
        self._counts[self._latest % len(self._counts), column] += count

    def sum(self, slots: int, now: float) -> Counts:
        """The sums of the latest `slots` slots; the last one is not over yet."""
        self._advance(now)
        first, end = (self._latest - slots + 1) % len(self._counts), self._latest % len(self._counts) + 1
        parts = [self._counts[first:end]] if first < end else [self._counts[first:], self._counts[:end]]
        sums: Counts = sum(part.sum(axis=0, dtype=np.uint32) for part in parts)
        return sums

    def _advance(self, now: float) -> None:
        slot = int(now // self._slot_s)
        for passed in range(min(slot - self._latest, len(self._counts))):
            self._counts[(slot - passed) % len(self._counts)] = 0
        self._latest = max(self._latest, slot)


class _Rings:
    """The rings of one model: slots of 10 s for the window of a minute, slots of a minute for the longer ones."""

    def __init__(self, now: float) -> None:
        self._short = _Ring(1 + int(60 / _SHORT_SLOT_S), _SHORT_SLOT_S, now)
        self._long = _Ring(1 + PERFORMANCE_MINUTES[-1], _LONG_SLOT_S, now)

    def add(self, column: int, now: float, count: int = 1) -> None:
        self._short.add(column, count, now)
        self._long.add(column, count, now)

    def sum(self, minutes: int, now: float) -> Counts:
        """The sums of the slot that is not over yet, and of `minutes` before it."""
        if minutes == 1:
            return self._short.sum(1 + int(60 / _SHORT_SLOT_S), now)
        return self._long.sum(1 + minutes, now)


class Performance:
    """Records what happens to requests, and reports percentiles over the last 1, 15 and 60 minutes.

    A window also has the time slot that is not over yet: up to 10 s more for 1 minute, up to a minute for the others.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rings: dict[str, _Rings] = {}
        self._counts: dict[str, list[WindowCounts]] = {}
        self._report: dict[str, list[WindowPerformance]] = {}
        self._reported_at = -math.inf

    def first_audio(self, model: str, seconds: float) -> None:
        """Record the time to first audio of a request."""
        self._add(model, _FIRST_AUDIO + bisect_left(BOUNDS, seconds))

    def queue_wait(self, model: str, seconds: float) -> None:
        """Record how long a request waited for its slot, the load of its model included."""
        self._add(model, _QUEUE_WAIT + bisect_left(BOUNDS, seconds))

    def speech_made(self, model: str, real_time_factor: float | None, underrun_s: float) -> None:
        """Record a complete stream. `underrun_s` is that of a player without a buffer.

        A player that starts later by its buffer has that much less underrun: both play at the same speed,
        and the latest piece of audio decides.
        """
        if real_time_factor is not None:
            self._add(model, _REAL_TIME_FACTOR + bisect_left(BOUNDS, real_time_factor))
        self._add(model, _STREAMS)
        for index, buffer_s in enumerate(PLAYER_BUFFERS_S):
            if underrun_s > buffer_s:
                self._add(model, _UNDERRUNS + index)

    def batches(self, model: str, size: int, count: int) -> None:
        """Record `count` frames that `size` jobs shared."""
        self._add(model, _BATCH + min(size, _MAX_BATCH), count)

    def report(self) -> dict[str, list[WindowPerformance]]:
        """The windows of each model that did something in the longest of them; at most _MAX_AGE_S old."""
        now = self._clock()
        if now - self._reported_at >= _MAX_AGE_S:
            self._reported_at = now
            sums = {
                model: [rings.sum(minutes, now) for minutes in PERFORMANCE_MINUTES]
                for model, rings in self._rings.items()
            }
            for model in [model for model, windows in sums.items() if not windows[-1].any()]:
                del self._rings[model], sums[model]
            self._counts = {
                model: [_window(minutes, counts) for minutes, counts in zip(PERFORMANCE_MINUTES, windows, strict=True)]
                for model, windows in sums.items()
            }
            self._report = {model: [window_of(window) for window in windows] for model, windows in self._counts.items()}
        return self._report

    def counts(self) -> dict[str, list[WindowCounts]]:
        """The counts from which the latest call of `report` was computed."""
        return self._counts

    def _add(self, model: str, column: int, count: int = 1) -> None:
        now = self._clock()
        if model not in self._rings:
            self._rings[model] = _Rings(now)
        self._rings[model].add(column, now, count)


def _window(minutes: int, counts: Counts) -> WindowCounts:
    return WindowCounts(
        minutes=minutes,
        first_audio=_buckets(counts[_FIRST_AUDIO:_REAL_TIME_FACTOR]),
        real_time_factor=_buckets(counts[_REAL_TIME_FACTOR:_QUEUE_WAIT]),
        queue_wait=_buckets(counts[_QUEUE_WAIT:_BATCH]),
        batch_size=_buckets(counts[_BATCH:_STREAMS]),
        streams=int(counts[_STREAMS]),
        underruns=counts[_UNDERRUNS:].tolist(),
    )


def _buckets(counts: Counts) -> dict[int, int]:
    used = counts.nonzero()[0]
    return dict(zip(used.tolist(), counts[used].tolist(), strict=True))
