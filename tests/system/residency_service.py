"""Three small Qwen3-TTS models behind one service: requests to them, their places, their bytes."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import httpx

from gpu_worker.stats import MEMORY_READING_S
from tests.checkpoints import Kind, Size, tiny
from tests.system.service import Service, eventually

SMALL: Final = "qwen3-tts-0.6b-customvoice"
LARGE: Final = "qwen3-tts-1.7b-customvoice"
DESIGN: Final = "qwen3-tts-1.7b-voicedesign"
MODELS: Final = (SMALL, LARGE, DESIGN)

FRAMES: Final = 4
"""Frames of a short answer; without a limit the checkpoints speak for seconds."""

PUBLISHED_ENTRIES: Final = 151_643
"""Entries of the published checkpoints' text tokenizer."""

EXACT_MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc then maps every tensor by itself and returns freed memory to the kernel at once.

By default glibc keeps tens of megabytes for later, and a process's resident memory does not show what it uses.
"""

STAYS: Final = ("weights", "graphs", "workspace")
"""The purposes whose bytes an offloaded model keeps. On a CPU they lie in the same RAM; the other bytes are freed."""

_CHECKPOINTS: Final[dict[str, tuple[Kind, Size]]] = {
    SMALL: ("custom_voice", "0b6"),
    LARGE: ("custom_voice", "1b7"),
    DESIGN: ("voice_design", "1b7"),
}
_FIELDS: Final[dict[str, dict[str, Any]]] = {DESIGN: {"instructions": "Calm and low."}}


def checkpoints() -> dict[str, Path]:
    """Each model's small random checkpoint; tests must not write to it."""
    return {model: tiny(*made).resolve() for model, made in _CHECKPOINTS.items()}


def enlarge_tokenizer(checkpoint: Path) -> None:
    """Give a checkpoint's text tokenizer as many entries as the published ones have; no test's text contains them."""
    vocabulary = json.loads((checkpoint / "vocab.json").read_text())
    # How byte-level tokenizers write control characters.
    controls = [chr(256 + byte) for byte in range(9)]
    words = itertools.chain.from_iterable(itertools.product(controls, repeat=length) for length in itertools.count(2))
    first = max(vocabulary.values()) + 1
    added = {"".join(word): first + i for i, word in zip(range(PUBLISHED_ENTRIES - first), words, strict=False)}
    (checkpoint / "vocab.json").write_text(json.dumps(vocabulary | added))
    with (checkpoint / "merges.txt").open("a") as merges:
        merges.writelines(f"{word[:-1]} {word[-1]}\n" for word in added)


def model_paths(paths: dict[str, Path]) -> str:
    """The value of TTS_MODEL_PATHS."""
    return ",".join(f"{model}={path}" for model, path in paths.items())


class ResidencyService:
    """The three models of `service`."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def ask(self, model: str, text: str = "Hello.", **fields: Any) -> httpx.Response:
        """The answer to a short request with a seed, whatever its status."""
        return self.service.speech(text, **self.fields(model, **fields))

    def say(self, model: str, **fields: Any) -> bytes:
        """The pcm of a short request that must succeed."""
        answer = self.ask(model, **fields)
        assert answer.status_code == httpx.codes.OK, answer.text
        return answer.content

    def fields(self, model: str, **fields: Any) -> dict[str, Any]:
        """The fields of a request that this model accepts."""
        defaults = {"response_format": "pcm", "seed": 7, "max_new_tokens": FRAMES, "stream": False}
        return {"model": model, **defaults, **_FIELDS.get(model, {}), **fields}

    def post(self, model: str, action: str) -> httpx.Response:
        """POST /admin/models/{model}/{action}."""
        return self.service.http.post(f"/admin/models/{model}/{action}")

    def do(self, model: str, action: str) -> dict[str, Any]:
        """`post` that must succeed: the model's entry afterwards."""
        answer = self.post(model, action)
        assert answer.status_code == httpx.codes.OK, answer.text
        return cast("dict[str, Any]", answer.json())

    def vram(self) -> dict[str, Any]:
        """/admin/vram with memory that was read after this call began; a younger reading is not read anew."""
        time.sleep(MEMORY_READING_S)
        return self._vram()

    def entries(self) -> dict[str, dict[str, Any]]:
        """The entry of every model in /admin/vram, as of now."""
        return {entry["id"]: entry for entry in self._vram()["models"]}

    def states(self) -> dict[str, str]:
        """The state of each of the three models now."""
        entries = self.entries()
        return {model: entries[model]["state"] for model in MODELS}

    def wait_for(self, condition: Callable[[dict[str, dict[str, Any]]], object], timeout_s: float, what: str) -> float:
        """Wait until `condition` holds for the models' entries; the seconds that took."""
        return eventually(lambda: condition(self.entries()), timeout_s, what)

    def wait_for_state(self, model: str, state: str, timeout_s: float) -> float:
        """Wait until the model is in that state; the seconds that took."""
        return self.wait_for(lambda entries: entries[model]["state"] == state, timeout_s, f"{model} {state}")

    def unload_all(self) -> None:
        """Unpin and unload the three models as soon as no request is running or queued."""
        eventually(lambda: self.service.running() + self.service.queued() == 0, 60, "no requests")
        for model in MODELS:
            self.do(model, "unpin")
            self.do(model, "unload")

    def go_round(self, model: str) -> bytes:
        """Load the model, offload it, restore it and drop it; the pcm that it gave before and after the offload."""
        self.do(model, "load")
        pcm = self.say(model, max_new_tokens=1, keep_alive=0)
        # Either the keep_alive or this pass offloads the model; the pass ends after that.
        self.service.http.post("/admin/cleanup", params={"trigger": "true"}).raise_for_status()
        restored = self.do(model, "load")
        assert (restored["state"], restored["host_bytes"]) == ("resident", 0)
        assert self.say(model, max_new_tokens=1) == pcm
        dropped = self.do(model, "unload")
        assert (dropped["state"], dropped["bytes"], dropped["host_bytes"]) == ("absent", {}, 0)
        return pcm

    def _vram(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self.service.http.get("/admin/vram").json())
