"""A cluster that scales from zero to two espeak-ng workers and back, with real Ray processes."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.cluster.cluster import Cluster, Listener, running_cluster
from tests.cluster.ray_head import joined_cluster
from tests.system.service import eventually, stretched

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

DELAY_S: Final = 15
"""The time for which fewer replicas must be wanted."""

DRAIN_S: Final = 5
POLL_S: Final = 0.5
REPLACED_S: Final = 40.0
UP_S: Final = 60.0
DOWN_S: Final = 120.0
"""Serve hears of the end of a load after up to 16 s; the rest is the delay, and the end of a GPU worker."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Up to two replicas with two slots each."""
    settings = {"MIN_REPLICAS": 0, "REPLICAS": 2, "SCALE_DOWN_DELAY": DELAY_S, "DRAIN_TIMEOUT": DRAIN_S}
    folder: Path = tmp_path_factory.mktemp("cluster")
    with running_cluster(folder, MAX_CONCURRENCY=2, MAX_QUEUE=8, **settings) as running:
        yield running


def replicas(cluster: Cluster) -> int:
    """The number of replicas for new requests."""
    return len(cluster.stats().get("replicas", []))


class Talk:
    """A speech whose text is written word by word, until the test ends it."""

    def __init__(self, cluster: Cluster) -> None:
        self.pcm = b""
        self.last: dict[str, object] = {}
        self._ending = threading.Event()
        self._address = f"{cluster.url.replace('http', 'ws')}/v1/audio/speech/stream"
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()

    def _talk(self) -> None:
        with connect(self._address, proxy=None) as live:
            live.send(json.dumps({"type": "session.config", "response_format": "pcm"}))
            writing = threading.Thread(target=self._write, args=(live,), daemon=True)
            writing.start()
            with contextlib.suppress(ConnectionClosed):
                for message in live:
                    if isinstance(message, bytes):
                        self.pcm += message
                        continue
                    self.last = json.loads(message)
                    if self.last["type"] == "session.done":
                        break
            writing.join()

    def _write(self, live: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while not self._ending.wait(POLL_S):
                live.send(json.dumps({"type": "input.text", "text": "One two three. "}))
            live.send(json.dumps({"type": "input.done"}))

    def end(self) -> None:
        """Write no more, and hear the rest."""
        self._ending.set()
        self._thread.join(90)


def test_up_with_a_queue_and_down_without_a_cut(cluster: Cluster) -> None:
    """A second replica within a minute. When the load ends it is stopped, and ends only with the stream that it has."""
    assert replicas(cluster) == 1
    before = cluster.workers()
    limit_s = stretched(UP_S)
    listeners = [Listener(cluster) for _ in range(4)]
    try:
        print("up", eventually(lambda: replicas(cluster) == 2, limit_s, "a second replica", pause_s=POLL_S))  # noqa: T201
        talk = Talk(cluster)  # the first replica is full: the new one gets it, and Serve will stop that one
        eventually(lambda: talk.pcm, 60, lambda: f"speech; {talk.last}")
        (worker,) = cluster.workers() - before
    finally:
        for one in listeners:
            one.leave()
    down_s = eventually(lambda: replicas(cluster) == 1, stretched(DOWN_S), "one replica", pause_s=POLL_S)
    print("down", down_s)  # noqa: T201
    time.sleep(5 * DRAIN_S)  # far beyond the drain timeout, after which Serve would kill the replica
    assert worker in cluster.workers()
    talk.end()
    assert talk.last["type"] == "session.done"
    assert "error" not in talk.last
    eventually(lambda: worker not in cluster.workers(), 90, "the end of the replica", pause_s=POLL_S)


def test_at_zero_the_catalogue_is_there(cluster: Cluster) -> None:
    """Without a GPU worker the service is ready, lists models and voices, and says of actions why they cannot be."""
    eventually(lambda: not cluster.workers(), stretched(DOWN_S), "no GPU worker", pause_s=POLL_S)
    assert cluster.http.get("/ready").status_code == httpx.codes.OK
    assert "espeak-ng" in {model["id"] for model in cluster.http.get("/v1/models").json()["data"]}
    assert cluster.http.get("/v1/audio/voices").is_success
    stats = cluster.stats()
    assert (stats["slots"], stats.get("replicas", [])) == (0, [])
    refused = cluster.http.get("/admin/usage")
    assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
    assert "scales to zero" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert not cluster.workers()


def test_requests_wake_a_replica(cluster: Cluster) -> None:
    """Those that find none wait for it, and all are answered."""
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: cluster.speech("Hello."), range(4)))
    print("woken", time.monotonic() - began)  # noqa: T201
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len(cluster.workers()) == 1


def test_a_redeploy_keeps_to_the_drain_timeout(tmp_path: Path) -> None:
    """A replica that another version replaces does not wait for its last stream; the new one needs its CPU."""
    settings = {"MIN_REPLICAS": 0, "REPLICAS": 1, "SCALE_DOWN_DELAY": 600, "DRAIN_TIMEOUT": DRAIN_S}
    with joined_cluster(tmp_path, cpus=1, MAX_CONCURRENCY=4, **settings) as cluster:
        talks = [Talk(cluster) for _ in range(4)]  # through all web workers: Serve replaces these one after the other
        for talk in talks:
            eventually(lambda talk=talk: talk.pcm, 60, lambda talk=talk: f"speech; {talk.last}")
        before = cluster.workers()
        limit_s = stretched(REPLACED_S)
        cluster.redeploy(MAX_CONCURRENCY=5)
        ended_s = eventually(lambda: not before & cluster.workers(), limit_s, "the end of the old one", pause_s=POLL_S)
        new_s = eventually(lambda: cluster.stats()["slots"] == 5, limit_s, "the new one", pause_s=POLL_S)
        print("redeployed", ended_s, new_s)  # noqa: T201
        for talk in talks:
            talk.end()
