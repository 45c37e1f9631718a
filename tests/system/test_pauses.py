"""Processes that stand still: a pause costs no stream, and a process that stays silent is replaced."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import httpx
import pytest

from tests.checkpoints import tiny
from tests.recogniser import SENTENCES
from tests.system.service import NO_TLS, Service, eventually, is_running, running_service

MODEL: Final = "qwen3-tts-0.6b-customvoice"
QWEN: Final = {
    "DEFAULT_MODEL": MODEL,
    "DEFAULT_DEVICE": "cpu",
    "MODEL_PATHS": f"{MODEL}={tiny('custom_voice').resolve()}",
}
TEXT: Final = "The old clock struck midnight. " * 40
LONG: Final = " ".join(SENTENCES * 20)
"""A quarter of an hour of speech: more than credits and socket buffers hold."""

REPLACED: Final = "The GPU worker has died (no answer for 3 s) and is being restarted."
SOAK_TRIES: Final = 200


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A small Qwen3-TTS model behind one web worker."""
    with running_service(tmp_path_factory.mktemp("pauses"), **QWEN) as service:
        yield service


@pytest.fixture(scope="module")
def whole(qwen: Service) -> bytes:
    """The pcm of TEXT, undisturbed."""
    return qwen.speech(TEXT, response_format="pcm", seed=5, stream=False).content


def processes(service: Service) -> dict[str, list[int]]:
    """The processes that a test may stop."""
    worker, web = service.worker_pid(), list(service.web_pids())
    return {"GPU worker": [worker], "web worker": web, "both": [worker, *web]}


def stop_for(pids: list[int], pause_s: float) -> None:
    """Stop the processes, and let them go on after the pause."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(pause_s)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def test_a_pause_in_the_middle_of_a_stream(shared_service: Service) -> None:
    """Nothing of the speech is lost, and all processes are the same afterwards."""
    text = " ".join(SENTENCES * 4)
    expected = len(shared_service.speech(text, response_format="pcm", stream=False).content)
    before = processes(shared_service)
    with shared_service.stream(text, response_format="pcm") as answer:
        pieces = answer.iter_raw(4800)
        heard = len(next(pieces))
        stop_for(before["both"], 1.0)
        heard += sum(map(len, pieces))
    assert heard == pytest.approx(expected, rel=0.001)  # espeak-ng's audio varies slightly
    assert processes(shared_service) == before


def speak_through_a_pause(service: Service, whole: bytes, pids: list[int], after_s: float, pause_s: float) -> None:
    """Stop the processes `after_s` into a request, for `pause_s`: the answer is whole."""
    pausing = threading.Timer(after_s, stop_for, (pids, pause_s))
    pausing.start()
    request = {"input": TEXT, "response_format": "pcm", "seed": 5}
    with httpx.stream("POST", service.url + "/v1/audio/speech", json=request, timeout=60) as answer:
        heard = answer.read()
    pausing.join()
    assert answer.status_code == httpx.codes.OK
    assert heard == whole


@pytest.mark.soak
@pytest.mark.parametrize("stopped", ["GPU worker", "web worker", "both"])
@pytest.mark.parametrize("pause_s", [2.0, 10.0])
def test_a_pause_costs_no_stream(qwen: Service, whole: bytes, stopped: str, pause_s: float) -> None:
    """Any process may stand still in the middle of a stream: every sample arrives, and the process is the same."""
    worker = qwen.worker_pid()
    speak_through_a_pause(qwen, whole, processes(qwen)[stopped], 0.1, pause_s)
    assert qwen.worker_pid() == worker


@pytest.mark.soak
def test_a_request_that_comes_during_a_pause_is_answered(qwen: Service, whole: bytes) -> None:
    """The service is not ready while the GPU worker is silent for more than five seconds; requests wait for it."""
    worker = qwen.worker_pid()
    os.kill(worker, signal.SIGSTOP)
    try:
        eventually(lambda: not qwen.is_ready(), 60, "not ready")
        unready = qwen.http.get("/ready")
        with ThreadPoolExecutor(1) as pool:
            speaking = pool.submit(qwen.speech, TEXT, response_format="pcm", seed=5)
            time.sleep(0.2)
            assert not speaking.done()
            os.kill(worker, signal.SIGCONT)
            assert speaking.result(30).content == whole
    finally:
        os.kill(worker, signal.SIGCONT)
    assert unready.status_code == httpx.codes.SERVICE_UNAVAILABLE
    assert "has not answered for" in unready.json()["error"]["message"]
    assert int(unready.headers["retry-after"]) > 20


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_any_pause_at_any_moment(qwen: Service, whole: bytes) -> None:
    """Pauses of 0.5 to 10 s of any process at any stage of a request: nothing is lost, nothing breaks."""
    seed = random.randrange(1_000_000)  # noqa: S311 -- printed, to run it again
    print(f"seed {seed}")  # noqa: T201 -- for the person who has to run it again
    random_ = random.Random(seed)  # noqa: S311 -- as above
    worker = qwen.worker_pid()
    for _ in range(SOAK_TRIES):
        pids = random_.choice(list(processes(qwen).values()))
        speak_through_a_pause(qwen, whole, pids, random_.uniform(0, 1.0), random_.uniform(0.5, 10))
    assert qwen.worker_pid() == worker


def refusal(service: Service) -> dict[str, object]:
    """The error that /ready answers with; empty if the service is ready."""
    answer = service.http.get("/ready").json()
    error: dict[str, object] = answer.get("error", {})
    return error


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two web workers, and a short timeout. Each test leaves a service that has recovered."""
    with running_service(tmp_path_factory.mktemp("impatient"), WORKER_TIMEOUT=3, WEB_WORKERS=2) as service:
        service.wait_serving(2)
        yield service


def test_a_worker_that_stays_silent_is_replaced(impatient: Service) -> None:
    """After the timeout its streams break, the log has the reason and the stacks, and speech is back."""
    worker = impatient.worker_pid()
    with impatient.stream(LONG, response_format="pcm") as answer:
        pieces = answer.iter_raw(4800)
        next(pieces)
        os.kill(worker, signal.SIGSTOP)
        stopped = time.monotonic()
        with pytest.raises(httpx.TransportError):
            list(pieces)
    assert time.monotonic() - stopped > 2
    eventually(lambda: not is_running(worker), 60, "the worker killed")
    killed = time.monotonic()
    # The web worker hears of it a moment later; until then it answers as if the worker were silent.
    eventually(lambda: refusal(impatient).get("message") == REPLACED, 45, lambda: str(refusal(impatient)))
    refused = impatient.speech("Hello.")
    eventually(impatient.is_ready, 90, "speech again")
    took_s = time.monotonic() - killed
    log = impatient.log.read_text()
    assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
    assert refused.json()["error"]["message"] == REPLACED
    # The start before this one took as long, give or take a busy machine.
    assert 1 <= int(refused.headers["retry-after"]) <= 5 * took_s
    assert "worker_hangs" in log
    assert "most recent call first" in log
    assert "gpu_worker/worker.py" in log


def client_of_each_web_worker(service: Service, stack: contextlib.ExitStack) -> dict[int, httpx.Client]:
    """For each of two web workers, by process id, a client whose connection leads to it."""
    found: dict[int, httpx.Client] = {}

    def both() -> bool:
        options = {"timeout": 30, "trust_env": False, "verify": NO_TLS}
        client = stack.enter_context(httpx.Client(base_url=service.url, **options))  # type: ignore[arg-type]
        stats = client.get("/admin/stats")
        if stats.is_success:  # the web worker has found the GPU worker
            found[stats.json()["web_pid"]] = client
        return len(found) == 2

    eventually(both, 60, "a connection to each web worker")
    return found


def test_a_web_worker_that_stays_silent_is_replaced(impatient: Service) -> None:
    """Its streams break, those of the other web worker go on, and the log has the reason and the stacks."""
    request = {"input": TEXT, "response_format": "pcm"}
    worker = impatient.worker_pid()
    with contextlib.ExitStack() as stack:
        clients = client_of_each_web_worker(impatient, stack)
        (stopped, theirs), (other, ours) = clients.items()
        whole = ours.post("/v1/audio/speech", json=request | {"stream": False}).content
        # Too long to end in the second that the stopped web worker gets to write its stacks.
        long = request | {"input": LONG}
        broken = stack.enter_context(theirs.stream("POST", "/v1/audio/speech", json=long)).iter_raw(4800)
        next(broken)
        heard = stack.enter_context(ours.stream("POST", "/v1/audio/speech", json=request)).iter_raw(4800)
        first = next(heard)
        os.kill(stopped, signal.SIGSTOP)
        stopped_at = time.monotonic()
        assert len(first + b"".join(heard)) == pytest.approx(len(whole), rel=0.001)
        assert ours.get("/health").status_code == httpx.codes.OK
        eventually(lambda: not is_running(stopped), 60, "the stopped web worker killed")
        assert time.monotonic() - stopped_at > 2
        with pytest.raises(httpx.TransportError):
            list(broken)
    assert other in impatient.wait_serving(2)
    assert impatient.worker_pid() == worker
    log = impatient.log.read_text()
    assert "web_worker_hangs" in log
    assert "cause='no answer for 3 s'" in log
    assert "granian/server/mp.py" in log
