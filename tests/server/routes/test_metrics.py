"""GET /metrics: Prometheus' own parser reads the figures of the snapshot."""

from pathlib import Path

import httpx
import msgspec
import pytest
import pytest_asyncio
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from shared.protocol import (
    BATCH_SIZE_BOUNDS,
    FIRST_AUDIO_BOUNDS_S,
    TRANSITION_BOUNDS_S,
    UNDERRUN_BOUNDS_S,
    CacheStats,
    Exemplar,
    Histogram,
    ModelStats,
    ModelStatus,
)
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, serving

pytestmark = SHARED_LOOP

MODEL = "espeak-ng"
ODD = 'a "model"\\\nof another line'
"""An id that no catalogue has: labels must be escaped."""

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _histogram(bounds: tuple[float, ...], counts: dict[int, int], total: float) -> Histogram:
    """A histogram with `counts` (bucket number -> values), and the sum `total`."""
    return Histogram(counts=[counts.get(bucket, 0) for bucket in range(len(bounds) + 1)], sum=total)


MODEL_STATS = {
    MODEL: ModelStats(
        first_audio_s=msgspec.structs.replace(
            _histogram(FIRST_AUDIO_BOUNDS_S, {0: 2, 4: 3, len(FIRST_AUDIO_BOUNDS_S): 1}, 101.5),
            exemplars={4: Exemplar(value=0.25, at=1_700_000_000.5, speech_id="5" * 32)},
        ),
        queue_wait_s=_histogram(FIRST_AUDIO_BOUNDS_S, {2: 5}, 0.4),
        underrun_s=_histogram(UNDERRUN_BOUNDS_S, {0: 4, 3: 1, 5: 1}, 0.6),
        audio_s=12.5,
        batch_size=_histogram(BATCH_SIZE_BOUNDS, {0: 7, 2: 1}, 11.0),
        captured_steps=6,
        eager_steps=2,
        transitions_s={
            "load": _histogram(TRANSITION_BOUNDS_S, {2: 1}, 0.2),
            "offload": _histogram(TRANSITION_BOUNDS_S, {0: 7}, 0.1),
        },
        failed_transitions={"load": 3},
        out_of_memory=2,
    ),
    ODD: ModelStats(failed_transitions={"restore": 1}),
}


CACHES = [
    CacheStats(name="prompts", model=MODEL, entries=3, bytes=300, hits=7, misses=4),
    CacheStats(name="tokens", model=MODEL, entries=1, bytes=None, hits=0, misses=1),
]


@pytest.fixture
def worker(worker: FakeWorker) -> FakeWorker:
    """A worker with figures."""
    models = [*worker.snapshot.models, ModelStatus(id="m", state="resident", bytes={"weights": 5, "kv": 2})]
    figures = {"running": 2, "queued": 1, "buffered": 4, "stalled": 3, "restarts": 3, "open_sockets": 6}
    worker.snapshot = msgspec.structs.replace(
        worker.snapshot, models=models, model_stats=MODEL_STATS, caches=CACHES, limit_hits={"queue": 4}, **figures
    )
    return worker


@pytest_asyncio.fixture(loop_scope="session")
async def samples(client: httpx.AsyncClient) -> Samples:
    """Every sample by its name and labels, after two requests that read the catalog."""
    for _ in range(2):
        await client.get("/v1/audio/voices")
    return _parsed((await client.get("/metrics")).text)


def _parsed(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type != "unknown"
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def _value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


async def test_format(client: httpx.AsyncClient) -> None:
    """Prometheus' text format, unless the Accept header prefers OpenMetrics."""
    prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2"
    text, open_metrics = "text/plain; version=0.0.4; charset=utf-8", openmetrics.CONTENT_TYPE_LATEST
    asked = {"*/*": text, "application/json": text, prometheus: open_metrics, "text/plain;q=1,*/*;q=0.5": text}
    for accept, kind in asked.items():
        answer = await client.get("/metrics", headers={"accept": accept})
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind), accept


async def test_open_metrics(client: httpx.AsyncClient, samples: Samples) -> None:
    """The strict parser of OpenMetrics finds the same values, and the request that a bucket had last."""
    answer = await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    read = [sample for family in openmetrics_families(answer.text) for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample for sample in read}
    assert found.keys() == samples.keys()
    assert all(sample.value == samples[key] for key, sample in found.items() if not key[0].startswith("tts_cache_"))
    exemplars = {key: sample.exemplar for key, sample in found.items() if sample.exemplar}
    bucket = "tts_time_to_first_audio_seconds_bucket", frozenset({("model", MODEL), ("le", "0.3")})
    assert exemplars.keys() == {bucket}
    exemplar = exemplars[bucket]
    assert exemplar is not None
    assert (exemplar.labels, exemplar.value) == ({"speech_id": "5" * 32}, 0.25)
    assert float(exemplar.timestamp or 0) == 1_700_000_000.5


async def test_worker(samples: Samples) -> None:
    """The worker is up, and its counts of requests."""
    assert _value(samples, "tts_worker_up") == 1
    assert _value(samples, "tts_worker_uptime_seconds") == 12.5
    assert _value(samples, "tts_worker_restarts_total") == 3
    assert _value(samples, "tts_requests_started_total") == 5
    assert _value(samples, "tts_requests_total", outcome="failed") == 1
    assert _value(samples, "tts_requests_running") == 2
    assert _value(samples, "tts_requests_queued") == 1
    assert _value(samples, "tts_requests_buffered") == 4
    assert _value(samples, "tts_requests_stalled") == 3
    assert _value(samples, "tts_requests_waiting_for_text") == 0
    assert _value(samples, "tts_websockets") == 6
    assert _value(samples, "tts_slots") == 8
    assert _value(samples, "tts_limit_hits_total", limit="queue") == 4
    assert _value(samples, "tts_limit_hits_total", limit="requests_per_minute") == 0


async def test_memory(samples: Samples) -> None:
    """Memory of the device, the models and the host."""
    assert _value(samples, "tts_device_memory_bytes", kind="others") == 5_000
    assert _value(samples, "tts_shared_bytes", purpose="codec") == 123
    assert _value(samples, "tts_model_bytes", model="m", purpose="kv") == 2
    assert _value(samples, "tts_host_offloaded_bytes") == 500
    assert _value(samples, "tts_audio_buffer_bytes", kind="used") == 96_000
    assert _value(samples, "tts_audio_buffer_bytes", kind="budget") == 480_000
    assert _value(samples, "tts_model_state", model="m", state="resident") == 1
    assert _value(samples, "tts_model_state", model="m", state="absent") == 0


async def test_first_audio(samples: Samples) -> None:
    """Buckets are cumulative: each counts all values up to its bound, the last one all values."""
    name = "tts_time_to_first_audio_seconds"
    buckets = [_value(samples, f"{name}_bucket", model=MODEL, le=str(bound)) for bound in FIRST_AUDIO_BOUNDS_S]
    assert buckets == [2, 2, 2, 2, *[5] * (len(FIRST_AUDIO_BOUNDS_S) - 4)]
    assert _value(samples, f"{name}_bucket", model=MODEL, le="+Inf") == 6
    assert _value(samples, f"{name}_count", model=MODEL) == 6
    assert _value(samples, f"{name}_sum", model=MODEL) == 101.5


async def test_underruns(samples: Samples) -> None:
    """Streams without an underrun are counted as streams and not as underruns."""
    assert _value(samples, "tts_underrun_seconds_bucket", model=MODEL, le="0.0") == 4
    assert _value(samples, "tts_underrun_seconds_count", model=MODEL) == 6
    assert _value(samples, "tts_underrun_seconds_sum", model=MODEL) == 0.6
    assert _value(samples, "tts_underruns_total", model=MODEL) == 2


async def test_continuity(samples: Samples) -> None:
    """A player with a larger buffer plays more streams without a gap."""
    continuous = [
        _value(samples, "tts_continuous_streams_total", model=MODEL, player_buffer=buffer)
        for buffer in ("0.0", "0.1", "0.3", "1.0")
    ]
    assert continuous == [4, 5, 5, 6]


async def test_work(samples: Samples) -> None:
    """The waits for a slot, the audio made, the sizes of batches, and the share of captured decode steps."""
    assert _value(samples, "tts_queue_wait_seconds_bucket", model=MODEL, le="0.1") == 5
    assert _value(samples, "tts_audio_seconds_total", model=MODEL) == 12.5
    assert _value(samples, "tts_batch_size_bucket", model=MODEL, le="1") == 7
    assert _value(samples, "tts_batch_size_bucket", model=MODEL, le="4") == 8
    assert _value(samples, "tts_batch_size_sum", model=MODEL) == 11
    assert _value(samples, "tts_decode_steps_total", model=MODEL, captured="true") == 6
    assert _value(samples, "tts_decode_steps_total", model=MODEL, captured="false") == 2


async def test_caches(samples: Samples) -> None:
    """Caches by name and model, and those of web workers without a model; no size where there is none."""
    assert _value(samples, "tts_cache_hits_total", cache="prompts", model=MODEL) == 7
    assert _value(samples, "tts_cache_misses_total", cache="tokens", model=MODEL) == 1
    assert _value(samples, "tts_cache_entries", cache="prompts", model=MODEL) == 3
    assert _value(samples, "tts_cache_bytes", cache="prompts", model=MODEL) == 300
    assert ("tts_cache_bytes", frozenset({("cache", "tokens"), ("model", MODEL)})) not in samples
    assert _value(samples, "tts_cache_hits_total", cache="catalog", model="") > 0


async def test_moves(samples: Samples) -> None:
    """Transitions by model and kind, their failures and their durations."""
    assert _value(samples, "tts_model_moves_total", model=MODEL, move="load") == 1
    assert _value(samples, "tts_model_moves_total", model=MODEL, move="offload") == 7
    assert _value(samples, "tts_model_move_failures_total", model=MODEL, move="load") == 3
    assert _value(samples, "tts_model_move_seconds_count", model=MODEL, move="offload") == 7
    assert _value(samples, "tts_model_move_seconds_sum", model=MODEL, move="load") == 0.2
    assert _value(samples, "tts_out_of_memory_total", model=MODEL) == 2


async def test_empty_histograms(samples: Samples) -> None:
    """A histogram without values is left out."""
    assert not [name for name, _ in samples if name.startswith("tts_real_time_factor")]


async def test_labels_are_escaped(samples: Samples) -> None:
    """Quotes, backslashes and line ends in a label do not break the format."""
    assert _value(samples, "tts_model_move_failures_total", model=ODD, move="restore") == 1


@pytest.mark.slow
async def test_without_a_worker(tmp_path: Path) -> None:
    """The scrape works, and its one figure says that the worker is down."""
    async with serving(f"ipc://{tmp_path}/none.ipc", ready=False) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert _parsed(answer.text) == {("tts_worker_up", frozenset()): 0}
