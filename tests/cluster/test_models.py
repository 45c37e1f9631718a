"""Three models on three replicas with room for two each: each model stays where it is, through Serve's router.

The models are small random checkpoints of Qwen3-TTS, so loads, evictions and queues are those of any engine.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import httpx
import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.ray_head import joined_cluster
from tests.system.residency_service import MODELS, ResidencyService, checkpoints, model_paths
from tests.system.test_residency import BUDGET_MIB, SLOTS

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

REPLICAS: Final = 3
REQUESTS: Final = 200
MOST_LOADS: Final = 9
"""The cluster has room for six models. Queues may justify a few more loads for a while."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three CPU replicas with room for two of three models each."""
    settings: dict[str, Any] = {
        "REPLICAS": REPLICAS,
        "MODEL_PATHS": model_paths(checkpoints()),
        "DEFAULT_DEVICE": "cpu",
        "DEFAULT_MODEL": "espeak-ng",
        "MAX_CONCURRENCY": SLOTS,
        "VRAM_BUDGET_MB": BUDGET_MIB,
        "CPU_THREADS": 1,
    }
    limits = httpx.Limits(max_connections=REQUESTS)
    with joined_cluster(tmp_path_factory.mktemp("models"), cpus=REPLICAS, **settings) as running:
        running.http.close()
        with httpx.Client(base_url=running.url, timeout=600, limits=limits, trust_env=False) as running.http:
            yield running


def test_two_hundred_requests_over_three_models(cluster: Cluster) -> None:
    """All at once. A few loads do for all; every request is spoken as alone, or refused with a status."""
    models = ResidencyService(cluster)
    alone = {model: models.say(model) for model in MODELS}
    before = _loads(cluster)
    with ThreadPoolExecutor(REQUESTS) as pool:
        asked = [(model, pool.submit(models.ask, model)) for _ in range(REQUESTS // 3 + 1) for model in MODELS]
        answers = [(model, one.result(600)) for model, one in asked[:REQUESTS]]
    statuses = Counter(answer.status_code for _, answer in answers)
    loads = _loads(cluster) - before
    print(f"{REQUESTS} requests: {dict(statuses)}; {before} loads by 3 requests before, {loads} by these")  # noqa: T201
    assert set(statuses) <= {httpx.codes.OK, httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE}
    assert statuses[httpx.codes.OK] > REQUESTS / 2
    for model, answer in answers:
        if answer.status_code == httpx.codes.OK:
            assert answer.content == alone[model]
    assert before == len(MODELS)
    assert loads <= MOST_LOADS - before


def _loads(cluster: Cluster) -> int:
    """The loads and restores of the three models, over all replicas."""
    metrics = cluster.http.get("/metrics").text
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in metrics.splitlines()
        if line.startswith("tts_model_moves_total") and any(f'"{model}"' in line for model in MODELS)
        if 'move="load"' in line or 'move="restore"' in line
    )
