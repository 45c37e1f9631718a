"""The service as a Ray Serve application, with real Ray processes and two espeak-ng workers on this machine.

The tests run in the order of the file: the last ones kill processes of the cluster, which comes back each time.
"""

import base64
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import httpx
import openai
import pytest
from websockets.sync.client import connect

from server.engine.ray import REPORT_INTERVAL_S
from tests.audio import decode
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import QUEUE, SLOTS
from tests.recogniser import SENTENCES, recognise
from tests.system.service import eventually, stretched

pytestmark = pytest.mark.timeout(300)

REPLICAS: Final = 2
LONG: Final = " ".join(SENTENCES * 100)[:99_000]
"""Two hours of speech: it is still being spoken when its test ends."""

FORMATS: Final = ("mp3", "opus", "aac", "flac", "wav", "pcm")


class Listener:
    """A client that reads the speech of LONG until it is complete or breaks, or until it leaves."""

    def __init__(self, cluster: Cluster) -> None:
        self.received = 0
        self.ended = ""
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._listen, args=(cluster.url,), daemon=True)
        self._thread.start()

    def _listen(self, url: str) -> None:
        body = {"input": LONG, "response_format": "opus"}
        try:
            with httpx.stream("POST", f"{url}/v1/audio/speech", json=body, timeout=60, trust_env=False) as answer:
                if answer.status_code != httpx.codes.OK:
                    self.ended = f"refused {answer.status_code}"
                    return
                for piece in answer.iter_raw():
                    self.received += len(piece)
                    if self._leave.is_set():
                        self.ended = "left"
                        return
                self.ended = "complete"
        except httpx.TransportError:
            self.ended = "broken"

    def leave(self) -> None:
        """Close the connection."""
        self._leave.set()
        self._thread.join(30)

    def goes_on(self) -> None:
        """Wait for more of the speech."""
        before = self.received
        eventually(lambda: self.received > before, 30, f"more after {before} bytes; {self.ended}")


@contextlib.contextmanager
def listeners(cluster: Cluster, count: int) -> Iterator[list[Listener]]:
    """So many listeners, all of which hear something; at the end all leave, and their slots are free."""
    eventually(lambda: cluster.stats()["slots"] == REPLICAS * SLOTS, 60, "all slots")
    found: list[Listener] = []
    try:
        for _ in range(count):
            found.append(Listener(cluster))
            # One after the other, so that each is seen when the next one is placed.
            eventually(lambda: found[-1].received, 60, lambda: f"speech for all; {found[-1].ended}")
            time.sleep(2 * REPORT_INTERVAL_S)
        yield found
    finally:
        for one in found:
            one.leave()
    eventually(lambda: cluster.open_requests() == 0, 30, "all slots free")


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> openai.OpenAI:
    """OpenAI's SDK with our address, and no other change."""
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("audio_format", FORMATS)
def test_sdk_gets_every_format(client: openai.OpenAI, audio_format: Any) -> None:
    """OpenAI's SDK gets the right words in each format."""
    sentence = SENTENCES[FORMATS.index(audio_format)]
    data = client.audio.speech.create(
        model="tts-1", voice="alloy", input=sentence, response_format=audio_format
    ).content
    assert recognise(decode(data, audio_format)) == sentence


def test_server_sent_events(cluster: Cluster) -> None:
    """They have the right words, and their end."""
    body = {"input": SENTENCES[8], "response_format": "pcm", "stream_format": "sse"}
    answer = cluster.http.post("/v1/audio/speech", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
    *deltas, done = events
    assert done["type"] == "speech.audio.done"
    assert recognise(b"".join(base64.b64decode(event["audio"]) for event in deltas)) == SENTENCES[8]


def test_text_in_pieces(cluster: Cluster) -> None:
    """A WebSocket takes a text in pieces and gives the speech of all of it."""
    sentence, pcm = SENTENCES[7], b""
    with connect(f"{cluster.url.replace('http', 'ws')}/v1/audio/speech/stream", proxy=None) as socket:
        socket.send(json.dumps({"type": "session.config", "response_format": "pcm"}))
        for word in sentence.split():
            socket.send(json.dumps({"type": "input.text", "text": word + " "}))
        socket.send(json.dumps({"type": "input.done"}))
        for message in socket:
            if isinstance(message, bytes):
                pcm += message
            elif json.loads(message)["type"] == "session.done":
                break
    assert recognise(pcm) == sentence


def test_full_queues_refuse_before_an_answer_begins(cluster: Cluster) -> None:
    """Of many requests at once, those that find every slot and every queue full get a 429 with Retry-After."""
    room = REPLICAS * (SLOTS + QUEUE)
    text = " ".join(SENTENCES)
    workers = cluster.workers()
    with ThreadPoolExecutor(4 * room) as pool:
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)  # so that all of them reach it in the same moment
        try:
            asked = [pool.submit(cluster.speech, text, response_format="pcm") for _ in range(4 * room)]
            time.sleep(1.5)  # no test can see how many requests wait in the worker's socket
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
        answers = [one.result(60) for one in asked]
    refused = [answer for answer in answers if answer.status_code == httpx.codes.TOO_MANY_REQUESTS]
    spoken = [answer for answer in answers if answer.status_code == httpx.codes.OK]
    assert len(refused) + len(spoken) == len(answers)
    assert refused
    assert len(spoken) >= room
    for answer in refused:
        assert answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
    lengths = [len(answer.content) for answer in spoken]
    assert min(lengths) > 0.99 * max(lengths)


def test_a_client_that_leaves_frees_its_slot(cluster: Cluster) -> None:
    """Within a second."""
    with listeners(cluster, 1) as (listener,):
        limit_s = stretched(1.0)
        listener.leave()
        eventually(lambda: cluster.running() == 0, limit_s, "the slot freed")


def test_a_dead_worker_costs_its_own_streams(cluster: Cluster) -> None:
    """Its streams break, the others go on, and its replica speaks again within five seconds."""
    with listeners(cluster, REPLICAS * SLOTS) as streams:
        limit_s = stretched(5.0)
        os.kill(next(iter(cluster.workers())), signal.SIGKILL)
        eventually(lambda: [one.ended for one in streams].count("broken") == SLOTS, 30, "its streams broken")
        for one in streams:
            if not one.ended:
                one.goes_on()
        assert cluster.speech("Hello.").status_code == httpx.codes.OK
        eventually(lambda: cluster.stats()["slots"] == REPLICAS * SLOTS, limit_s, "all slots")
        assert sorted(one.ended for one in streams) == ["", "", "broken", "broken"]


@pytest.mark.soak
def test_a_dead_replica_is_replaced(cluster: Cluster) -> None:
    """Its streams break, requests go elsewhere meanwhile, and Serve starts another one."""
    with listeners(cluster, REPLICAS * SLOTS) as streams:
        dead = next(iter(cluster.replicas("engine")))
        os.kill(dead, signal.SIGKILL)
        eventually(lambda: [one.ended for one in streams].count("broken") == SLOTS, 30, "its streams broken")
        assert cluster.speech("Hello.").status_code == httpx.codes.OK
        for one in streams:
            if not one.ended:
                one.goes_on()
        eventually(
            lambda: (
                len(cluster.replicas("engine") - {dead}) == REPLICAS and cluster.stats()["slots"] == REPLICAS * SLOTS
            ),
            60,
            "another replica",
        )
