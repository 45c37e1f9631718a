"""Percentiles over a window, from histograms with fine buckets: of one GPU worker, or of several together.

Histograms of several workers are added up, bucket by bucket. Percentiles are never averaged.
"""

from collections.abc import Callable, Iterable
from typing import Final

from shared.protocol import PLAYER_BUFFERS_S, Distribution, WindowCounts, WindowPerformance

_PER_DECADE: Final = 32
_DECADES: Final = 6
BOUNDS: Final = [1e-3 * 10 ** (step / _PER_DECADE) for step in range(_DECADES * _PER_DECADE + 1)]
"""Upper bounds of the buckets for seconds and factors: 1 ms to 1,000 s, each 7.5 % above the one before.

Smaller values count as 1 ms, larger ones as 1,000 s. A percentile is off by 7.5 % at most.
"""

_SHARES: Final = (0.5, 0.95, 0.99)

Buckets = dict[int, int]
"""The number of values in each bucket that has some."""


def window_of(counts: WindowCounts) -> WindowPerformance:
    """The figures of a window."""
    return WindowPerformance(
        minutes=counts.minutes,
        first_audio_s=_distribution(counts.first_audio, _value),
        real_time_factor=_distribution(counts.real_time_factor, _value),
        queue_wait_s=_distribution(counts.queue_wait, _value),
        batch_size=_distribution(counts.batch_size, lambda size, _share: float(size)),
        streams=counts.streams,
        underruns={
            str(round(buffer_s * 1000)): number
            for buffer_s, number in zip(PLAYER_BUFFERS_S, counts.underruns, strict=True)
        },
    )


def sum_of(windows: list[WindowCounts]) -> WindowCounts:
    """The counts of one window at several workers; there is one worker at least."""
    return WindowCounts(
        minutes=windows[0].minutes,
        first_audio=_sum(window.first_audio for window in windows),
        real_time_factor=_sum(window.real_time_factor for window in windows),
        queue_wait=_sum(window.queue_wait for window in windows),
        batch_size=_sum(window.batch_size for window in windows),
        streams=sum(window.streams for window in windows),
        underruns=[sum(numbers) for numbers in zip(*(window.underruns for window in windows), strict=True)],
    )


def _sum(histograms: Iterable[Buckets]) -> Buckets:
    total: Buckets = {}
    for histogram in histograms:
        for bucket, count in histogram.items():
            total[bucket] = total.get(bucket, 0) + count
    return total


def _distribution(counts: Buckets, value: Callable[[int, float], float]) -> Distribution:
    """Percentiles of a histogram. `value(bucket, share)`: the value at that share of the bucket's width."""
    total = sum(counts.values())
    if not total:
        return Distribution()
    found: list[float] = []
    below = 0
    for bucket in sorted(counts):
        count = counts[bucket]
        while len(found) < len(_SHARES) and below + count >= (rank := _SHARES[len(found)] * total):
            found.append(float(f"{value(bucket, (rank - below) / count):.3g}"))
        below += count
    p50, p95, p99 = found
    return Distribution(count=total, p50=p50, p95=p95, p99=p99)


def _value(bucket: int, share: float) -> float:
    """The value at that share of a bucket's width, on a logarithmic scale as the bounds are."""
    if bucket == 0:
        return BOUNDS[0] * share
    if bucket == len(BOUNDS):
        return BOUNDS[-1]
    return float(BOUNDS[bucket - 1] * (BOUNDS[bucket] / BOUNDS[bucket - 1]) ** share)
