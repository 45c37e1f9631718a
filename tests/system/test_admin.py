"""The admin endpoints over the real service: the shapes that API clients rely on, and true figures."""

import time
from collections.abc import Iterator
from typing import Any, Final, cast

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared.settings import Settings
from tests.recogniser import SENTENCES
from tests.system.residency_service import (
    EXACT_MALLOC,
    FRAMES,
    LARGE,
    SMALL,
    STAYS,
    ResidencyService,
    checkpoints,
    model_paths,
)
from tests.system.service import (
    eventually,
    resident_bytes,
    running_service,
    slow_reader,
)

MIB: Final = 2**20
ESPEAK: Final = "espeak-ng"
WITHOUT_WEIGHTS: Final = "qwen3-tts-0.6b-base"
IDLE_S: Final = 0.2
SLOTS: Final = 2
"""With eight, the default, each load would take twice as long."""

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
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ResidencyService]:
    """A service whose cleanup is disabled: it evicts no model on its own."""
    settings = {
        "MODEL_PATHS": model_paths(checkpoints()),
        "DEFAULT_DEVICE": "cpu",
        "DEFAULT_MODEL": ESPEAK,
        "MAX_CONCURRENCY": SLOTS,
        "CLEANUP_ENABLED": "false",
        "CLEANUP_INTERVAL": 0.1,
        "IDLE_TIMEOUT": IDLE_S,
    }
    with pytest.MonkeyPatch.context() as variables:
        for name, value in EXACT_MALLOC.items():
            variables.setenv(name, value)
        with running_service(tmp_path_factory.mktemp("admin"), **settings) as service:
            yield ResidencyService(service)


@pytest.fixture(autouse=True)
def _absent(models: ResidencyService) -> None:
    """Before every test, unload every model but espeak-ng."""
    models.unload_all()


def cleanup(models: ResidencyService, **query: str) -> dict[str, Any]:
    """The body of POST /admin/cleanup."""
    answer = models.service.http.post("/admin/cleanup", params=query)
    assert answer.status_code == httpx.codes.OK, answer.text
    return cast("dict[str, Any]", answer.json())


def wait_idle(models: ResidencyService, model: str) -> None:
    """Wait until the model has been idle for longer than TTS_IDLE_TIMEOUT."""
    models.wait_for(lambda entries: entries[model]["idle_s"] > IDLE_S, 60, "idle")


class TestCleanup:
    """POST /admin/cleanup."""

    def test_before_the_first_pass(self, models: ResidencyService) -> None:
        """Must be the first test of the file: the answer has the settings, and no figures yet."""
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

    def test_triggered(self, models: ResidencyService) -> None:
        """A pass at once: idle models leave the device, and the figures equal those of the process."""
        held = models.do(SMALL, "load")["bytes"]
        wait_idle(models, SMALL)
        models.do(LARGE, "load")
        models.do(LARGE, "pin")
        worker = models.service.worker_pid()
        before = resident_bytes(worker)
        requested = time.time()
        done = cleanup(models, trigger="true")
        after = resident_bytes(worker)
        assert done.keys() == LAST_PASS | {"message", "models_checked"}
        assert done["status"] == "completed"
        assert requested - 1 <= done["timestamp"] <= time.time() + 1
        assert {SMALL, LARGE} <= set(done["models_checked"])
        assert SMALL in done["models_unloaded"]
        assert LARGE not in done["models_unloaded"]
        assert str(len(done["models_unloaded"])) in done["message"]
        assert done["vram_before_mb"] == pytest.approx(before / MIB, abs=2)
        assert done["vram_after_mb"] == pytest.approx(after / MIB, abs=2)
        assert done["vram_freed_mb"] == round(done["vram_before_mb"] - done["vram_after_mb"], 2)
        frees = sum(size for purpose, size in held.items() if purpose not in STAYS)
        assert 0 < done["vram_freed_mb"] <= frees / MIB + 2  # a CPU's caches take memory only as they are used
        last = cleanup(models, trigger="false")
        assert last.keys() == LAST_PASS
        assert last == {**{name: done[name] for name in LAST_PASS}, "status": "disabled"}

    def test_with_nothing_to_do(self, models: ResidencyService) -> None:
        """A pass without idle models frees nothing, and its figures show that."""
        cleanup(models, trigger="true")
        done = cleanup(models, trigger="true")
        assert done["models_unloaded"] == []
        assert done["vram_freed_mb"] == pytest.approx(0, abs=0.5)

    def test_wrong_trigger(self, models: ResidencyService) -> None:
        """A trigger that is neither true nor false is a 400 in OpenAI's shape."""
        answer = models.service.http.post("/admin/cleanup", params={"trigger": "perhaps"})
        assert answer.status_code == httpx.codes.BAD_REQUEST
        assert answer.json()["error"]["type"] == "invalid_request_error"


class TestVram:
    """GET /admin/vram."""

    def test_shape(self, models: ResidencyService) -> None:
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

    def test_figures(self, models: ResidencyService) -> None:
        """The figures add up, and equal those of the process and of its models."""
        models.say(SMALL)
        models.do(LARGE, "load")
        found = models.vram()
        device = found["device"]
        assert device["kind"] == "cpu"
        assert device["used_bytes"] + device["free_bytes"] == device["total_bytes"]
        assert device["ours_bytes"] + device["others_bytes"] == device["used_bytes"]
        assert device["ours_bytes"] == pytest.approx(resident_bytes(models.service.worker_pid()), abs=2 * MIB)
        assert found["shared"]["codec"] > MIB
        entries = {entry["id"]: entry for entry in found["models"]}
        for model in (SMALL, LARGE):
            assert {"weights", "kv"} <= entries[model]["bytes"].keys()
            assert min(entries[model]["bytes"].values()) > 0
        assert entries[LARGE]["bytes"]["weights"] > entries[SMALL]["bytes"]["weights"]
        assert entries[SMALL]["last_used"] == pytest.approx(time.time(), abs=60)
        assert 0 <= entries[SMALL]["idle_s"] < 60
        assert entries[ESPEAK]["bytes"] == {}

    def test_loading_is_measured(self, models: ResidencyService) -> None:
        """A model's reported bytes are what the process grows by at the load and shrinks by at the unload."""
        models.say(SMALL)  # allocates everything that only the first load allocates
        models.do(SMALL, "unload")
        worker = models.service.worker_pid()
        before = resident_bytes(worker)
        held = sum(models.do(SMALL, "load")["bytes"].values())
        loaded = resident_bytes(worker)
        models.do(SMALL, "unload")
        assert loaded - before == pytest.approx(held, abs=6 * MIB)
        assert resident_bytes(worker) - before < 3 * MIB

    def test_offloaded(self, models: ResidencyService) -> None:
        """An offloaded model's bytes are counted as host memory, in its entry and in the total.

        A restore and an unload leave nothing of them.
        """
        models.say(SMALL)  # allocates everything that only the first speech allocates
        held = models.do(SMALL, "load")["bytes"]
        stays = sum(held[purpose] for purpose in STAYS)
        wait_idle(models, SMALL)
        cleanup(models, trigger="true")
        found = models.vram()
        entry = next(entry for entry in found["models"] if entry["id"] == SMALL)
        assert (entry["state"], entry["bytes"], entry["host_bytes"]) == ("offloaded", {}, stays)
        assert found["host"]["offloaded_bytes"] == stays
        worker = models.service.worker_pid()
        offloaded = resident_bytes(worker)
        models.say(SMALL)
        models.do(SMALL, "unload")
        assert offloaded - resident_bytes(worker) > stays / 2


class TestModels:
    """POST /admin/models/{id}/load, unload, pin, unpin."""

    def test_each(self, models: ResidencyService) -> None:
        """Each action returns the model's entry, and may be repeated, by any name that a request may use.

        A pin prevents evictions, not an explicit unload.
        """
        hugging_face = "Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice"
        for name in (SMALL, SMALL, SMALL.upper(), hugging_face, hugging_face.replace("/", "%2F")):
            loaded = models.do(name, "load")
            assert loaded.keys() == ENTRY
            assert (loaded["id"], loaded["state"], loaded["pinned"]) == (SMALL, "resident", False)
        for _ in range(2):
            assert models.do(SMALL, "pin")["pinned"]
        for _ in range(2):
            assert models.do(SMALL, "unload")["state"] == "absent"
        for _ in range(2):
            assert not models.do(SMALL, "unpin")["pinned"]

    def test_offloaded_comes_back(self, models: ResidencyService) -> None:
        """With cleanup disabled, an idle model stays until a pass is triggered.

        Load restores an offloaded model; unload drops it from host RAM.
        """
        models.do(SMALL, "load")
        models.wait_for(lambda entries: entries[SMALL]["idle_s"] > 5 * IDLE_S, 60, "idle for long")
        assert models.states()[SMALL] == "resident"
        assert SMALL in cleanup(models, trigger="true")["models_unloaded"]
        assert models.states()[SMALL] == "offloaded"
        assert models.do(SMALL, "load")["state"] == "resident"
        wait_idle(models, SMALL)
        cleanup(models, trigger="true")
        dropped = models.do(SMALL, "unload")
        assert (dropped["state"], dropped["host_bytes"]) == ("absent", 0)

    def test_busy_is_not_unloaded(self, models: ResidencyService) -> None:
        """409 while the model has a running request, in OpenAI's shape; the stream completes."""
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

    def test_without_a_slot_is_busy(self, models: ResidencyService) -> None:
        """A request that waits for a slot, or has given it up, keeps its model as well as a running one."""
        fields = models.fields(SMALL, stream=True, max_new_tokens=None)
        readers = [slow_reader(models.service, " ".join(SENTENCES), **fields) for _ in range(SLOTS + 1)]
        try:
            eventually(lambda: models.service.open_requests() == SLOTS + 1, 60, "more requests than slots")
            assert f"{SLOTS + 1} request" in models.post(SMALL, "unload").json()["error"]["message"]
        finally:
            for reader in readers:
                reader.close()

    def test_without_weights(self, models: ResidencyService) -> None:
        """A model without weights cannot be loaded: 503 and the command that helps; unloading it is allowed."""
        refused = models.post(WITHOUT_WEIGHTS, "load")
        assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert refused.json()["error"]["code"] == "model_unavailable"
        assert "python -m gpu_worker download" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert models.do(WITHOUT_WEIGHTS, "unload")["state"] == "unavailable"

    @pytest.mark.parametrize("action", ["load", "unload", "pin", "unpin"])
    def test_unknown_model(self, models: ResidencyService, action: str) -> None:
        """404, and the message lists the known models."""
        answer = models.post("no-such-model", action)
        assert answer.status_code == httpx.codes.NOT_FOUND
        assert answer.json()["error"]["code"] == "model_not_found"
        assert SMALL in answer.json()["error"]["message"]

    def test_unknown_action(self, models: ResidencyService) -> None:
        """A client error, in OpenAI's shape."""
        answer = models.post(SMALL, "explode")
        assert answer.status_code in {httpx.codes.BAD_REQUEST, httpx.codes.NOT_FOUND}
        assert answer.json()["error"]["type"] == "invalid_request_error"


class TestListed:
    """GET /v1/models."""

    def listed(self, models: ResidencyService, model: str = SMALL) -> dict[str, Any]:
        """The entry of a model."""
        return cast("dict[str, Any]", models.service.http.get(f"/v1/models/{model}").json())

    def listed_as(self, models: ResidencyService, state: str) -> dict[str, Any]:
        """The entry, as soon as the list has the model in that state."""
        eventually(lambda: self.listed(models)["state"] == state, 60, state)
        return self.listed(models)

    def test_states(self, models: ResidencyService) -> None:
        """The list shows each state of the model, with its bytes on the device."""
        assert self.listed_as(models, "absent")["loaded_bytes"] == 0
        held = sum(models.do(SMALL, "load")["bytes"].values())
        assert self.listed_as(models, "resident")["loaded_bytes"] == held
        wait_idle(models, SMALL)
        cleanup(models, trigger="true")
        assert self.listed_as(models, "offloaded")["loaded_bytes"] == 0
        models.say(SMALL)
        assert self.listed_as(models, "resident")["loaded_bytes"] == held
        models.do(SMALL, "unload")
        assert self.listed_as(models, "absent")["loaded_bytes"] == 0
        unavailable = self.listed(models, WITHOUT_WEIGHTS)
        assert unavailable["state"] == "unavailable"
        assert unavailable["detail"]

    def test_fields(self, models: ResidencyService) -> None:
        """Both lists have the fields that OpenAI's clients, Open WebUI and our own pages read."""
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

    def test_complete(self, models: ResidencyService) -> None:
        """Every setting but the secret ones, with the value in force."""
        config = models.service.http.get("/admin/config").json()
        secret = {"worker_token", "api_keys", "admin_keys"}
        named = {field.name.removesuffix("_s") for field in msgspec.structs.fields(Settings)}
        assert config.keys() == (named - secret) | {"api_version"}
        assert config["cleanup_enabled"] is False
        assert (config["idle_timeout"], config["cleanup_interval"]) == (IDLE_S, 0.1)
        assert (config["default_device"], config["default_model_size"]) == ("cpu", "1.7B")
        assert (config["attention_backend"], config["port"]) == ("auto", models.service.port)
        assert config["model_paths"] == {model: str(path) for model, path in checkpoints().items()}
        assert config["default_model"] == ESPEAK


class TestStats:
    """GET /admin/stats."""

    def test_streams(self, models: ResidencyService) -> None:
        """Each stream is listed while it runs, with its progress and without its text.

        Its model has references in /admin/vram and is not idle; afterwards the entry shows the keep_alive.
        """
        assert models.service.stats()["streams"] == []
        text, fields = " ".join(SENTENCES * 20), models.fields(SMALL, stream=True, max_new_tokens=None)
        with models.service.stream(text, **fields) as answer:
            pieces = answer.iter_raw()  # keep the iterator: its deletion closes the connection
            next(pieces)
            # A snapshot is as old as the last Pong: in it the stream may still be queued.
            eventually(lambda: any(one["audio_s"] for one in models.service.stats()["streams"]), 60, "a stream")
            stats = models.service.http.get("/admin/stats")
            [stream] = stats.json()["streams"]
            entry = models.entries()[SMALL]
            assert (entry["references"], entry["idle_s"], entry["keep_alive_s"]) == (1, None, None)
        assert stream.keys() == {"id", "model", "client", "state", "age_s", "audio_s", "buffered_s"}
        assert stream["id"].startswith(answer.headers["x-request-id"])
        assert (stream["model"], stream["client"]) == (SMALL, "peer:127.0.0.1")
        assert stream["state"] in {"generating", "buffered"}
        assert stream["audio_s"] > 0
        assert 0 < stream["age_s"] < 120
        assert SENTENCES[0] not in stats.text
        eventually(lambda: not models.service.stats()["streams"], 60, "the end of the stream")
        models.say(SMALL, keep_alive="5m")
        entry = models.entries()[SMALL]
        assert (entry["references"], entry["keep_alive_s"]) == (0, 300)


class TestMetrics:
    """GET /metrics."""

    def figures(self, models: ResidencyService) -> dict[tuple[str, ...], float]:
        """The samples of SMALL, by name and the values of their other labels."""
        models.vram()  # a snapshot of now
        text = models.service.http.get("/metrics").text
        return {
            (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "model")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("model") == SMALL
        }

    def test_speech_and_transitions(self, models: ResidencyService) -> None:
        """One request adds its load, its time to first audio, its real-time factor and its underruns."""
        before = self.figures(models)
        began = time.monotonic()
        models.say(SMALL)
        took_s = time.monotonic() - began
        wait_idle(models, SMALL)
        cleanup(models, trigger="true")
        after = self.figures(models)

        def more(*name: str) -> float:
            return after[name] - before.get(name, 0.0)

        for transition in ("load", "offload"):
            assert more("tts_model_moves_total", transition) == 1
        for histogram in ("tts_time_to_first_audio_seconds", "tts_real_time_factor", "tts_underrun_seconds"):
            assert more(f"{histogram}_count") == 1
        loaded_s = more("tts_model_move_seconds_sum", "load")
        assert 0 < loaded_s < more("tts_time_to_first_audio_seconds_sum") < took_s
        # Four frames of 80 ms: the factor is at most the rest of the time divided by their length.
        assert 0 < more("tts_real_time_factor_sum") * FRAMES * 0.08 < took_s - loaded_s
        assert 0 <= more("tts_underrun_seconds_sum") < took_s
