"""Several models over real timers and a real process: loads, evictions and idle timeouts, and their side effects.

The rules themselves are tested with a fake clock in tests/gpu_worker/residency.
"""

import json
import os
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self

import httpx
import pytest

from shared.protocol import Audio, Credit, Finished, Probe, Segment, Speak
from tests.recogniser import SENTENCES
from tests.system.residency_service import (
    DESIGN,
    EXACT_MALLOC,
    LARGE,
    MODELS,
    SMALL,
    STAYS,
    ResidencyService,
    checkpoints,
    enlarge_tokenizer,
    model_paths,
)
from tests.system.service import (
    START_TIMEOUT_S,
    Service,
    eventually,
    in_time,
    resident_bytes,
    running_service,
    slow_reader,
    soon,
)
from tests.system.worker_client import WorkerClient

ESPEAK: Final = "espeak-ng"
LONG: Final = " ".join(SENTENCES * 100)[:99_000]
"""An hour and a half of speech: espeak-ng makes it in seconds, and a slow reader's buffers cannot hold it."""

MINUTES: Final = LONG[:4000]
"""Minutes of speech; the small models take as long to make it."""

SLOTS: Final = 2
"""Enough for each test. A load takes half the time that it takes with the eight slots of the default."""

BUDGET_MIB: Final = 180
"""Any two of the three models fit (they take 79, 85 and 85 MiB), all of them do not."""

IDLE_S: Final = 0.6
HOST_IDLE_S: Final = 1.0
CHECK_S: Final = 0.1
SLACK_S: Final = 1.5
"""A test may see a transition so much later on a busy machine."""

GAP_S: Final = 0.25

KEEP: Final = {"keep_alive": -1}
"""Never idle: only another model's load evicts such a model."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of the three checkpoints, SMALL's with a large text tokenizer.

    A test may damage one, and must restore it.
    """
    directory = tmp_path_factory.mktemp("checkpoints")
    copies = {model: Path(shutil.copytree(path, directory / model)) for model, path in checkpoints().items()}
    enlarge_tokenizer(copies[SMALL])
    return copies


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, paths: dict[str, Path]) -> Iterator[Service]:
    """A service with room for two of three models, and short idle timeouts."""
    settings = {
        "MODEL_PATHS": model_paths(paths),
        "DEFAULT_DEVICE": "cpu",
        "DEFAULT_MODEL": ESPEAK,
        "MAX_CONCURRENCY": SLOTS,
        "VRAM_BUDGET_MB": BUDGET_MIB,
        "IDLE_TIMEOUT": IDLE_S,
        "HOST_IDLE_TIMEOUT": HOST_IDLE_S,
        "CLEANUP_INTERVAL": CHECK_S,
    }
    with pytest.MonkeyPatch.context() as variables:
        for name, value in EXACT_MALLOC.items():
            variables.setenv(name, value)
        with running_service(tmp_path_factory.mktemp("residency"), **settings) as service:
            yield service


@pytest.fixture
def models(service: Service) -> ResidencyService:
    """The three models, all of them absent."""
    residency = ResidencyService(service)
    residency.unload_all()
    return residency


class Listener:
    """Reads espeak-ng's streams one after the other as fast as they come, and measures the longest gap."""

    def __init__(self, service: Service) -> None:
        self._url = service.url + "/v1/audio/speech"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self.longest_gap_s = 0.0
        self.pieces = 0

    def __enter__(self) -> Self:
        self._thread.start()
        eventually(lambda: self.pieces > 100, 60, "speech")
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
    """While a model is loaded, offloaded, restored and dropped, another model's stream pauses for less than 250 ms.

    Must be the first test of the file, so that the first load of the process is among them.
    """
    models = ResidencyService(service)
    with Listener(service) as listener:
        models.do(SMALL, "load")
        models.say(SMALL, keep_alive=0)
        models.wait_for_state(SMALL, "offloaded", 60)
        models.say(SMALL, **KEEP)
        models.do(SMALL, "unload")
    assert listener.pieces > 200
    assert in_time(listener.longest_gap_s, GAP_S)


def test_two_engines_speak_at_once(models: ResidencyService) -> None:
    """espeak-ng and Qwen3-TTS stream at the same time, and each gives the same audio as alone.

    espeak-ng's audio varies slightly: only its length is compared.
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
    """Room for two of three models."""

    def test_any_order(self, models: ResidencyService) -> None:
        """Each load evicts the least recently used model, and every request is answered.

        Offloads and restores change no sample. Any two models fit the budget, all three do not:
        the other tests rely on that.
        """
        first: dict[str, bytes] = {}
        held: dict[str, int] = {}
        used: list[str] = []
        for model in (SMALL, LARGE, DESIGN, SMALL, LARGE):
            pcm = models.say(model, **KEEP)
            assert pcm == first.setdefault(model, pcm)
            used = [model, *(other for other in used if other != model)]
            evicted = {other: "offloaded" if other in first else "absent" for other in MODELS}
            entries = models.entries()
            states = {other: entries[other]["state"] for other in MODELS}
            assert states == {**evicted, **dict.fromkeys(used[:2], "resident")}
            held[model] = sum(entries[model]["bytes"].values())
        budget = models.vram()["device"]["budget_bytes"]
        assert budget == BUDGET_MIB * 2**20
        assert sum(held.values()) - min(held.values()) <= budget < sum(held.values())
        models.do(SMALL, "unload")
        assert models.say(SMALL, **KEEP) == first[SMALL]

    def test_no_room(self, models: ResidencyService) -> None:
        """A load that cannot fit is refused with arithmetic and Retry-After; no model moves, and others speak on."""
        for model in (LARGE, DESIGN):
            models.do(model, "load")
            models.do(model, "pin")
        refused = models.ask(SMALL)
        assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
        error = refused.json()["error"]
        assert (error["code"], error["type"], error["param"]) == ("insufficient_vram", "server_error", "model")
        for part in (f"budget of {BUDGET_MIB} MiB", rf"{LARGE} \d\d MiB \(pinned\)", rf"{DESIGN} \d\d MiB \(pinned\)"):
            assert re.search(part, error["message"])
        assert int(refused.headers["retry-after"]) == 60
        assert models.post(SMALL, "load").status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert models.states() == {SMALL: "absent", LARGE: "resident", DESIGN: "resident"}
        models.say(LARGE)
        models.do(LARGE, "unpin")
        models.say(SMALL)

    @pytest.mark.soak
    def test_busy_stays(self, models: ResidencyService) -> None:
        """A model with a running request is not evicted: a request that needs its room waits until it ends.

        A client that leaves meanwhile, whatever form of answer it wants, leaves the queue within 500 ms.
        """
        models.do(DESIGN, "load")
        models.do(DESIGN, "pin")
        fields = models.fields(LARGE, stream=True, max_new_tokens=None)
        with ThreadPoolExecutor(1) as pool:
            with slow_reader(models.service, MINUTES, **fields):
                eventually(lambda: models.service.running() == 1, 60, "a stream")
                for form in ({}, {"stream": True}, {"stream": True, "stream_format": "sse"}):
                    leaving = slow_reader(models.service, "Hello.", **models.fields(SMALL, **form))
                    eventually(lambda: models.service.queued() == 1, 60, "a request in the queue")
                    leaving.close()
                    soon(lambda: models.service.queued() == 0, 0.5, "an empty queue")
                waiting = pool.submit(models.say, SMALL, **KEEP)
                eventually(lambda: models.service.queued() == 1, 60, "another request")
                assert models.post(LARGE, "unload").status_code == httpx.codes.CONFLICT
                assert models.states() == {SMALL: "absent", LARGE: "resident", DESIGN: "resident"}
            assert waiting.result(60)
        states = models.states()
        assert (states[SMALL], states[DESIGN]) == ("resident", "resident")
        assert states[LARGE] in {"offloaded", "absent"}  # absent after TTS_HOST_IDLE_TIMEOUT

    @pytest.mark.soak
    def test_two_at_once_beside_a_pinned_model(self, models: ResidencyService) -> None:
        """Simultaneous requests for two models, of which only one fits, are all answered."""
        models.do(DESIGN, "load")
        models.do(DESIGN, "pin")
        with ThreadPoolExecutor(2) as pool:
            said = list(pool.map(models.say, [SMALL, LARGE] * 3))
        assert said[:2] * 3 == said


class TestIdle:
    """Idle models are evicted without a request."""

    def test_leaves_the_device_and_then_the_host(self, models: ResidencyService) -> None:
        """After TTS_IDLE_TIMEOUT a model is offloaded, after TTS_HOST_IDLE_TIMEOUT dropped; its bytes go with it."""
        models.do(SMALL, "load")
        held = models.entries()[SMALL]["bytes"]
        stays = sum(held[purpose] for purpose in STAYS)
        # The state changes as soon as the model begins to leave, and its bytes when it has left.
        took_s = models.wait_for_state(SMALL, "offloaded", 60)
        models.wait_for(
            lambda entries: (entries[SMALL]["bytes"], entries[SMALL]["host_bytes"]) == ({}, stays), 60, "RAM"
        )
        assert in_time(took_s, IDLE_S + CHECK_S + SLACK_S)
        took_s = models.wait_for_state(SMALL, "absent", 60)
        models.wait_for(lambda entries: entries[SMALL]["host_bytes"] == 0, 60, "RAM given back")
        assert in_time(took_s, HOST_IDLE_S + CHECK_S + SLACK_S)
        passes = models.service.http.post("/admin/cleanup").json()
        assert (passes["status"], passes["cleanup_enabled"]) == ("running", True)
        assert in_time(time.time() - passes["timestamp"], CHECK_S + SLACK_S)

    @pytest.mark.soak
    def test_keep_alive(self, models: ResidencyService) -> None:
        """A request's keep_alive: evict at once, after a second, or only for another model's load."""
        models.say(SMALL, keep_alive=0)
        models.wait_for_state(SMALL, "offloaded", CHECK_S + 0.5)
        models.say(LARGE, **KEEP)
        models.say(SMALL, keep_alive="1s")
        ended = time.monotonic()
        models.wait_for_state(SMALL, "offloaded", 10)
        assert 1.0 - 0.1 < time.monotonic() - ended < 1.0 + CHECK_S + SLACK_S
        large = models.entries()[LARGE]
        assert large["idle_s"] > IDLE_S
        assert (large["state"], large["keep_alive_s"]) == ("resident", -1)

    def test_idle_while_its_reader_takes_its_time(self, models: ResidencyService) -> None:
        """Speech that is complete waits for its reader in the audio buffer: the model leaves, and the rest arrives."""
        with client_of(models.service.worker_pid()) as client:
            client.send(
                Speak(
                    id="stalled",
                    client="reader",
                    model=SMALL,
                    task="CustomVoice",
                    segments=[Segment(text=SENTENCES[0])],
                    voice="ryan",
                    credit=1,
                )
            )
            while not isinstance(client.receive(), Audio):
                pass
            # The credit is used up: the worker sends nothing more.
            models.wait_for_state(SMALL, "offloaded", 60)
            assert models.entries()[SMALL]["references"] == 0
            while client.wait_for_message(0):
                assert isinstance(client.receive(), Probe)
            client.send(Credit(id="stalled", chunks=1000))
            heard = [0]
            while not isinstance(message := client.receive(), Finished):
                if isinstance(message, Audio):
                    heard.append(message.seq)
        assert heard == list(range(len(heard)))
        assert len(heard) > 1


def client_of(worker: int) -> WorkerClient:
    """A second client of the GPU worker with this process id; address and token are those of its environment."""
    variables = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    environment = dict(os.fsdecode(variable).split("=", 1) for variable in variables if b"=" in variable)
    return WorkerClient(environment["TTS_WORKER_URL"], environment.get("TTS_WORKER_TOKEN", ""))


def cut_codec(checkpoint: Path) -> None:
    """Truncate the speech tokenizer's weights, which other models share and have in memory."""
    with (checkpoint / "speech_tokenizer" / "model.safetensors").open("r+b") as file:
        file.truncate(4_000)


def spoil_tokenizer(checkpoint: Path) -> None:
    """Make the text tokenizer's files useless: the load fails only after it has read the weights."""
    (checkpoint / "vocab.json").write_text(json.dumps({"not": "a vocabulary"}))
    (checkpoint / "merges.txt").write_text("spoilt")
    (checkpoint / "tokenizer_config.json").write_text("[]")


@pytest.mark.soak
def test_transitions_leave_nothing_behind(models: ResidencyService) -> None:
    """Loads, offloads, restores and drops do not grow the process; test_residency_soak.py is the long version."""
    worker = models.service.worker_pid()
    said = {models.go_round(SMALL) for _ in range(4)}
    before_bytes = resident_bytes(worker)
    said |= {models.go_round(SMALL) for _ in range(4)}
    assert resident_bytes(worker) < 1.01 * before_bytes
    assert len(said) == 1


class TestFailedLoad:
    """A load that fails."""

    @pytest.mark.parametrize("damage", [cut_codec, pytest.param(spoil_tokenizer, marks=pytest.mark.soak)])
    def test_changes_nothing(
        self, models: ResidencyService, paths: dict[str, Path], damage: Callable[[Path], None]
    ) -> None:
        """503 with the cause; others speak on; no memory is held; with its files back the model speaks as before."""
        said = models.say(SMALL)
        models.say(LARGE, **KEEP)
        models.do(SMALL, "unload")
        whole = paths[SMALL].with_name("whole")
        shutil.copytree(paths[SMALL], whole)
        try:
            damage(paths[SMALL])
            refused = models.ask(SMALL)
            worker = models.service.worker_pid()
            before_bytes, held = resident_bytes(worker), models.entries()
            with ThreadPoolExecutor(1) as pool:
                others = pool.submit(models.say, LARGE, max_new_tokens=20, **KEEP)
                refusals = [models.ask(SMALL) for _ in range(3)]
                others.result()
            after_bytes, entries = resident_bytes(worker), models.entries()
        finally:
            shutil.rmtree(paths[SMALL])
            whole.rename(paths[SMALL])
        for answer in (refused, *refusals):
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            assert answer.json()["error"]["code"] == "model_unavailable"
            assert str(paths[SMALL]) in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) >= 1
        assert entries[SMALL]["state"] in {"absent", "unavailable"}
        assert (entries[SMALL]["bytes"], entries[SMALL]["host_bytes"], entries[SMALL]["references"]) == ({}, 0, 0)
        assert (entries[LARGE]["state"], entries[LARGE]["bytes"]) == ("resident", held[LARGE]["bytes"])
        # The weights alone are 18 MiB, and three loads failed.
        assert after_bytes - before_bytes < 12 * 2**20
        assert models.say(SMALL) == said

    @pytest.mark.soak
    def test_memory_runs_out(self, models: ResidencyService) -> None:
        """A load without enough memory is refused as such, frees its memory, and succeeds once there is enough."""
        # In a fresh process: after many transitions the heap has holes into which another model fits.
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
        # Half of what the model needs: small allocations still succeed.
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
        assert models.states()[SMALL] == "absent"
        assert data_bytes(worker) - held < 12 * 2**20
        assert models.say(SMALL) == said

    def test_offloaded_weights_need_no_files(self, models: ResidencyService, paths: dict[str, Path]) -> None:
        """A restore succeeds without the checkpoint's files."""
        said = models.say(SMALL, keep_alive=0)
        models.wait_for_state(SMALL, "offloaded", 60)
        away = paths[SMALL].with_name("away")
        paths[SMALL].rename(away)
        try:
            assert models.say(SMALL) == said
        finally:
            away.rename(paths[SMALL])


def data_bytes(pid: int) -> int:
    """The process's memory that RLIMIT_DATA counts: private writable memory, heap and anonymous mappings."""
    status: dict[str, Any] = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return int(status["VmData"].split()[0]) * 1024
