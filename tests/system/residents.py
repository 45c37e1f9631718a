"""Three small Qwen3-TTS models behind one service: how they are asked for, where they are, what they hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import httpx

from tests.checkpoints import Kind, Size, tiny
from tests.system.service import Service, eventually

SMALL: Final = "qwen3-tts-0.6b-customvoice"
LARGE: Final = "qwen3-tts-1.7b-customvoice"
DESIGN: Final = "qwen3-tts-1.7b-voicedesign"
MODELS: Final = (SMALL, LARGE, DESIGN)

FRAMES: Final = 4
"""Frames of a short answer; the checkpoints would speak for seconds."""

EXACT_MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Tensors get mappings of their own and give them back: left alone, glibc keeps some for the next ones,
and what a process holds cannot be read off it."""

STAYS: Final = ("weights", "graphs", "workspace")
"""What an offloaded model keeps, by purpose: on a CPU it lies in the same RAM either way. The rest is given back."""

_CHECKPOINTS: Final[dict[str, tuple[Kind, Size]]] = {
    SMALL: ("custom_voice", "0b6"),
    LARGE: ("custom_voice", "1b7"),
    DESIGN: ("voice_design", "1b7"),
}
_FIELDS: Final[dict[str, dict[str, Any]]] = {DESIGN: {"instructions": "Calm and low."}}


def checkpoints() -> dict[str, Path]:
    """Each model's small random checkpoint; not to be written to."""
    return {model: tiny(*made).resolve() for model, made in _CHECKPOINTS.items()}


def model_paths(paths: dict[str, Path]) -> str:
    """The setting that says where checkpoints are."""
    return ",".join(f"{model}={path}" for model, path in paths.items())


class Residents:
    """The models of `service`."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def ask(self, model: str, text: str = "Hello.", **fields: Any) -> httpx.Response:
        """The answer to a short request with a seed, whatever its status."""
        return self.service.speech(text, **self.fields(model, **fields))

    def say(self, model: str, **fields: Any) -> bytes:
        """What the model says, as pcm."""
        answer = self.ask(model, **fields)
        assert answer.status_code == httpx.codes.OK, answer.text
        return answer.content

    def fields(self, model: str, **fields: Any) -> dict[str, Any]:
        """The fields of a request that this model understands."""
        defaults = {"response_format": "pcm", "seed": 7, "max_new_tokens": FRAMES, "stream": False}
        return {"model": model, **defaults, **_FIELDS.get(model, {}), **fields}

    def post(self, model: str, action: str) -> httpx.Response:
        """POST /admin/models/{model}/{action}."""
        return self.service.http.post(f"/admin/models/{model}/{action}")

    def do(self, model: str, action: str) -> dict[str, Any]:
        """The same, which must work: where the model is then."""
        answer = self.post(model, action)
        assert answer.status_code == httpx.codes.OK, answer.text
        return cast("dict[str, Any]", answer.json())

    def vram(self) -> dict[str, Any]:
        """/admin/vram once the device has been read anew; by itself the device's figures may be 0.2 s old."""
        began = self._uptime_s()
        # What /admin/stats says is 250 ms old at most: one that is younger by more came after this call began.
        eventually(lambda: self._uptime_s() > began + 0.25, 5, "a new reading")
        return cast("dict[str, Any]", self.service.http.get("/admin/vram").json())

    def books(self) -> dict[str, dict[str, Any]]:
        """The entry of every model in /admin/vram, as of now."""
        return {entry["id"]: entry for entry in self.vram()["models"]}

    def places(self) -> dict[str, str]:
        """Where each of the three is now."""
        books = self.books()
        return {model: books[model]["state"] for model in MODELS}

    def wait_for(self, holds: Callable[[dict[str, dict[str, Any]]], object], timeout_s: float, what: str) -> float:
        """Wait until the books of now or later say so; how many seconds that took."""

        def look() -> object:
            entries = self.service.http.get("/admin/vram").json()["models"]
            return holds({entry["id"]: entry for entry in entries})

        return eventually(look, timeout_s, what)

    def forget(self) -> None:
        """Unpin and unload all three, once nobody speaks."""
        eventually(lambda: self.service.stats()["running"] + self.service.stats()["queued"] == 0, 20, "silence")
        for model in MODELS:
            self.do(model, "unpin")
            self.do(model, "unload")

    def go_round(self, model: str) -> bytes:
        """Load the model, offload it, restore it and drop it; what it said in between, the same before and after."""
        self.do(model, "load")
        said = self.say(model, max_new_tokens=1, keep_alive=0)
        # The pass ends after the model has gone, whether the pass or its keep_alive made it go.
        self.service.http.post("/admin/cleanup", params={"trigger": "true"}).raise_for_status()
        restored = self.do(model, "load")
        assert (restored["state"], restored["host_bytes"]) == ("resident", 0)
        assert self.say(model, max_new_tokens=1) == said
        gone = self.do(model, "unload")
        assert (gone["state"], gone["bytes"], gone["host_bytes"]) == ("absent", {}, 0)
        return said

    def _uptime_s(self) -> float:
        uptime_s: float = self.service.stats()["worker"]["uptime_s"]
        return uptime_s
