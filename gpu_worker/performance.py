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

from shared.protocol import PERFORMANCE_MINUTES, PLAYER_BUFFERS_S, Distribution, WindowPerformance

_PER_DECADE: Final = 32
_DECADES: Final = 6
_BOUNDS: Final = [1e-3 * 10 ** (step / _PER_DECADE) for step in range(_DECADES * _PER_DECADE + 1)]
"""Upper bounds of the buckets for seconds and factors: 1 ms to 1,000 s, each 7.5 % above the one before.

Smaller values count as 1 ms, larger ones as 1,000 s. A percentile is off by 7.5 % at most.
"""

_BUCKETS: Final = len(_BOUNDS) + 1
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

_SHARES: Final = (0.5, 0.95, 0.99)

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
        self._report: dict[str, list[WindowPerformance]] = {}
        self._reported_at = -math.inf

    def first_audio(self, model: str, seconds: float) -> None:
        """Record the time to first audio of a request."""
        self._add(model, _FIRST_AUDIO + bisect_left(_BOUNDS, seconds))

    def queue_wait(self, model: str, seconds: float) -> None:
        """Record how long a request waited for its slot, the load of its model included."""
        self._add(model, _QUEUE_WAIT + bisect_left(_BOUNDS, seconds))

    def speech_made(self, model: str, real_time_factor: float | None, underrun_s: float) -> None:
        """Record a complete stream. `underrun_s` is that of a player without a buffer.

        A player that starts later by its buffer has that much less underrun: both play at the same speed,
        and the latest piece of audio decides.
        """
        if real_time_factor is not None:
            self._add(model, _REAL_TIME_FACTOR + bisect_left(_BOUNDS, real_time_factor))
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
            self._report = {
                model: [_window(minutes, counts) for minutes, counts in zip(PERFORMANCE_MINUTES, windows, strict=True)]
                for model, windows in sums.items()
            }
        return self._report

    def _add(self, model: str, column: int, count: int = 1) -> None:
        now = self._clock()
        if model not in self._rings:
            self._rings[model] = _Rings(now)
        self._rings[model].add(column, now, count)


def _window(minutes: int, counts: Counts) -> WindowPerformance:
    underruns = counts[_UNDERRUNS:].tolist()
    return WindowPerformance(
        minutes=minutes,
        first_audio_s=_distribution(counts[_FIRST_AUDIO:_REAL_TIME_FACTOR], _value),
        real_time_factor=_distribution(counts[_REAL_TIME_FACTOR:_QUEUE_WAIT], _value),
        queue_wait_s=_distribution(counts[_QUEUE_WAIT:_BATCH], _value),
        batch_size=_distribution(counts[_BATCH:_STREAMS], lambda bucket, _share: float(bucket)),
        streams=int(counts[_STREAMS]),
        underruns={str(round(buffer_s * 1000)): n for buffer_s, n in zip(PLAYER_BUFFERS_S, underruns, strict=True)},
    )


def _distribution(counts: Counts, value: Callable[[int, float], float]) -> Distribution:
    """Percentiles of a histogram. `value(bucket, share)`: the value at that share of the bucket's width."""
    cumulative = counts.cumsum()
    total = int(cumulative[-1])
    if not total:
        return Distribution()
    ranks = [share * total for share in _SHARES]
    buckets = cumulative.searchsorted(ranks)
    found = []
    for rank, bucket, upto, count in zip(
        ranks, buckets.tolist(), cumulative[buckets].tolist(), counts[buckets].tolist(), strict=True
    ):
        found.append(float(f"{value(bucket, (rank - upto + count) / count):.3g}"))
    p50, p95, p99 = found
    return Distribution(count=total, p50=p50, p95=p95, p99=p99)


def _value(bucket: int, share: float) -> float:
    """The value at that share of a bucket's width, on a logarithmic scale as the bounds are."""
    if bucket == 0:
        return _BOUNDS[0] * share
    if bucket == len(_BOUNDS):
        return _BOUNDS[-1]
    return float(_BOUNDS[bucket - 1] * (_BOUNDS[bucket] / _BOUNDS[bucket - 1]) ** share)
