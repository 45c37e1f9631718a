"""One cluster that the tests of this folder share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster.cluster import STOP_TIMEOUT_S, Cluster, Listener, running_cluster
from tests.recogniser import SENTENCES
from tests.system.service import eventually

SLOTS: int = 2
QUEUE: int = 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two replicas with two slots each, and a queue for two more. It ends with its module: an idle Ray takes CPU time.

    At its end SIGTERM lets a stream end that is running, and refuses a request that comes after it.
    """
    folder: Path = tmp_path_factory.mktemp("cluster")
    with running_cluster(folder, MAX_CONCURRENCY=SLOTS, MAX_QUEUE=QUEUE, DRAIN_TIMEOUT=STOP_TIMEOUT_S) as running:
        yield running
        listener = Listener(running, " ".join(SENTENCES * 5))
        eventually(lambda: listener.received, 60, lambda: f"speech; {listener.ended}")
        running.process.send_signal(signal.SIGTERM)
        eventually(lambda: _refuses(running), 60, "a refusal")
        assert not listener.ended, "the speech was too short to be running still"
        listener.pause_s = 0.0
    listener.wait(STOP_TIMEOUT_S)
    assert listener.ended == "complete"


def _refuses(cluster: Cluster) -> bool:
    """True once a request finds that the service is shutting down."""
    answer = cluster.speech("Hello.")
    return answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and answer.json()["error"]["code"] == "shutting_down"
