"""The state of a GPU worker as it answers a ping: all that health, metrics and dashboards read."""

from typing import Final, Literal

import msgspec

from shared.protocol.parts import CacheCounts, CacheName, CacheStats, LimitName, WorkerUse
from shared.protocol.results import ModelStatus, SavedVoice


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The device's memory by its driver, in bytes; on a CPU, the RAM and the part of it that this process uses."""

    name: str
    kind: Literal["cuda", "cpu"]
    total_bytes: int
    used_bytes: int
    free_bytes: int
    ours_bytes: int
    others_bytes: int
    budget_bytes: int


class HostMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Host RAM in bytes: of the machine, of this process, and of offloaded models."""

    total_bytes: int
    free_bytes: int
    ours_bytes: int
    offloaded_bytes: int
    budget_bytes: int


class BufferMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Host RAM in bytes of audio that waits for its readers and of parked requests, and its budget."""

    used_bytes: int
    budget_bytes: int


class CleanupPass(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one pass over idle models. `timestamp` is in Unix seconds; bytes were measured before and after.

    `models_dropped` are those of `models_unloaded` that left host RAM too.
    """

    timestamp: float
    vram_before_bytes: int
    vram_after_bytes: int
    models_checked: list[str]
    models_unloaded: list[str]
    models_dropped: list[str] = []


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """The number of requests since the worker started."""

    started: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0


FIRST_AUDIO_BOUNDS_S: Final = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
REAL_TIME_FACTOR_BOUNDS: Final = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 0.9, 1.0, 1.5, 2.0, 5.0)

UNDERRUN_BOUNDS_S: Final = (0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
"""The first bucket counts streams without an underrun."""

PLAYER_BUFFERS_S: Final = (0.0, 0.1, 0.3, 1.0)
"""How long after the first audio players start whose underruns are counted; each is one of UNDERRUN_BOUNDS_S."""

BATCH_SIZE_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64, 128)

PERFORMANCE_MINUTES: Final = (1, 15, 60)
"""The windows of the figures of performance."""

TRANSITION_BOUNDS_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Exemplar(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The latest request in a bucket of a histogram; its log lines and its outcome have the same speech id.

    `at` is in Unix seconds. `trace_id` is "" if no trace of the request is kept.
    """

    value: float
    at: float
    speech_id: str
    trace_id: str = ""


class Histogram(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The number of values in each bucket and their sum; empty without values.

    The upper bounds of the buckets are the constants above; the last bucket has the values above all bounds.
    `exemplars` are by bucket.
    """

    counts: list[int] = []
    sum: float = 0.0
    exemplars: dict[int, Exemplar] = {}


class ModelStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The statistics of one model since the worker started.

    The first four count streams. `first_audio_s`: from the arrival of a request to its first audio.
    `queue_wait_s`: from its arrival to its slot.
    `real_time_factor`: seconds of synthesis for each second of audio, without the time that the request was parked.
    `underrun_s`: the time in which a player that starts with the first audio would have had nothing to play.
    `audio_s`: seconds of audio made. `batch_size`: the number of jobs that shared a frame, for each frame.
    `captured_steps`: decode steps that replayed a captured function; `eager_steps` called Python for each operator.
    `transitions_s` and `failed_transitions` are by kind: load, restore, offload or drop.
    """

    first_audio_s: Histogram = Histogram()
    queue_wait_s: Histogram = Histogram()
    real_time_factor: Histogram = Histogram()
    underrun_s: Histogram = Histogram()
    audio_s: float = 0.0
    batch_size: Histogram = Histogram()
    captured_steps: int = 0
    eager_steps: int = 0
    transitions_s: dict[str, Histogram] = {}
    failed_transitions: dict[str, int] = {}
    out_of_memory: int = 0


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of `count` values; None without values."""

    count: int = 0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class WindowCounts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The source of a WindowPerformance: histograms by bucket of shared.performance, and batches by their size.

    `underruns` are by PLAYER_BUFFERS_S.
    """

    minutes: int
    first_audio: dict[int, int] = {}
    real_time_factor: dict[int, int] = {}
    queue_wait: dict[int, int] = {}
    batch_size: dict[int, int] = {}
    streams: int = 0
    underruns: list[int]


class WindowPerformance(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one model over the last `minutes`; `first_audio_s` to `batch_size` are as in ModelStats.

    `underruns`: of the complete `streams`, those in which a player ran out of audio, by the milliseconds of its buffer.
    """

    minutes: int
    first_audio_s: Distribution
    real_time_factor: Distribution
    queue_wait_s: Distribution
    batch_size: Distribution
    streams: int
    underruns: dict[str, int]


ShownState = Literal["waiting", "generating", "buffered", "stalled"]
"""waiting: for its first slot, or its model. generating: it has a slot.
buffered: it has none, because its speech is complete or enough for now.
stalled: its reader has taken nothing for 10 s, with a slot or without.
"""


class StreamState(msgspec.Struct, frozen=True, kw_only=True):
    """One request, without its text. `client` is the beginning of the key of fairness.

    `age_s` is the time since its arrival, `audio_s` the audio made so far, `buffered_s` the part that is not sent yet.
    """

    id: str
    model: str
    client: str
    state: ShownState
    age_s: float
    audio_s: float
    buffered_s: float = 0.0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The worker's state when it answered a ping: all that health, metrics and dashboards read.

    `running` requests hold a slot, `slots` is how many can. `queued` ones wait for their first slot.
    `buffered` ones hold none: their audio is complete or enough for now, and waits for its readers.
    `stalled`, of those with a slot and those without: the reader has taken nothing for 10 s.
    `waiting_for_text`, of both kinds: open ones that can go on only with more text.
    `open_sockets` are the WebSockets of all web workers.
    It is sent several times a second, so `model_stats` has active models alone and `streams` the oldest few.
    `restarts` is the number of workers that the supervisor started before this one.
    """

    pid: int
    boot_id: str
    uptime_s: float
    accepting: bool
    default_model: str
    running: int
    queued: int
    slots: int
    buffered: int
    stalled: int
    audio_buffer: BufferMemory
    requests: Counters
    models: list[ModelStatus]
    device: DeviceMemory
    host: HostMemory
    shared_bytes: dict[str, int]
    voices: list[SavedVoice]
    cleanup: CleanupPass | None = None
    preloading: list[str] = []
    """Models of TTS_PRELOAD, and the default one, that are not loaded yet."""

    restarts: int = 0
    model_stats: dict[str, ModelStats] = {}
    streams: list[StreamState] = []
    waiting_for_text: int = 0
    open_sockets: int = 0
    performance: dict[str, list[WindowPerformance]] = {}
    """By model, of those that did something in the last hour; a window each for PERFORMANCE_MINUTES."""

    caches: list[CacheStats] = []
    """Those of the engines and of the GPU worker."""

    web_caches: dict[CacheName, CacheCounts] = {}
    """The sums of what the web workers have counted."""

    limit_hits: dict[LimitName, int] = {}
    """How often a request was over a limit."""

    emptied: dict[CacheName, int] = {}
    """How often a cache of the web workers was to be emptied."""

    key_use: WorkerUse | None = None
    performance_counts: dict[str, list[WindowCounts]] = {}
    """Of a GPU worker in a cluster: what its keys have used, and what `performance` was computed from."""
