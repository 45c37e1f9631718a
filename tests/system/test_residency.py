"""Several models on one small device: who comes, who leaves, and what nobody may notice of it."""

import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import httpx
import pytest
import zmq

from shared.protocol import VERSION, Audio, Credit, Finished, Hello, Message, Speak, decode_from_worker, encode
from shared.sockets import connect_dealer
from tests.recogniser import SENTENCES
from tests.system.residents import (
    DESIGN,
    EXACT_MALLOC,
    LARGE,
    MODELS,
    SMALL,
    STAYS,
    Residents,
    checkpoints,
    model_paths,
)
from tests.system.service import START_TIMEOUT_S, Service, eventually, resident_bytes, stretched
from tests.system.test_faults import slow_reader

ESPEAK: Final = "espeak-ng"
LONG: Final = " ".join(SENTENCES * 100)[:99_000]
"""An hour and a half of speech: a few seconds of espeak-ng's work, and more than a slow reader's buffers hold."""

MINUTES: Final = LONG[:4000]
"""Minutes of speech, which the small models take as long to make."""

BUDGET_MIB: Final = 218
"""Any two of the three models fit (they take 98, 104 and 104 MiB), all of them do not."""

IDLE_S: Final = 1.0
HOST_IDLE_S: Final = 1.5
CHECK_S: Final = 0.2
SLACK_S: Final = 1.5
"""What a check and a reading of the books may take beside that, on a busy machine."""

GAP_S: Final = 0.25

KEEP: Final = {"keep_alive": -1}
"""Not to be evicted for idleness, but for others' sake."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of the three checkpoints, which a test may damage and then mend."""
    directory = tmp_path_factory.mktemp("checkpoints")
    return {model: Path(shutil.copytree(path, directory / model)) for model, path in checkpoints().items()}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, paths: dict[str, Path]) -> Iterator[Service]:
    """A service with room for two of three models, which leave when idle for a second."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in EXACT_MALLOC.items():
            environment.setenv(name, value)
        service = Service(
            tmp_path_factory.mktemp("residency"),
            MODEL_PATHS=model_paths(paths),
            DEFAULT_DEVICE="cpu",
            DEFAULT_MODEL=ESPEAK,
            VRAM_BUDGET_MB=BUDGET_MIB,
            IDLE_TIMEOUT=IDLE_S,
            HOST_IDLE_TIMEOUT=HOST_IDLE_S,
            CLEANUP_INTERVAL=CHECK_S,
        )
    try:
        yield service.wait_ready(90)  # importing torch beside other tests takes its time
        assert service.stop() == 0
    finally:
        service.kill()


@pytest.fixture
def models(service: Service) -> Iterator[Residents]:
    """The three models, all of them absent."""
    residents = Residents(service)
    residents.forget()
    yield residents
    residents.forget()


class Listener:
    """Listens to espeak-ng as fast as it speaks, one request after the other, and notes the longest silence."""

    def __init__(self, service: Service) -> None:
        self._url = service.url + "/v1/audio/speech"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self.longest_gap_s = 0.0
        self.pieces = 0

    def __enter__(self) -> Self:
        self._thread.start()
        eventually(lambda: self.pieces > 100, 20, "speech")
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(20)

    def _listen(self) -> None:
        request = {"input": LONG, "model": ESPEAK, "response_format": "pcm"}
        while not self._ended.is_set():
            with httpx.stream("POST", self._url, json=request, timeout=30) as answer:
                last = None
                for _ in answer.iter_raw():
                    now = time.monotonic()
                    if last is not None:
                        self.longest_gap_s = max(self.longest_gap_s, now - last)
                        self.pieces += 1
                    last = now
                    if self._ended.is_set():
                        break


def test_loading_does_not_silence_others(service: Service) -> None:
    """While models are loaded, offloaded, restored and dropped, another's stream pauses for less than 250 ms.

    The first test of the file, so that the first load of the process is among them.
    """
    models = Residents(service)
    limit_s = stretched(GAP_S)
    with Listener(service) as listener:
        for model in (SMALL, LARGE):
            models.do(model, "load")
        models.say(DESIGN, **KEEP)
        models.say(SMALL, keep_alive=0)
        models.say(SMALL, **KEEP)
        for model in MODELS:
            models.do(model, "unload")
    assert listener.pieces > 200
    assert listener.longest_gap_s < max(limit_s, stretched(GAP_S))


def test_two_engines_speak_at_once(models: Residents) -> None:
    """espeak-ng and Qwen3-TTS stream at the same time, and each says what it says alone.

    espeak-ng says nothing twice with the very same samples.
    """
    espeak = {"model": ESPEAK, "response_format": "pcm"}
    qwen = models.fields(SMALL, stream=True, max_new_tokens=30)
    text = " ".join(SENTENCES * 3)
    alone = [models.service.speech(text, **espeak).content, models.service.speech("Good morning.", **qwen).content]
    with models.service.stream("Good morning.", **qwen) as slow, models.service.stream(text, **espeak) as fast:
        slow_pieces, fast_pieces = slow.iter_raw(), fast.iter_raw()
        heard = [next(fast_pieces), next(slow_pieces)]  # both speak before either is done
        heard = [heard[0] + b"".join(fast_pieces), heard[1] + b"".join(slow_pieces)]
    assert len(heard[0]) == pytest.approx(len(alone[0]), rel=0.001)
    assert heard[1] == alone[1]


class TestBudget:
    """Room for two of three."""

    def test_figures(self, models: Residents) -> None:
        """Any two models fit the budget, all three do not: what the tests below rest on."""
        held = []
        for model in MODELS:
            held.append(sum(models.do(model, "load")["bytes"].values()))
            models.do(model, "unload")
        budget = models.vram()["device"]["budget_bytes"]
        assert budget == BUDGET_MIB * 2**20
        assert sum(held) - min(held) <= budget < sum(held)

    def test_any_order(self, models: Residents) -> None:
        """Each request is answered in whatever order they come: the least recently used model makes room.

        What it says is the same to the bit, however often its weights have been away.
        """
        first: dict[str, bytes] = {}
        used: list[str] = []
        # Every order of three different models is in here.
        for model in (SMALL, LARGE, DESIGN, SMALL, LARGE, SMALL, DESIGN, LARGE, SMALL):
            pcm = models.say(model, **KEEP)
            assert pcm == first.setdefault(model, pcm)
            used = [model, *(other for other in used if other != model)]
            away = {other: "offloaded" if other in first else "absent" for other in MODELS}
            assert models.places() == {**away, **dict.fromkeys(used[:2], "resident")}
        models.do(SMALL, "unload")
        assert models.say(SMALL, **KEEP) == first[SMALL]

    def test_pinned_stays(self, models: Residents) -> None:
        """A pinned model does not make room, though it was used longest ago."""
        models.say(SMALL, **KEEP)
        assert models.do(SMALL, "pin")["pinned"]
        models.say(LARGE, **KEEP)
        models.say(DESIGN, **KEEP)
        assert models.places() == {SMALL: "resident", LARGE: "offloaded", DESIGN: "resident"}

    def test_no_room(self, models: Residents) -> None:
        """What cannot fit is refused with the arithmetic and when to try again; nothing moved, and others speak on."""
        for model in (LARGE, DESIGN):
            models.do(model, "load")
            models.do(model, "pin")
        refused = models.ask(SMALL)
        assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
        error = refused.json()["error"]
        assert (error["code"], error["type"], error["param"]) == ("insufficient_vram", "server_error", "model")
        for part in (f"budget of {BUDGET_MIB} MiB", f"{LARGE} 104 MiB (pinned)", f"{DESIGN} 104 MiB (pinned)"):
            assert part in error["message"]
        assert int(refused.headers["retry-after"]) == 60
        assert models.post(SMALL, "load").status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert models.places() == {SMALL: "absent", LARGE: "resident", DESIGN: "resident"}
        models.say(LARGE)
        models.do(LARGE, "unpin")
        models.say(SMALL)

    def test_busy_stays(self, models: Residents) -> None:
        """A model that speaks does not make room: who needs the room waits, and speaks as soon as there is some."""
        models.do(DESIGN, "load")
        models.do(DESIGN, "pin")
        fields = models.fields(LARGE, stream=True, max_new_tokens=None)
        with ThreadPoolExecutor(1) as pool:
            with slow_reader(models.service, MINUTES, **fields):
                eventually(lambda: models.service.stats()["running"] == 1, 20, "a stream")
                waiting = pool.submit(models.say, SMALL, **KEEP)
                eventually(lambda: models.service.stats()["queued"] == 1, 5, "another request")
                assert models.post(LARGE, "unload").status_code == httpx.codes.CONFLICT
                assert models.places() == {SMALL: "absent", LARGE: "resident", DESIGN: "resident"}
            assert waiting.result(20)
        assert models.places() == {SMALL: "resident", LARGE: "offloaded", DESIGN: "resident"}

    def test_two_at_once_beside_one_that_is_pinned(self, models: Residents) -> None:
        """Requests of two models that come together where one of them fits are both answered."""
        models.do(DESIGN, "load")
        models.do(DESIGN, "pin")
        with ThreadPoolExecutor(2) as pool:
            said = list(pool.map(models.say, [SMALL, LARGE] * 3))
        assert said[:2] * 3 == said


class TestIdle:
    """Models leave on their own."""

    def test_leaves_the_device_and_then_the_host(self, models: Residents) -> None:
        """Idle for the timeout, a model is offloaded; after the host's timeout it is gone. What it holds goes along."""
        models.do(SMALL, "load")
        held = models.books()[SMALL]["bytes"]
        took_s = models.wait_for(lambda books: books[SMALL]["state"] == "offloaded", 10, "offloaded")
        assert took_s < IDLE_S + CHECK_S + SLACK_S
        books = models.books()[SMALL]
        assert (books["bytes"], books["host_bytes"]) == ({}, sum(held[what] for what in STAYS))
        took_s = models.wait_for(lambda books: books[SMALL]["state"] == "absent", 10, "dropped")
        assert took_s < HOST_IDLE_S + CHECK_S + SLACK_S
        assert models.books()[SMALL]["host_bytes"] == 0
        passes = models.service.http.post("/admin/cleanup").json()
        assert (passes["status"], passes["cleanup_enabled"]) == ("running", True)
        assert time.time() - passes["timestamp"] < CHECK_S + SLACK_S

    def test_keep_alive(self, models: Residents) -> None:
        """A request says how long its model stays: not at all, two seconds, or until others need the room."""
        models.say(SMALL, keep_alive=0)
        models.wait_for(lambda books: books[SMALL]["state"] == "offloaded", CHECK_S + 0.5, "gone at once")
        models.say(LARGE, **KEEP)
        models.say(SMALL, keep_alive="2s")
        said = time.monotonic()
        models.wait_for(lambda books: books[SMALL]["state"] == "offloaded", 10, "gone after two seconds")
        assert 2.0 - 0.1 < time.monotonic() - said < 2.0 + CHECK_S + SLACK_S
        large = models.books()[LARGE]
        assert large["idle_s"] > 2 * IDLE_S
        assert (large["state"], large["keep_alive_s"]) == ("resident", -1)

    def test_pinned_stays(self, models: Residents) -> None:
        """A pinned model is not idle, however long nobody asks; once let go it leaves."""
        models.do(SMALL, "load")
        models.do(SMALL, "pin")
        models.wait_for(lambda books: books[SMALL]["idle_s"] > IDLE_S + 2 * CHECK_S + 0.5, 10, "idle for long")
        assert models.places()[SMALL] == "resident"
        models.do(SMALL, "unpin")
        models.wait_for(lambda books: books[SMALL]["state"] == "offloaded", CHECK_S + SLACK_S, "offloaded")

    def test_never_during_a_stream(self, models: Residents) -> None:
        """A model that speaks stays, even where its reader has stopped taking anything; the rest is still heard."""
        with (
            slow_reader(models.service, LONG, model=ESPEAK, response_format="pcm"),
            peer_of(models.service.worker_pid()) as peer,
        ):
            peer.send(
                Speak(
                    id="stalled",
                    client="reader",
                    model=SMALL,
                    task="CustomVoice",
                    text=SENTENCES[0],
                    voice="ryan",
                    credit=1,
                )
            )
            while not isinstance(peer.receive(), Audio):
                pass
            began = time.monotonic()
            # The credit is used up: nothing more is heard, and nothing happens for longer than any timeout.
            assert not peer.hears_anything(2 * IDLE_S + 2 * CHECK_S)
            assert time.monotonic() - began > 2 * IDLE_S
            books = models.books()
            for model in (SMALL, ESPEAK):
                assert (books[model]["state"], books[model]["references"]) == ("resident", 1)
            peer.send(Credit(id="stalled", chunks=1000))
            heard = [0]
            while not isinstance(message := peer.receive(), Finished):
                if isinstance(message, Audio):
                    heard.append(message.seq)
        assert heard == list(range(len(heard)))
        assert len(heard) > 1
        models.wait_for(lambda books: books[SMALL]["state"] == "offloaded", IDLE_S + CHECK_S + SLACK_S, "offloaded")


class Peer:
    """A web worker's end of a conversation that grants no credit unless told to."""

    def __init__(self, dealer: "zmq.Socket[bytes]") -> None:
        self._dealer = dealer

    def send(self, message: Message) -> None:
        """Say something."""
        self._dealer.send_multipart(encode(message))

    def receive(self) -> Message:
        """The next message."""
        assert self.hears_anything(20), "the worker says nothing"
        message: Message = decode_from_worker(self._dealer.recv_multipart())[0]
        return message

    def hears_anything(self, within_s: float) -> bool:
        """Whether there is a message, or one comes in that time."""
        return bool(self._dealer.poll(within_s * 1000))


@contextmanager
def peer_of(worker: int) -> Iterator[Peer]:
    """A second web worker of the GPU worker with this process id, which has said hello."""
    variables = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    environment = dict(os.fsdecode(variable).split("=", 1) for variable in variables if b"=" in variable)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = connect_dealer(context, environment["TTS_WORKER_URL"])
    try:
        peer = Peer(dealer)
        peer.send(Hello(version=VERSION, token=environment.get("TTS_WORKER_TOKEN", "")))
        peer.receive()
        yield peer
    finally:
        dealer.close()
        context.term()


def vanish(checkpoint: Path) -> None:
    """The weights are gone."""
    (checkpoint / "model.safetensors").unlink()


def cut(checkpoint: Path) -> None:
    """The weights end too early."""
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 2)


def cut_codec(checkpoint: Path) -> None:
    """The speech tokenizer's weights end too early: those of the models that speak are in memory."""
    with (checkpoint / "speech_tokenizer" / "model.safetensors").open("r+b") as file:
        file.truncate(4_000)


def spoil_tokenizer(checkpoint: Path) -> None:
    """The text tokenizer's files are there, and make no tokenizer: seen when the weights are loaded already."""
    (checkpoint / "vocab.json").write_text(json.dumps({"not": "a vocabulary"}))
    (checkpoint / "merges.txt").write_text("spoilt")
    (checkpoint / "tokenizer_config.json").write_text("[]")


def test_moves_leave_nothing_behind(models: Residents) -> None:
    """A load, an offload, a restore and a drop leave the memory as it was; the long run of this is a soak test."""
    worker = models.service.worker_pid()
    said = {models.go_round(SMALL) for _ in range(8)}
    before_bytes = resident_bytes(worker)
    said |= {models.go_round(SMALL) for _ in range(12)}
    assert resident_bytes(worker) < 1.01 * before_bytes
    assert len(said) == 1


class TestFailedLoad:
    """A load that does not work."""

    @pytest.mark.parametrize("damage", [cut_codec, vanish, cut, spoil_tokenizer])
    def test_is_as_if_it_had_not_been(
        self, models: Residents, paths: dict[str, Path], damage: Callable[[Path], None]
    ) -> None:
        """503 names what is wrong; others speak on; nothing is held afterwards; mended, the model speaks as before."""
        said = models.say(SMALL)
        models.say(LARGE, **KEEP)
        models.do(SMALL, "unload")
        whole = paths[SMALL].with_name("whole")
        shutil.copytree(paths[SMALL], whole)
        try:
            damage(paths[SMALL])
            refused = models.ask(SMALL)
            worker = models.service.worker_pid()
            before_bytes, held = resident_bytes(worker), models.books()
            with ThreadPoolExecutor(1) as pool:
                others = pool.submit(models.say, LARGE, max_new_tokens=20, **KEEP)
                refusals = [models.ask(SMALL) for _ in range(4)]
                others.result()
            after_bytes, books = resident_bytes(worker), models.books()
        finally:
            shutil.rmtree(paths[SMALL])
            whole.rename(paths[SMALL])
        for answer in (refused, *refusals):
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            assert answer.json()["error"]["code"] == "model_unavailable"
            assert str(paths[SMALL]) in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) >= 1
        assert books[SMALL]["state"] in {"absent", "unavailable"}
        assert (books[SMALL]["bytes"], books[SMALL]["host_bytes"], books[SMALL]["references"]) == ({}, 0, 0)
        assert (books[LARGE]["state"], books[LARGE]["bytes"]) == ("resident", held[LARGE]["bytes"])
        # The weights alone are 18 MiB, and four loads failed.
        assert after_bytes - before_bytes < 12 * 2**20
        assert models.say(SMALL) == said

    def test_memory_runs_out(self, models: Residents) -> None:
        """A load for which the system has no memory is refused as such, frees what it had, and works once there is."""
        # In a fresh process: the heap of one that has moved many models has holes, in which another finds room.
        os.kill(before := models.service.worker_pid(), signal.SIGKILL)

        def fresh() -> bool:
            stats = models.service.http.get("/admin/stats")
            return stats.status_code == httpx.codes.OK and stats.json()["worker"]["pid"] != before

        eventually(fresh, START_TIMEOUT_S, "another worker")
        said = models.say(SMALL)
        models.do(SMALL, "unload")
        worker = models.service.worker_pid()
        unlimited = resource.prlimit(worker, resource.RLIMIT_DATA)
        held = data_bytes(worker)
        # Half of what the model needs: small things still find room.
        resource.prlimit(worker, resource.RLIMIT_DATA, (held + 20 * 2**20, unlimited[1]))
        try:
            refused = [models.ask(SMALL) for _ in range(2)]
            espeak = models.service.speech("Hello.", model=ESPEAK)
        finally:
            resource.prlimit(worker, resource.RLIMIT_DATA, unlimited)
        for answer in refused:
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            assert answer.json()["error"]["code"] == "insufficient_vram"
        assert espeak.status_code == httpx.codes.OK
        assert models.service.worker_pid() == worker
        assert models.places()[SMALL] == "absent"
        assert data_bytes(worker) - held < 12 * 2**20
        assert models.say(SMALL) == said

    def test_damage_on_disk_is_nothing_to_a_model_in_memory(self, models: Residents, paths: dict[str, Path]) -> None:
        """Offloaded weights come back without their files."""
        said = models.say(SMALL, keep_alive=0)
        models.wait_for(lambda books: books[SMALL]["state"] == "offloaded", 5, "offloaded")
        away = paths[SMALL].with_name("away")
        paths[SMALL].rename(away)
        try:
            assert models.say(SMALL) == said
        finally:
            away.rename(paths[SMALL])


def data_bytes(pid: int) -> int:
    """What RLIMIT_DATA counts: private writable memory, heap and anonymous mappings."""
    status: dict[str, Any] = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return int(status["VmData"].split()[0]) * 1024
