"""The service is deployed anew on a Ray cluster that serves, by a process and by a file, and taken away at last.

The tests run in the order of the file. Streams end whole, and requests are answered meanwhile.
"""

import json
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Final, Self

import httpx
import pytest
import websockets
from websockets.sync.client import connect

from tests.cluster.ray_head import JoinedCluster, joined_cluster
from tests.recogniser import SENTENCES, recognise
from tests.system.service import eventually

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

REPLICAS: Final = 2
GOING_AWAY: Final = 1001
ROLL_S: Final = 300.0
"""The longest time for the replacement of all replicas."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JoinedCluster]:
    """Two replicas on a Ray with two CPUs: a new replica needs the CPU of an old one, as it would need its GPU."""
    folder = tmp_path_factory.mktemp("redeploy")
    settings = {"REPLICAS": REPLICAS, "MAX_CONCURRENCY": 2, "DRAIN_TIMEOUT": 120, "OPEN_TEXT_TIMEOUT": 300}
    with joined_cluster(folder, cpus=REPLICAS, **settings) as running:
        yield running


class Visitors:
    """Clients that come all the time: some for speech over HTTP, some with a WebSocket that they leave idle."""

    def __init__(self, cluster: JoinedCluster) -> None:
        self._cluster = cluster
        self.answers: Counter[str] = Counter()
        self.closes: Counter[int] = Counter()
        self._left = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._ask, self._idle, self._idle)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._left.set()
        for thread in self._threads:
            thread.join(60)

    def __str__(self) -> str:
        return f"answers: {dict(self.answers)}, closes of idle sockets: {dict(self.closes)}"

    def _ask(self) -> None:
        while not self._left.is_set():
            body = {"input": SENTENCES[0], "response_format": "pcm"}
            try:
                answer = httpx.post(f"{self._cluster.url}/v1/audio/speech", json=body, timeout=60, trust_env=False)
                self.answers[f"{answer.status_code}, {len(answer.content) / 48_000:.1f} s"] += 1
            except httpx.TransportError as error:
                self.answers[repr(error)] += 1
            self._left.wait(0.2)

    def _idle(self) -> None:
        while not self._left.is_set():
            try:
                with connect(stream_url(self._cluster), proxy=None, close_timeout=5) as socket:
                    socket.send(CONFIG)
                    said_at = time.monotonic()
                    while not self._left.is_set():
                        if time.monotonic() - said_at > 10:  # an idle socket has to say something within 30 s
                            socket.send(CONFIG)
                            said_at = time.monotonic()
                        with suppress(TimeoutError):
                            socket.recv(1)
            except websockets.ConnectionClosed as closed:
                self.closes[closed.rcvd.code if closed.rcvd else 1006] += 1
            except (OSError, websockets.InvalidStatus) as error:
                self.answers[repr(error)] += 1


CONFIG: Final = json.dumps({"type": "session.config", "response_format": "pcm"})


def stream_url(cluster: JoinedCluster) -> str:
    """The address at which a WebSocket speaks a text that is being written."""
    return f"{cluster.url.replace('http', 'ws')}/v1/audio/speech/stream"


WORDS: Final = f"{SENTENCES[1]} {SENTENCES[2]}"


class Talk:
    """Speech of a text that is still being written: it lasts until `finish`."""

    def __init__(self, cluster: JoinedCluster, stack: ExitStack) -> None:
        self.socket = stack.enter_context(connect(stream_url(cluster), proxy=None, max_size=None, close_timeout=5))
        self.socket.send(CONFIG)
        self._pcm = b""
        self._say(SENTENCES[1] + " ")
        while not self._pcm:
            message = self.socket.recv(60)
            self._pcm += message if isinstance(message, bytes) else b""

    def _say(self, text: str) -> None:
        self.socket.send(json.dumps({"type": "input.text", "text": text}))

    def finish(self) -> str | None:
        """Write the rest, and hear all to the end; the words."""
        self._say(SENTENCES[2])
        self.socket.send(json.dumps({"type": "input.done"}))
        while True:
            message = self.socket.recv(60)
            if isinstance(message, bytes):
                self._pcm += message
            elif json.loads(message)["type"] == "session.done":
                return recognise(self._pcm, 2)


def assert_rolls(cluster: JoinedCluster, redeploy: Callable[[], object], slots: int) -> None:
    """`redeploy` has all replicas become others, with so many slots each; streams end whole, requests are answered."""
    before = cluster.replicas("engine") | cluster.replicas("ingress")
    with Visitors(cluster) as visitors, ExitStack() as stack:
        talks = [Talk(cluster, stack) for _ in range(2)]
        eventually(lambda: visitors.answers, 60, "an answer")
        redeploy()
        waited_s = eventually(lambda: visitors.closes, ROLL_S, "an idle socket closed")
        assert [talk.finish() for talk in talks] == [WORDS] * 2
        rolled_s = eventually(
            lambda: _is_whole(cluster, before, slots), ROLL_S, lambda: f"new replicas; {visitors}", pause_s=0.5
        )
    print(f"idle socket closed after {waited_s:.0f} s, rolled {rolled_s:.0f} s after that; {visitors}")  # noqa: T201
    assert len(visitors.answers) == 1, visitors
    assert "200" in next(iter(visitors.answers))
    assert set(visitors.closes) == {GOING_AWAY}


def _is_whole(cluster: JoinedCluster, before: set[int], slots: int) -> bool:
    now = cluster.replicas("engine") | cluster.replicas("ingress")
    return len(now) == 2 * REPLICAS and not now & before and cluster.stats()["slots"] == REPLICAS * slots


def end(process: "subprocess.Popen[bytes]") -> None:
    """A process that has deployed the service ends at SIGTERM."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_second_process_deploys_anew(cluster: JoinedCluster) -> None:
    """The first process may end after it: the service goes on."""
    former: list[subprocess.Popen[bytes]] = []
    assert_rolls(cluster, lambda: former.append(cluster.redeploy(MAX_CONCURRENCY=3)), slots=3)
    end(former[0])
    assert cluster.speech("Hello.").status_code == httpx.codes.OK


def test_a_file_deploys_anew(cluster: JoinedCluster) -> None:
    """As KubeRay does it; the process that had deployed the service before leaves it running at its end."""
    assert_rolls(cluster, lambda: cluster.deploy_file(MAX_CONCURRENCY=4), slots=4)
    end(cluster.process)
    assert cluster.speech("Hello.").status_code == httpx.codes.OK


def test_settings_that_cannot_work(cluster: JoinedCluster) -> None:
    """The process that deploys them fails. What it has not replaced goes on, and the former settings heal the rest."""
    cluster.redeploy(DEFAULT_DEVICE="cuda")
    assert cluster.process.wait(ROLL_S) == 1
    assert "exit code 2" in cluster.log.read_text()
    assert cluster.speech("Hello.").status_code == httpx.codes.OK
    broken = cluster.replicas("engine")
    cluster.deploy_file(DEFAULT_DEVICE="auto", MAX_CONCURRENCY=5)
    eventually(lambda: _is_whole(cluster, broken, slots=5), ROLL_S, "new replicas", pause_s=0.5)


def test_the_service_is_taken_away(cluster: JoinedCluster) -> None:
    """New requests are refused, and streams end whole before the replicas do."""
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        talk = Talk(cluster, stack)
        removed = pool.submit(cluster.remove)
        eventually(lambda: cluster.speech("Hello.").status_code == httpx.codes.SERVICE_UNAVAILABLE, 60, "a refusal")
        assert talk.finish() == WORDS
        assert removed.result() == 0
    eventually(lambda: not cluster.replicas("engine") | cluster.replicas("ingress"), 60, "no replica", pause_s=0.5)
    assert cluster.speech("Hello.").status_code == httpx.codes.NOT_FOUND
