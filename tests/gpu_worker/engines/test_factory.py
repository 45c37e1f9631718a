"""Which engine speaks for which model, and which model is meant where none is named."""

import gc
import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from gpu_worker.engines.base import JobError
from gpu_worker.engines.espeak import EspeakEngine
from gpu_worker.engines.factory import EngineFactory
from shared.catalog import ModelSpec, load_catalog
from shared.settings import SettingsError, load_settings
from tests.checkpoints import tiny
from tests.gpu_worker.engines.qwen.driving import clone


@pytest.fixture
def catalog() -> list[ModelSpec]:
    """The project's own models."""
    return load_catalog()


def _registry(catalog: list[ModelSpec], device: Literal["cuda", "cpu"] = "cpu", **variables: str) -> EngineFactory:
    return EngineFactory(load_settings({f"TTS_{name}": value for name, value in variables.items()}), catalog, device)


def _espeak(catalog: list[ModelSpec]) -> ModelSpec:
    return next(spec for spec in catalog if spec.engine == "espeak")


def _without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    found = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name in packages else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


class TestEspeak:
    """The default engine."""

    def test_opens(self, catalog: list[ModelSpec]) -> None:
        """Nothing is missing, and the engine is ready to speak."""
        registry = _registry(catalog)
        assert registry.problem_of(_espeak(catalog)) is None
        engine = registry.open(_espeak(catalog))
        assert isinstance(engine, EspeakEngine)
        assert engine.capacity() > 0

    def test_not_installed(self, catalog: list[ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
        """Without its package it cannot be opened, and the reason says what to install."""
        _without(monkeypatch, "espeakng_loader")
        registry = _registry(catalog)
        assert "qwen3-tts-server[demo]" in str(registry.problem_of(_espeak(catalog)))
        with pytest.raises(JobError, match="not installed") as caught:
            registry.open(_espeak(catalog))
        assert caught.value.code == "model_unavailable"


class TestQwen:
    """The engine that needs more."""

    @pytest.fixture(autouse=True)
    def _unfrozen(self) -> Iterator[None]:
        """Garbage is collected in full again afterwards."""
        gc.unfreeze()
        yield
        gc.unfreeze()

    def test_not_installed(self, catalog: list[ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
        """What is not installed is named, with what to do, before anything is looked for on the disk."""
        _without(monkeypatch, "qwen_tts")
        registry = _registry(catalog)
        qwen = next(spec for spec in catalog if spec.engine == "qwen")
        problem = registry.problem_of(qwen)
        assert problem is not None
        assert problem.startswith("qwen_tts not installed")
        assert "qwen3-tts-server[gpu]" in problem
        with pytest.raises(JobError, match="qwen_tts not installed"):
            registry.open(qwen)

    def test_estimate(self, catalog: list[ModelSpec]) -> None:
        """What a checkpoint will take is known before it is opened; without one the catalogue's figure stands."""
        here = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-customvoice")
        elsewhere = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-base")
        registry = _registry(catalog, MODEL_PATHS=f"{here.id}={tiny('custom_voice', '0b6')}")
        registry.prepare()
        engine = registry.open(here)
        held = sum(engine.memory().device.values())
        engine.close()
        assert registry.estimated(here).estimated_bytes == pytest.approx(held, rel=0.1)
        assert registry.estimated(elsewhere) == elsewhere

    def test_a_dtype_that_cannot_be_computed_with(self, catalog: list[ModelSpec]) -> None:
        """Is the model's problem when it is opened, with what to set; the process starts, and others speak."""
        spec = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-customvoice")
        registry = _registry(catalog, MODEL_PATHS=f"{spec.id}={tiny('custom_voice', '0b6')}", DTYPE="float16")
        assert registry.estimated(spec) == spec
        with pytest.raises(JobError, match="TTS_DTYPE=float16 is for CUDA") as caught:
            registry.open(spec)
        assert caught.value.code == "model_unavailable"

    def test_shared(self, catalog: list[ModelSpec]) -> None:
        """The device is started once, before the first engine; the codec is there as long as an engine is."""
        spec = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-customvoice")
        started: list[dict[str, int]] = []
        settings = load_settings({"TTS_MODEL_PATHS": f"{spec.id}={tiny('custom_voice', '0b6')}"})
        registry = EngineFactory(settings, catalog, "cpu", start_device=lambda: started.append(registry.shared_bytes()))
        registry.prepare()
        assert started == []
        engines = [registry.open(spec) for _ in range(2)]
        assert started == [{}]
        held = registry.shared_bytes()["codec"]
        engines[0].close()
        assert registry.shared_bytes()["codec"] == held > 0
        engines[1].close()
        assert registry.shared_bytes()["codec"] == 0

    def test_wakes(self, catalog: list[ModelSpec]) -> None:
        """Whoever waits for work is told when a recording is encoded, and its job can go on."""
        spec = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-base")
        settings = load_settings({"TTS_MODEL_PATHS": f"{spec.id}={tiny('base', '0b6')}"})
        woken = threading.Event()
        engine = EngineFactory(settings, catalog, "cpu", wake=woken.set).open(spec)
        engine.admit(clone(1))
        assert woken.wait(60)
        assert engine.runnable(())
        engine.close()

    def test_prepared(self, catalog: list[ModelSpec]) -> None:
        """Where a model could be opened, all that takes is imported before, and no collection of garbage looks at it.

        Imports hold the interpreter for a second at a time, and a full collection for half of one.
        """
        registry = _registry(catalog, MODEL_PATHS=f"qwen3-tts-0.6b-customvoice={tiny('custom_voice', '0b6')}")
        registry.prepare()
        assert gc.get_freeze_count() > 100_000
        assert {"qwen_tts", "gpu_worker.engines.qwen.build"} <= sys.modules.keys()

    def test_not_prepared(self, catalog: list[ModelSpec]) -> None:
        """Where none could be, nothing is: who has no weights does not wait for torch."""
        _registry(catalog).prepare()
        assert gc.get_freeze_count() == 0


class TestFiles:
    """Checkpoints that are here, elsewhere, or changing."""

    @pytest.mark.parametrize(
        ("variables", "expected"),
        [
            ({"ALLOW_DOWNLOAD": "true"}, True),
            ({"ALLOW_DOWNLOAD": "false"}, False),
            ({"ALLOW_DOWNLOAD": "true", "MODEL_PATHS": "qwen3-tts-0.6b-base=/nowhere"}, False),
        ],
    )
    def test_needs_fetch(
        self, catalog: list[ModelSpec], tmp_path: Path, variables: dict[str, str], *, expected: bool
    ) -> None:
        """A model that is not here is to be fetched where that is allowed, but never into a place of somebody's own."""
        registry = _registry(catalog, MODELS_DIR=str(tmp_path), **variables)
        model = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-base")
        assert registry.needs_fetch(model) is expected
        assert not registry.needs_fetch(_espeak(catalog))

    def test_stamp(self, catalog: list[ModelSpec], tmp_path: Path) -> None:
        """It changes with the model's files, and is the same as long as they are."""
        registry = _registry(catalog, MODELS_DIR=str(tmp_path))
        model = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-base")
        empty = registry.stamp_of(model)
        directory = tmp_path / model.hf_id.rpartition("/")[2]
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        first = registry.stamp_of(model)
        assert first == registry.stamp_of(model) != empty
        (directory / "config.json").write_text('{"mended": true}')
        assert registry.stamp_of(model) != first


class TestDefaultModel:
    """The model that a request without one means."""

    def test_without_gpu(self, catalog: list[ModelSpec]) -> None:
        """On a CPU it is the one that can speak there."""
        assert _registry(catalog).default_model() == "espeak-ng"

    def test_gpu_without_engine(self, catalog: list[ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
        """A GPU alone does not make Qwen3-TTS speak."""
        _without(monkeypatch, "qwen_tts")
        assert _registry(catalog, "cuda").default_model() == "espeak-ng"

    @pytest.mark.parametrize(("size", "expected"), [("large", "1.7b"), ("0.6B", "0.6b")])
    def test_gpu(self, catalog: list[ModelSpec], monkeypatch: pytest.MonkeyPatch, size: str, expected: str) -> None:
        """Where it can speak on a GPU, it is Qwen3-TTS CustomVoice of the default size."""
        registry = _registry(catalog, "cuda", DEFAULT_MODEL_SIZE=size)
        monkeypatch.setattr(registry, "problem_of", lambda _: None)
        assert registry.default_model() == f"qwen3-tts-{expected}-customvoice"

    @pytest.mark.parametrize("name", ["Espeak", "espeak-ng"])
    def test_named(self, catalog: list[ModelSpec], name: str) -> None:
        """A model can be named by any name it answers to, whatever the device."""
        assert _registry(catalog, "cuda", DEFAULT_MODEL=name).default_model() == "espeak-ng"

    def test_named_but_unknown(self, catalog: list[ModelSpec]) -> None:
        """A name that means none stops the start, and the setting is named."""
        with pytest.raises(SettingsError, match=r"TTS_DEFAULT_MODEL: there is no model 'x'; there are .*espeak-ng"):
            _registry(catalog, DEFAULT_MODEL="x").default_model()


class TestPreload:
    """The models that are there from the start."""

    def test_default_first_and_each_once(self, catalog: list[ModelSpec]) -> None:
        """The default model, then those of the setting, by any name, none twice."""
        registry = _registry(catalog, PRELOAD="espeak, Qwen/Qwen3-TTS-12Hz-0.6B-Base,qwen3-tts-0.6b-base")
        assert registry.preloaded("espeak-ng") == ["espeak-ng", "qwen3-tts-0.6b-base"]

    def test_unknown(self, catalog: list[ModelSpec]) -> None:
        """A name that means none stops the start."""
        with pytest.raises(SettingsError, match="TTS_PRELOAD: there is no model 'x'"):
            _registry(catalog, PRELOAD="x").preloaded("espeak-ng")
