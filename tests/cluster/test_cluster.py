"""The service as a Ray Serve application, with real Ray processes and two espeak-ng workers on this machine.

The tests run in the order of the file: the last ones kill processes of the cluster, which comes back each time.
"""

import base64
import contextlib
import json
import os
import signal
import socket
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
from tests.cluster.cluster import LONG, READING_PAUSE_S, Cluster, Listener
from tests.cluster.conftest import QUEUE, SLOTS
from tests.recogniser import SENTENCES, recognise
from tests.system.service import NO_TLS, eventually, soon, stretched

pytestmark = pytest.mark.timeout(600)

REPLICAS: Final = 2
WEB_WORKERS: Final = 2
LOOPBACK: Final = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1 and ::1, as the kernel writes them."""
FORMATS: Final = ("mp3", "opus", "aac", "flac", "wav", "pcm")


def seen_by_all(cluster: Cluster, running: int) -> bool:
    """True if each web worker knows of so many running requests by the latest reports. They answer in turn."""
    asked: set[int] = set()
    for _ in range(8 * WEB_WORKERS):
        stats = cluster.stats()
        asked.add(stats["web_pid"])
        if stats["running"] != running or len(asked) == WEB_WORKERS:
            return bool(stats["running"] == running)
    return False


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
            eventually(lambda: seen_by_all(cluster, len(found)), 60, lambda: f"{len(found)} running")
        yield found
    finally:
        for one in found:
            one.leave()
    eventually(lambda: cluster.open_requests() == 0, 60, "all slots free")


def wait_for_broken(streams: list[Listener]) -> None:
    """Wait until the streams of one worker are broken. The break comes behind all that is buffered: read it at once."""
    for one in streams:
        one.pause_s = 0.0
    eventually(lambda: [one.ended for one in streams].count("broken") == SLOTS, 60, "its streams broken")
    for one in streams:
        one.pause_s = READING_PAUSE_S


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> openai.OpenAI:
    """OpenAI's SDK with our address, and no other change."""
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)


def test_every_port_is_at_the_loopback(cluster: Cluster) -> None:
    """Those of Ray and Serve, too: some of them unpickle what comes, without a key."""
    assert cluster.listening() <= LOOPBACK


def test_no_process_gives_way(cluster: Cluster) -> None:
    """By default Ray runs actors, GPU workers with them, with niceness 15: any other program would come first."""
    own = os.getpriority(os.PRIO_PROCESS, cluster.process.pid)
    actors = cluster.workers() | cluster.replicas("engine") | cluster.replicas("ingress") | cluster.named("ProxyActor")
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in actors} == {own}
    assert len(actors) >= 3 * REPLICAS + 1


@pytest.mark.parametrize(
    "audio_format", ["mp3", *(pytest.param(name, marks=pytest.mark.soak) for name in FORMATS if name != "mp3")]
)
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


def test_a_request_with_http_1_0_is_answered_whole(cluster: Cluster) -> None:
    """HTTP/1.0 has no chunks, and Serve's proxy cannot reset a connection: the answer has a length."""
    body = json.dumps({"input": SENTENCES[9], "response_format": "wav"}).encode()
    head = f"POST /v1/audio/speech HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    headers, _, wav = answer.partition(b"\r\n\r\n")
    assert f"content-length: {len(wav)}".encode() in headers.lower()
    assert recognise(decode(wav, "wav")) == SENTENCES[9]


def test_a_request_has_one_id(cluster: Cluster) -> None:
    """Serve's proxy gives each answer the id of its request, which is the client's if that has a sane one."""
    answer = cluster.http.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert len(cluster.http.get("/v1/models").headers.get_list("x-request-id")) == 1
    (replaced,) = cluster.http.get("/v1/models", headers={"x-request-id": "x" * 4000}).headers.get_list("x-request-id")
    assert len(replaced) == 32


def test_text_in_pieces(cluster: Cluster) -> None:
    """A WebSocket takes a text in pieces and gives the speech of all of it."""
    sentence, pcm = SENTENCES[7], b""
    with connect(f"{cluster.url.replace('http', 'ws')}/v1/audio/speech/stream", proxy=None) as live:
        live.send(json.dumps({"type": "session.config", "response_format": "pcm"}))
        for word in sentence.split():
            live.send(json.dumps({"type": "input.text", "text": word + " "}))
        live.send(json.dumps({"type": "input.done"}))
        for message in live:
            if isinstance(message, bytes):
                pcm += message
            elif json.loads(message)["type"] == "session.done":
                break
    assert recognise(pcm) == sentence


def test_saved_voices_are_those_of_the_cluster(cluster: Cluster) -> None:
    """A voice that one GPU worker has saved is found through all at once, and a deleted one is gone from all soon."""
    recording = cluster.speech(SENTENCES[9], response_format="wav").content
    upload = {"audio_sample": ("ada.wav", recording, "audio/wav")}
    made = cluster.http.post("/v1/audio/voices", data={"name": "Ada"}, files=upload)
    assert made.is_success, made.text

    def found() -> set[int]:
        # Each on a connection of its own, so that all web workers have their turn.
        addresses = [f"{cluster.url}/v1/audio/voices/{name}" for name in ("Ada", "ada") * 4]
        return {httpx.get(address, timeout=60, trust_env=False, verify=NO_TLS).status_code for address in addresses}

    assert found() == {200}
    assert cluster.http.delete("/v1/audio/voices/Ada").is_success
    eventually(lambda: found() == {404}, 60, found)


def test_figures_are_those_of_all_workers(cluster: Cluster) -> None:
    """/admin/stats, /metrics and /admin/usage have each request once, whichever GPU worker had it."""

    def figures() -> list[float]:
        stats = cluster.stats()
        lines = cluster.http.get("/metrics").text.splitlines()
        counted = [float(line.split()[-1]) for line in lines if line.startswith("tts_requests_started_total{")]
        assert len(counted) == len(stats["replicas"]) == REPLICAS
        used = sum(row["requests"] for row in cluster.http.get("/admin/usage").json()["data"])
        return [stats["requests"]["started"], sum(counted), used]

    before = figures()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: cluster.speech("One."), range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4
    eventually(lambda: [now - then for now, then in zip(figures(), before, strict=True)] == [4, 4, 4], 60, figures)
    stats, vram = cluster.stats(), cluster.http.get("/admin/vram").json()
    assert sum(one["requests"]["started"] for one in stats["replicas"]) == stats["requests"]["started"]
    assert vram["device"]["total_bytes"] == vram["replicas"][0]["device"]["total_bytes"]  # the RAM of one machine


def test_few_requests_stay_at_one_worker(cluster: Cluster) -> None:
    """The model is resident at both, and one can speak them all: the other is left alone, from all web workers."""

    def finished() -> list[int]:
        return [one["requests"]["finished"] for one in cluster.stats()["replicas"]]

    before: list[int] = []

    def settled() -> bool:
        before[:] = finished()
        # Web processes answer in turn, and each has heard of the last requests at another moment.
        return cluster.open_requests() == 0 and all(finished() == before for _ in range(8))

    eventually(settled, 60, "no request", pause_s=REPORT_INTERVAL_S)
    for _ in range(6):
        # Each on a connection of its own, so that all web workers have their turn.
        body = {"input": "One."}
        answer = httpx.post(f"{cluster.url}/v1/audio/speech", json=body, timeout=60, trust_env=False)
        assert answer.status_code == httpx.codes.OK
        eventually(lambda: seen_by_all(cluster, 0), 60, "its slot free")

    def more() -> list[int]:
        return sorted(now - then for now, then in zip(finished(), before, strict=True))

    eventually(lambda: more() == [0, 6], 60, lambda: f"six more at one: {more()}")


def test_full_queues_refuse_before_an_answer_begins(cluster: Cluster) -> None:
    """Of many requests at once, those that find every slot and every queue full get a 429 with Retry-After."""
    room = REPLICAS * (SLOTS + QUEUE)
    text = " ".join(SENTENCES[:4])
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
        listener.leave()
        soon(lambda: cluster.running() == 0, 1.0, "the slot freed")


def test_clients_that_leave_cost_others_nothing(cluster: Cluster) -> None:
    """Many leave in the middle of their answers: the credit of other streams, sent beside theirs, is not lost."""
    for _ in range(6):
        with cluster.stream(LONG[:20_000], response_format="pcm") as answer:
            next(answer.iter_raw())
    text = " ".join(SENTENCES)
    assert len({len(cluster.speech(text, response_format="pcm").content) // 48_000 for _ in range(2 * REPLICAS)}) == 1


def test_a_dead_worker_costs_its_own_streams(cluster: Cluster) -> None:
    """Its streams break, the others go on, requests are answered meanwhile, and its replica speaks again."""
    with listeners(cluster, REPLICAS * SLOTS) as streams:
        os.kill(next(iter(cluster.workers())), signal.SIGKILL)
        wait_for_broken(streams)
        for one in streams:
            if not one.ended:
                one.goes_on()
        assert cluster.speech("Hello.").status_code == httpx.codes.OK
        assert sorted(one.ended for one in streams) == ["", "", "broken", "broken"]
    eventually(lambda: cluster.stats()["slots"] == REPLICAS * SLOTS, 60, "all slots")


@pytest.mark.soak
def test_a_dead_worker_speaks_again_within_five_seconds(cluster: Cluster) -> None:
    """Nothing else runs in the cluster meanwhile."""
    eventually(lambda: cluster.stats()["slots"] == REPLICAS * SLOTS, 60, "all slots")
    limit_s = stretched(5.0)
    os.kill(next(iter(cluster.workers())), signal.SIGKILL)
    eventually(lambda: cluster.stats()["slots"] < REPLICAS * SLOTS, 60, "fewer slots")
    print(eventually(lambda: cluster.stats()["slots"] == REPLICAS * SLOTS, limit_s, "all slots"))  # noqa: T201


@pytest.mark.soak
def test_a_dead_replica_is_replaced(cluster: Cluster) -> None:
    """Its streams break, requests go elsewhere meanwhile, and Serve starts another one."""
    with listeners(cluster, REPLICAS * SLOTS) as streams:
        dead = next(iter(cluster.replicas("engine")))
        os.kill(dead, signal.SIGKILL)
        wait_for_broken(streams)
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
