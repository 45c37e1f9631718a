"""The admin endpoints over the real service: the shapes that API clients rely on, and figures that are true."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared.settings import Settings
from tests.recogniser import SENTENCES
from tests.system.residents import EXACT_MALLOC, FRAMES, LARGE, SMALL, STAYS, Residents, checkpoints, model_paths
from tests.system.service import ROOT, START_TIMEOUT_S, Service, eventually, resident_bytes
from tests.system.test_faults import slow_reader

MIB: Final = 2**20
ESPEAK: Final = "espeak-ng"
WITHOUT_WEIGHTS: Final = "qwen3-tts-0.6b-base"
IDLE_S: Final = 0.2

LAST_PASS: Final = {
    "cleanup_enabled",
    "cleanup_interval",
    "idle_timeout",
    "status",
    "timestamp",
    "vram_before_mb",
    "vram_after_mb",
    "vram_freed_mb",
    "models_unloaded",
}
ENTRY: Final = {
    "id",
    "state",
    "bytes",
    "host_bytes",
    "last_used",
    "idle_s",
    "references",
    "pinned",
    "keep_alive_s",
    "detail",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Residents]:
    """A service that evicts nothing on its own."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in EXACT_MALLOC.items():
            environment.setenv(name, value)
        service = Service(
            tmp_path_factory.mktemp("admin"),
            MODEL_PATHS=model_paths(checkpoints()),
            DEFAULT_DEVICE="cpu",
            DEFAULT_MODEL=ESPEAK,
            CLEANUP_ENABLED="false",
            CLEANUP_INTERVAL=0.1,
            IDLE_TIMEOUT=IDLE_S,
        )
    try:
        service.wait_ready(90)  # importing torch beside other tests takes its time
        yield Residents(service)
        assert service.stop() == 0
    finally:
        service.kill()


@pytest.fixture(autouse=True)
def _absent(models: Residents) -> None:
    """Every test begins with no model loaded but espeak-ng."""
    models.forget()


def cleanup(models: Residents, **query: str) -> dict[str, Any]:
    """The body of POST /admin/cleanup."""
    answer = models.service.http.post("/admin/cleanup", params=query)
    assert answer.status_code == httpx.codes.OK, answer.text
    return cast("dict[str, Any]", answer.json())


def idle(models: Residents, model: str) -> None:
    """Wait until the model has been idle for longer than the timeout."""
    models.wait_for(lambda books: books[model]["idle_s"] > IDLE_S, 5, "idle")


class TestCleanup:
    """POST /admin/cleanup."""

    def test_before_the_first_pass(self, models: Residents) -> None:
        """The first test of the file: there are settings, and no figures yet."""
        assert cleanup(models) == {
            "cleanup_enabled": False,
            "cleanup_interval": 0.1,
            "idle_timeout": IDLE_S,
            "status": "disabled",
            "timestamp": None,
            "vram_before_mb": None,
            "vram_after_mb": None,
            "vram_freed_mb": None,
            "models_unloaded": [],
        }

    def test_triggered(self, models: Residents) -> None:
        """A pass now: what was idle has left the device, and the figures are those of the process itself."""
        held = models.do(SMALL, "load")["bytes"]
        idle(models, SMALL)
        models.do(LARGE, "load")
        models.do(LARGE, "pin")
        worker = models.service.worker_pid()
        before = resident_bytes(worker)
        asked = time.time()
        done = cleanup(models, trigger="true")
        after = resident_bytes(worker)
        assert done.keys() == LAST_PASS | {"message", "models_checked"}
        assert done["status"] == "completed"
        assert asked - 1 <= done["timestamp"] <= time.time() + 1
        assert {SMALL, LARGE} <= set(done["models_checked"])
        assert SMALL in done["models_unloaded"]
        assert LARGE not in done["models_unloaded"]
        assert str(len(done["models_unloaded"])) in done["message"]
        assert done["vram_before_mb"] == pytest.approx(before / MIB, abs=2)
        assert done["vram_after_mb"] == pytest.approx(after / MIB, abs=2)
        assert done["vram_freed_mb"] == round(done["vram_before_mb"] - done["vram_after_mb"], 2)
        given_back = sum(size for what, size in held.items() if what not in STAYS)
        assert done["vram_freed_mb"] == pytest.approx(given_back / MIB, abs=2)
        last = cleanup(models, trigger="false")
        assert last.keys() == LAST_PASS
        assert last == {**{name: done[name] for name in LAST_PASS}, "status": "disabled"}

    def test_with_nothing_to_do(self, models: Residents) -> None:
        """A pass that finds nothing frees nothing, and says so."""
        cleanup(models, trigger="true")
        done = cleanup(models, trigger="true")
        assert done["models_unloaded"] == []
        assert done["vram_freed_mb"] == pytest.approx(0, abs=0.5)

    def test_not_on_its_own(self, models: Residents) -> None:
        """Where cleanup is off, an idle model stays until a pass is asked for."""
        models.do(SMALL, "load")
        models.wait_for(lambda books: books[SMALL]["idle_s"] > 5 * IDLE_S, 5, "idle for long")
        assert models.places()[SMALL] == "resident"
        assert SMALL in cleanup(models, trigger="true")["models_unloaded"]
        assert models.places()[SMALL] == "offloaded"

    def test_wrong_trigger(self, models: Residents) -> None:
        """What is neither true nor false is a 400 in the contract's shape."""
        answer = models.service.http.post("/admin/cleanup", params={"trigger": "perhaps"})
        assert answer.status_code == httpx.codes.BAD_REQUEST
        assert answer.json()["error"]["type"] == "invalid_request_error"


class TestVram:
    """GET /admin/vram."""

    def test_shape(self, models: Residents) -> None:
        """Every field, and nothing else."""
        found = models.vram()
        assert found.keys() == {"device", "shared", "host", "models"}
        assert found["device"].keys() == {
            *("name", "kind", "total_bytes", "used_bytes", "free_bytes", "ours_bytes", "others_bytes", "budget_bytes")
        }
        assert found["host"].keys() == {"total_bytes", "free_bytes", "ours_bytes", "offloaded_bytes", "budget_bytes"}
        listed = models.service.http.get("/v1/models").json()["data"]
        assert [entry["id"] for entry in found["models"]] == [model["id"] for model in listed]
        for entry in found["models"]:
            assert entry.keys() == ENTRY

    def test_figures(self, models: Residents) -> None:
        """They add up, and are those of the process and of its models."""
        models.say(SMALL)
        models.do(LARGE, "load")
        found = models.vram()
        device = found["device"]
        assert device["kind"] == "cpu"
        assert device["used_bytes"] + device["free_bytes"] == device["total_bytes"]
        assert device["ours_bytes"] + device["others_bytes"] == device["used_bytes"]
        assert device["ours_bytes"] == pytest.approx(resident_bytes(models.service.worker_pid()), abs=2 * MIB)
        assert found["shared"]["codec"] > MIB
        books = {entry["id"]: entry for entry in found["models"]}
        for model in (SMALL, LARGE):
            assert {"weights", "kv"} <= books[model]["bytes"].keys()
            assert min(books[model]["bytes"].values()) > 0
        assert books[LARGE]["bytes"]["weights"] > books[SMALL]["bytes"]["weights"]
        assert books[SMALL]["last_used"] == pytest.approx(time.time(), abs=10)
        assert 0 <= books[SMALL]["idle_s"] < 10
        assert books[ESPEAK]["bytes"] == {}

    def test_loading_is_measured(self, models: Residents) -> None:
        """What a model says it holds is what the process grew by, and what it gives back."""
        models.say(SMALL)  # whatever comes with the first load is there
        models.do(SMALL, "unload")
        worker = models.service.worker_pid()
        before = resident_bytes(worker)
        held = sum(models.do(SMALL, "load")["bytes"].values())
        loaded = resident_bytes(worker)
        models.do(SMALL, "unload")
        assert loaded - before == pytest.approx(held, abs=4 * MIB)
        assert resident_bytes(worker) - before < 3 * MIB

    def test_offloaded(self, models: Residents) -> None:
        """What an offloaded model keeps is counted as host memory, of the model and in all."""
        held = models.do(SMALL, "load")["bytes"]
        stays = sum(held[what] for what in STAYS)
        idle(models, SMALL)
        cleanup(models, trigger="true")
        found = models.vram()
        entry = next(entry for entry in found["models"] if entry["id"] == SMALL)
        assert (entry["state"], entry["bytes"], entry["host_bytes"]) == ("offloaded", {}, stays)
        assert found["host"]["offloaded_bytes"] == stays

    def test_speaking(self, models: Residents) -> None:
        """A model that speaks has references and is not idle; its keep_alive shows afterwards."""
        text = " ".join(SENTENCES * 20)
        with models.service.stream(text, **models.fields(SMALL, stream=True, max_new_tokens=None)) as answer:
            pieces = answer.iter_raw()
            next(pieces)
            entry = models.books()[SMALL]
            assert (entry["references"], entry["idle_s"], entry["keep_alive_s"]) == (1, None, None)
        models.say(SMALL, keep_alive="5m")
        entry = models.books()[SMALL]
        assert (entry["references"], entry["keep_alive_s"]) == (0, 300)


class TestModels:
    """POST /admin/models/{id}/load, unload, pin, unpin."""

    def test_each(self, models: Residents) -> None:
        """Each says where the model is then, and may be asked twice."""
        for _ in range(2):
            loaded = models.do(SMALL, "load")
            assert loaded.keys() == ENTRY
            assert (loaded["id"], loaded["state"], loaded["pinned"]) == (SMALL, "resident", False)
        for _ in range(2):
            assert models.do(SMALL, "pin")["pinned"]
        for _ in range(2):
            assert not models.do(SMALL, "unpin")["pinned"]
        for _ in range(2):
            assert (models.do(SMALL, "unload"))["state"] == "absent"

    @pytest.mark.parametrize(
        "name", [SMALL.upper(), "Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice", "qwen%2FQwen3-TTS-12Hz-0.6B-CustomVoice"]
    )
    def test_names(self, models: Residents, name: str) -> None:
        """A model may be named as in a request, its hub's id with the slash included."""
        assert models.do(name, "load")["id"] == SMALL

    def test_pinned_may_be_unloaded(self, models: Residents) -> None:
        """A pin keeps others from evicting; whoever unloads by hand means it."""
        models.do(SMALL, "load")
        models.do(SMALL, "pin")
        assert models.do(SMALL, "unload")["state"] == "absent"

    def test_offloaded_comes_back(self, models: Residents) -> None:
        """Load restores what was offloaded; unload drops it from the host."""
        models.do(SMALL, "load")
        idle(models, SMALL)
        cleanup(models, trigger="true")
        assert models.do(SMALL, "load")["state"] == "resident"
        idle(models, SMALL)
        cleanup(models, trigger="true")
        gone = models.do(SMALL, "unload")
        assert (gone["state"], gone["host_bytes"]) == ("absent", 0)

    def test_busy_is_not_unloaded(self, models: Residents) -> None:
        """409 while the model speaks, in the contract's shape; the stream goes on to its end."""
        fields = models.fields(SMALL, stream=True, max_new_tokens=40)
        whole = models.service.speech(SENTENCES[0], **fields).content
        with models.service.stream(SENTENCES[0], **fields) as answer:
            pieces = answer.iter_raw()
            heard = next(pieces)
            refused = models.post(SMALL, "unload")
            assert refused.status_code == httpx.codes.CONFLICT
            error = refused.json()["error"]
            assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "model_busy", "model")
            assert SMALL in error["message"]
            assert heard + b"".join(pieces) == whole
        assert models.do(SMALL, "unload")["state"] == "absent"

    def test_queued_is_busy(self, models: Residents) -> None:
        """A request that waits for a slot keeps its model as well as one that speaks."""
        slots = 8
        fields = models.fields(SMALL, stream=True, max_new_tokens=None)
        readers = [slow_reader(models.service, " ".join(SENTENCES), **fields) for _ in range(slots + 1)]
        try:
            eventually(lambda: models.service.stats()["queued"] == 1, 20, "a request in the queue")
            assert f"{slots + 1} request" in models.post(SMALL, "unload").json()["error"]["message"]
        finally:
            for reader in readers:
                reader.close()

    def test_without_weights(self, models: Residents) -> None:
        """What has no weights cannot be loaded: 503 and what to do; it can be pinned and unloaded."""
        refused = models.post(WITHOUT_WEIGHTS, "load")
        assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert refused.json()["error"]["code"] == "model_unavailable"
        assert "python -m gpu_worker download" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert models.do(WITHOUT_WEIGHTS, "unload")["state"] == "unavailable"

    @pytest.mark.parametrize("action", ["load", "unload", "pin", "unpin"])
    def test_unknown_model(self, models: Residents, action: str) -> None:
        """404, and the message lists what there is."""
        answer = models.post("no-such-model", action)
        assert answer.status_code == httpx.codes.NOT_FOUND
        assert answer.json()["error"]["code"] == "model_not_found"
        assert SMALL in answer.json()["error"]["message"]

    def test_unknown_action(self, models: Residents) -> None:
        """A client's error, in the contract's shape."""
        answer = models.post(SMALL, "explode")
        assert answer.status_code in {httpx.codes.BAD_REQUEST, httpx.codes.NOT_FOUND}
        assert answer.json()["error"]["type"] == "invalid_request_error"


class TestListed:
    """GET /v1/models."""

    def listed(self, models: Residents, model: str = SMALL) -> dict[str, Any]:
        """The entry of a model."""
        return cast("dict[str, Any]", models.service.http.get(f"/v1/models/{model}").json())

    def reaches(self, models: Residents, state: str) -> dict[str, Any]:
        """The entry, once the list says that state."""
        eventually(lambda: self.listed(models)["state"] == state, 2, state)
        return self.listed(models)

    def test_states(self, models: Residents) -> None:
        """The list follows the model through every place, with the bytes that it holds on the device."""
        assert self.reaches(models, "absent")["loaded_bytes"] == 0
        held = sum(models.do(SMALL, "load")["bytes"].values())
        assert self.reaches(models, "resident")["loaded_bytes"] == held
        idle(models, SMALL)
        cleanup(models, trigger="true")
        assert self.reaches(models, "offloaded")["loaded_bytes"] == 0
        models.say(SMALL)
        assert self.reaches(models, "resident")["loaded_bytes"] == held
        models.do(SMALL, "unload")
        assert self.reaches(models, "absent")["loaded_bytes"] == 0
        unavailable = self.listed(models, WITHOUT_WEIGHTS)
        assert unavailable["state"] == "unavailable"
        assert unavailable["detail"]

    def test_fields(self, models: Residents) -> None:
        """Both lists have what OpenAI's clients, Open WebUI and our own pages read."""
        bodies = [models.service.http.get(path).json() for path in ("/v1/models", "/v1/audio/models")]
        for body in bodies:
            assert body["object"] == "list"
            assert body["models"] == [{"id": entry["id"]} for entry in body["data"]]
            for entry in body["data"]:
                assert {
                    *("id", "object", "created", "owned_by", "aliases", "task"),
                    *("languages", "voices", "state", "loaded_bytes"),
                } <= entry.keys()


class TestConfig:
    """GET /admin/config."""

    def test_complete(self, models: Residents) -> None:
        """Every setting but the secret ones, as it is in force."""
        config = models.service.http.get("/admin/config").json()
        secret = {"worker_token", "api_keys", "admin_keys"}
        named = {field.name.removesuffix("_s") for field in msgspec.structs.fields(Settings)}
        assert config.keys() == (named - secret) | {"api_version"}
        assert config["cleanup_enabled"] is False
        assert (config["idle_timeout"], config["cleanup_interval"]) == (IDLE_S, 0.1)
        assert (config["default_device"], config["default_model_size"]) == ("cpu", "1.7B")
        assert (config["attention_backend"], config["port"]) == ("sdpa", models.service.port)
        assert config["model_paths"] == {model: str(path) for model, path in checkpoints().items()}
        assert config["default_model"] == ESPEAK

    def test_of_the_worker(self, tmp_path: Path, start: Callable[..., Service]) -> None:
        """Where the two sides run apart, what the worker acts by is told as the worker has it."""
        directory = tmp_path / "run"
        directory.mkdir(mode=0o700)
        url = f"ipc://{directory}/worker.ipc"
        plain = {name: value for name, value in os.environ.items() if not name.startswith("TTS_")}
        theirs = {"IDLE_TIMEOUT": "7", "CLEANUP_INTERVAL": "3", "CLEANUP_ENABLED": "false", "DEFAULT_DEVICE": "cpu"}
        environment = {
            **plain,
            **{f"TTS_{name}": value for name, value in theirs.items()},
            "TTS_WORKER_URL": url,
            "TTS_VOICES_DIR": str(tmp_path / "voices"),
            "PYTHONPATH": str(ROOT),
        }
        worker = subprocess.Popen([sys.executable, "-m", "gpu_worker"], cwd=tmp_path, env=environment)
        try:
            service = start(WORKER_URL=url, IDLE_TIMEOUT=9, MAX_INPUT_CHARS=50)
            config = service.http.get("/admin/config").json()
            assert (config["idle_timeout"], config["cleanup_interval"], config["cleanup_enabled"]) == (7, 3, False)
            # "auto" in both environments: the worker has found out what that means.
            assert (config["default_device"], config["default_model"]) == ("cpu", ESPEAK)
            assert (config["max_input_chars"], config["port"]) == (50, service.port)
            last = service.http.post("/admin/cleanup").json()
            assert (last["idle_timeout"], last["cleanup_interval"], last["status"]) == (7, 3, "disabled")
            assert service.stats()["worker"]["restarts"] == 0
            assert service.stop() == 0
        finally:
            worker.kill()
            worker.wait()


class TestStats:
    """GET /admin/stats."""

    def test_streams(self, models: Residents) -> None:
        """Each stream is listed while it lasts, with how far it is, and without a word of what it says."""
        assert models.service.stats()["streams"] == []
        text, fields = " ".join(SENTENCES * 20), models.fields(SMALL, stream=True, max_new_tokens=None)
        with models.service.stream(text, **fields) as answer:
            pieces = answer.iter_raw()  # kept: an iterator that is let go closes the connection
            next(pieces)
            # What a web worker knows is as old as its last ping: then the stream may still have been waiting.
            eventually(lambda: any(one["audio_s"] for one in models.service.stats()["streams"]), 5, "a stream")
            stats = models.service.http.get("/admin/stats")
            [stream] = stats.json()["streams"]
        assert stream.keys() == {"id", "model", "client", "state", "age_s", "audio_s"}
        assert stream["id"].startswith(answer.headers["x-request-id"])
        assert (stream["model"], stream["client"]) == (SMALL, "peer:127.0.0.1")
        assert stream["state"] in {"speaking", "stalled"}
        assert stream["audio_s"] > 0
        assert 0 < stream["age_s"] < 120
        assert SENTENCES[0] not in stats.text
        eventually(lambda: not models.service.stats()["streams"], 10, "its end")

    def test_restarts(self, start: Callable[..., Service]) -> None:
        """Every web worker tells the same number, one that was born after the GPU worker's death as well."""
        service = start(WEB_WORKERS=2)
        os.kill(service.worker_pid(), signal.SIGKILL)
        eventually(service.is_ready, START_TIMEOUT_S, "ready again")
        witness, *_ = service.wait_serving(2)
        os.kill(witness, signal.SIGKILL)
        told: dict[int, list[int]] = {}

        def two_others_tell() -> bool:
            with contextlib.suppress(httpx.TransportError):
                stats = httpx.get(f"{service.url}/admin/stats", timeout=2, trust_env=False)
                if stats.status_code == httpx.codes.OK:
                    figures = httpx.get(f"{service.url}/metrics", timeout=2, trust_env=False).text
                    seen = [line for line in figures.splitlines() if line.startswith("tts_worker_restarts_total")]
                    assert seen in ([], ["tts_worker_restarts_total 1.0"])
                    told.setdefault(stats.json()["web_pid"], []).append(stats.json()["worker"]["restarts"])
            return len(told.keys() - {witness}) == 2

        eventually(two_others_tell, START_TIMEOUT_S, "two web workers")
        assert {restarts for heard in told.values() for restarts in heard} == {1}


class TestMetrics:
    """GET /metrics."""

    def figures(self, models: Residents) -> dict[tuple[str, ...], float]:
        """What is told of SMALL: by a sample's name and the values of its other labels."""
        models.vram()  # a snapshot of now
        text = models.service.http.get("/metrics").text
        return {
            (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "model")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("model") == SMALL
        }

    def test_speech_and_moves(self, models: Residents) -> None:
        """What one request adds: its loading, its first sound, and how it would have been heard."""
        before = self.figures(models)
        began = time.monotonic()
        models.say(SMALL)
        took_s = time.monotonic() - began
        idle(models, SMALL)
        cleanup(models, trigger="true")
        after = self.figures(models)

        def more(*name: str) -> float:
            return after[name] - before.get(name, 0.0)

        for move in ("load", "offload"):
            assert more("tts_model_moves_total", move) == 1
        for histogram in ("tts_time_to_first_audio_seconds", "tts_real_time_factor", "tts_underrun_seconds"):
            assert more(f"{histogram}_count") == 1
        loaded_s = more("tts_model_move_seconds_sum", "load")
        assert 0 < loaded_s < more("tts_time_to_first_audio_seconds_sum") < took_s
        # Four frames of 80 ms: the factor is the rest of the time by that, whoever else uses this machine.
        assert 0 < more("tts_real_time_factor_sum") * FRAMES * 0.08 < took_s - loaded_s
        assert 0 <= more("tts_underrun_seconds_sum") < took_s
