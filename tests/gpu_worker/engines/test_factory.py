"""EngineFactory: which engine a model gets, if it can be opened, and which model is the default."""

import gc
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import pytest

from gpu_worker.engines.base import JobError
from gpu_worker.engines.espeak import EspeakEngine
from gpu_worker.engines.factory import EngineFactory, trial_file
from gpu_worker.engines.qwen import build
from gpu_worker.engines.qwen.checkpoint import text_tokenizer
from shared.catalog import ModelSpec, load_catalog
from shared.settings import SettingsError, load_settings
from tests.checkpoints import tiny
from tests.gpu_worker.engines.qwen.driving import clone, untraced


@pytest.fixture
def catalog() -> list[ModelSpec]:
    """The models of the project's catalogue."""
    return load_catalog()


def _factory(catalog: list[ModelSpec], device: Literal["cuda", "cpu"] = "cpu", **variables: str) -> EngineFactory:
    return EngineFactory(load_settings({f"TTS_{name}": value for name, value in variables.items()}), catalog, device)


ONE_SLOT: Final = {"MAX_CONCURRENCY": "1"}
"""An engine with one slot is opened in half the time."""


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
        """It has no problem, and its engine is ready to speak."""
        factory = _factory(catalog)
        assert factory.problem_of(_espeak(catalog)) is None
        engine = factory.open(_espeak(catalog))
        assert isinstance(engine, EspeakEngine)
        assert engine.capacity() > 0

    def test_not_installed(self, catalog: list[ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
        """Without its package it cannot be opened, and the problem names what to install."""
        _without(monkeypatch, "espeakng_loader")
        factory = _factory(catalog)
        assert ".[demo]" in str(factory.problem_of(_espeak(catalog)))
        with pytest.raises(JobError, match="not installed") as caught:
            factory.open(_espeak(catalog))
        assert caught.value.code == "model_unavailable"


@pytest.mark.parametrize("download", ["true", "false"])
@pytest.mark.parametrize("looped", ["", "Qwen3-TTS-12Hz-0.6B-Base"])
def test_a_folder_that_cannot_be_read(catalog: list[ModelSpec], tmp_path: Path, download: str, looped: str) -> None:
    """A folder of models, or of one model, that the system refuses makes the model unavailable, with the reason."""
    models_dir = tmp_path / "models"
    if looped:
        models_dir.mkdir()
    folder = models_dir / looped
    folder.symlink_to(folder)
    factory = _factory(catalog, MODELS_DIR=str(models_dir), ALLOW_DOWNLOAD=download)
    spec = next(spec for spec in catalog if spec.hf_id.endswith("0.6B-Base"))
    assert str(factory.problem_of(spec)).startswith(f"{folder} cannot be read by ")
    factory.prepare()  # of the other models
    assert factory.estimated(spec) == spec
    with pytest.raises(JobError, match="cannot be read by") as caught:
        factory.open(spec)
    assert caught.value.code == "model_unavailable"


class TestQwen:
    """The engine that needs torch and a checkpoint."""

    @pytest.fixture(autouse=True)
    def _unfrozen(self) -> Iterator[None]:
        """Undo the freeze of the whole suite for a test, and that of `prepare` before it."""
        gc.unfreeze()
        yield
        gc.freeze()

    def test_not_installed(self, catalog: list[ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
        """The problem names the missing package and what to install, before the disk is searched."""
        _without(monkeypatch, "qwen_tts")
        factory = _factory(catalog)
        qwen = next(spec for spec in catalog if spec.engine == "qwen")
        problem = factory.problem_of(qwen)
        assert problem is not None
        assert problem.startswith("qwen_tts not installed")
        assert ".[gpu]" in problem
        with pytest.raises(JobError, match="qwen_tts not installed"):
            factory.open(qwen)

    def test_estimate(self, catalog: list[ModelSpec]) -> None:
        """The local checkpoint's size is known before it is opened; without one the catalogue's figure stays."""
        here = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-customvoice")
        elsewhere = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-base")
        factory = _factory(catalog, MODEL_PATHS=f"{here.id}={tiny('custom_voice', '0b6')}", **ONE_SLOT)
        factory.prepare()
        engine = factory.open(here)
        held = sum(engine.memory().device.values())
        engine.close()
        assert factory.estimated(here).estimated_bytes == pytest.approx(held, rel=0.01)
        assert factory.estimated(elsewhere) == elsewhere

    def test_slots_of_a_cpu(self, catalog: list[ModelSpec]) -> None:
        """A model gets as many slots as it can have in the budget: eight at most, and one at least."""
        spec = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-customvoice")
        settings = load_settings({"TTS_MODEL_PATHS": f"{spec.id}={tiny('custom_voice', '0b6')}"})

        def estimate(budget: int | None) -> int:
            return EngineFactory(settings, catalog, "cpu", cpu_budget_bytes=budget).estimated(spec).estimated_bytes

        least, most = estimate(0), estimate(None)
        assert estimate(most) == most
        assert all(least <= estimate(budget) <= budget for budget in range(least, most, (most - least) // 10))
        few = EngineFactory(settings, catalog, "cpu", cpu_budget_bytes=most - 1)
        engine = few.open(spec)
        slots, held = engine.capacity(), sum(engine.memory().device.values())
        engine.close()
        assert slots == build.CPU_SLOTS - 1
        assert few.estimated(spec).estimated_bytes == pytest.approx(held, rel=0.01)

    def test_unsupported_kernels(self, catalog: list[ModelSpec]) -> None:
        """The setting reaches the engine, which refuses what the device cannot do."""
        spec = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-customvoice")
        factory = _factory(catalog, MODEL_PATHS=f"{spec.id}={tiny('custom_voice', '0b6')}", KERNELS="triton")
        with pytest.raises(JobError, match="TTS_KERNELS=triton needs a CUDA device") as caught:
            factory.open(spec)
        assert caught.value.code == "model_unavailable"

    def test_unsupported_dtype(self, catalog: list[ModelSpec]) -> None:
        """It stops the start, with the setting to change, and is an error of opening the model."""
        spec = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-customvoice")
        factory = _factory(catalog, MODEL_PATHS=f"{spec.id}={tiny('custom_voice', '0b6')}", DTYPE="float16")
        with pytest.raises(SettingsError, match="TTS_DTYPE=float16 is for CUDA"):
            factory.prepare()
        assert factory.estimated(spec) == spec
        with pytest.raises(JobError, match="TTS_DTYPE=float16 is for CUDA") as caught:
            factory.open(spec)
        assert caught.value.code == "model_unavailable"

    def test_unsupported_dtype_of_the_codec(self, catalog: list[ModelSpec]) -> None:
        """The setting of the codec is its own, and is named."""
        spec = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-customvoice")
        factory = _factory(catalog, MODEL_PATHS=f"{spec.id}={tiny('custom_voice', '0b6')}", CODEC_DTYPE="float16")
        with pytest.raises(JobError, match="TTS_CODEC_DTYPE=float16 is for CUDA"):
            factory.open(spec)

    def test_each_unsupported_setting_is_named(self, catalog: list[ModelSpec]) -> None:
        """Only values of models that could be opened count; each problem comes once."""
        spec = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-customvoice")
        common = {"MODEL_PATHS": f"{spec.id}={tiny('custom_voice', '0b6')}", "DTYPE": "bfloat16"}
        _factory(catalog, **common, QUANTIZATION="none,qwen3-tts-1.7b-base=int8").prepare()
        with pytest.raises(SettingsError, match="TTS_QUANTIZATION=int8 computes in float32") as caught:
            _factory(catalog, **common, QUANTIZATION=f"none,{spec.hf_id}=int8").prepare()
        assert len(caught.value.problems) == 1
        with pytest.raises(SettingsError, match="flash_attention_2 needs CUDA"):
            _factory(catalog, **common, ATTENTION_BACKEND="flash_attention_2").prepare()

    def test_what_the_gpu_cannot_is_known_before_it_is_used(self, catalog: list[ModelSpec]) -> None:
        """By its compute capability. "auto" is a dtype that it can."""
        spec = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-customvoice")
        paths = f"{spec.id}={tiny('custom_voice', '0b6')}"
        settings = load_settings({"TTS_MODEL_PATHS": paths, "TTS_QUANTIZATION": "fp8"})
        with pytest.raises(SettingsError, match="TTS_QUANTIZATION=fp8 needs a GPU of compute capability"):
            EngineFactory(settings, catalog, "cuda", capability=(8, 6)).prepare()
        settings = load_settings({"TTS_MODEL_PATHS": paths})
        sizes = [
            EngineFactory(settings, catalog, "cuda", capability=capability).estimated(spec).estimated_bytes
            for capability in ((7, 5), None)
        ]
        assert sizes[0] == sizes[1] != spec.estimated_bytes
        assert EngineFactory(settings, catalog, "cuda", capability=(7, 5))._dtype() == "float16"

    def test_a_model_has_its_own_quantization(self, catalog: list[ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
        """It is found by any name of the model; trials are kept in the user's cache."""
        spec = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-customvoice")
        asked: list[Any] = []
        monkeypatch.setattr(build, "open_engine", lambda _, options: asked.append(options))
        for value in ("int8", f"int8,{spec.hf_id}=fp16"):
            _factory(catalog, MODEL_PATHS=f"{spec.id}={tiny('custom_voice', '0b6')}", QUANTIZATION=value).open(spec)
        assert [options.quantization for options in asked] == ["int8", "fp16"]
        assert trial_file({"XDG_CACHE_HOME": "/var/cache"}) == Path("/var/cache/qwen3-tts-server/products.json")
        assert asked[0].trial_file == trial_file(os.environ)

    @untraced()
    def test_shared_parts(self, catalog: list[ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
        """The device is started once, before the first engine; the codec lives as long as any engine.

        The text tokenizer, whose making would silence streams, is there before.
        """
        spec = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-customvoice")
        started: list[dict[str, int]] = []
        settings = load_settings(
            {"TTS_MODEL_PATHS": f"{spec.id}={tiny('custom_voice', '0b6')}", "TTS_MAX_CONCURRENCY": "1"}
        )
        factory = EngineFactory(settings, catalog, "cpu", start_device=lambda: started.append(factory.shared_bytes()))
        factory.prepare()
        assert started == []
        monkeypatch.setattr(text_tokenizer, "load_text_tokenizer", lambda _: pytest.fail("made while others speak"))
        engines = [factory.open(spec) for _ in range(2)]
        assert started == [{}]
        held = factory.shared_bytes()["codec"]
        engines[0].close()
        assert factory.shared_bytes()["codec"] == held > 0
        engines[1].close()
        assert factory.shared_bytes()["codec"] == 0

    @untraced()
    def test_wakes(self, catalog: list[ModelSpec]) -> None:
        """`wake` is called when a recording is encoded and its job has become runnable."""
        spec = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-base")
        settings = load_settings({"TTS_MODEL_PATHS": f"{spec.id}={tiny('base', '0b6')}", "TTS_MAX_CONCURRENCY": "1"})
        woken = threading.Event()
        engine = EngineFactory(settings, catalog, "cpu", wake=woken.set).open(spec)
        engine.admit(clone(1))
        assert woken.wait(60)
        assert engine.runnable(())
        engine.close()

    @pytest.mark.timeout(600)
    def test_what_a_process_imports(self) -> None:
        """A process that speaks with preset voices imports torch, but not the official package: it starts sooner.

        For a model that clones, `prepare` imports that package, too, and freezes all objects: the imports hold the GIL
        for a second at a time, a full garbage collection for half a second.
        The import of that package is silent. It leaves out what only its 25 Hz tokenizer needs, and other ways of
        generating.
        """
        paths = f"qwen3-tts-0.6b-customvoice={tiny('custom_voice', '0b6')}"
        cloning = f"qwen3-tts-0.6b-base={tiny('base', '0b6')}"
        program = f"""
import gc, sys
from gpu_worker.engines.factory import EngineFactory, trial_file
from shared.catalog import load_catalog
from shared.settings import load_settings
settings = load_settings({{"TTS_MODEL_PATHS": "{paths}", "TTS_MAX_CONCURRENCY": "1"}})
specs = load_catalog()
factory = EngineFactory(settings, specs, "cpu")
factory.prepare()
assert "torch" in sys.modules
engine = factory.open(next(spec for spec in specs if spec.id == "qwen3-tts-0.6b-customvoice"))
heavy = {{"transformers", "qwen_tts", "librosa", "scipy", "sklearn", "sympy", "torch._dynamo"}} & set(sys.modules)
assert not heavy, heavy
EngineFactory(load_settings({{"TTS_MODEL_PATHS": "{cloning}"}}), specs, "cpu").prepare()
assert {{"qwen_tts", "gpu_worker.engines.qwen.build"}} <= sys.modules.keys()
assert gc.get_freeze_count() > 100_000
gc.unfreeze()  # else Triton prints at the end what was not freed
from gpu_worker.engines.qwen.checkpoint.official import load_official
assert load_official() is load_official()
assert load_official().TokenizerEncoder.__name__ == "Qwen3TTSTokenizerV2Encoder"
assert not {{"sox", "onnxruntime", "torchaudio", "sklearn", "pandas"}} & set(sys.modules)
"""
        command = [sys.executable, "-W", "error", "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_prepare_without_checkpoints(self, catalog: list[ModelSpec]) -> None:
        """Without a checkpoint nothing is imported: the start does not wait for torch."""
        _factory(catalog).prepare()
        assert gc.get_freeze_count() == 0


class TestFiles:
    """Checkpoints that are local, remote, or changing."""

    @pytest.mark.parametrize(
        ("variables", "expected"),
        [
            ({"ALLOW_DOWNLOAD": "true"}, True),
            ({"ALLOW_DOWNLOAD": "false"}, False),
            ({"ALLOW_DOWNLOAD": "true", "MODEL_PATHS": "qwen3-tts-0.6b-base=/nowhere"}, False),
        ],
    )
    def test_needs_download(
        self, catalog: list[ModelSpec], tmp_path: Path, variables: dict[str, str], *, expected: bool
    ) -> None:
        """A missing checkpoint is downloaded if that is allowed, but never into a directory of TTS_MODEL_PATHS."""
        factory = _factory(catalog, MODELS_DIR=str(tmp_path), **variables)
        model = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-base")
        assert factory.needs_download(model) is expected
        assert not factory.needs_download(_espeak(catalog))

    def test_stamp(self, catalog: list[ModelSpec], tmp_path: Path) -> None:
        """The stamp changes with the model's files, and only then."""
        factory = _factory(catalog, MODELS_DIR=str(tmp_path))
        model = next(spec for spec in catalog if spec.id == "qwen3-tts-0.6b-base")
        empty = factory.file_stamp(model)
        directory = tmp_path / model.hf_id.rpartition("/")[2]
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        first = factory.file_stamp(model)
        assert first == factory.file_stamp(model) != empty
        (directory / "config.json").write_text('{"mended": true}')
        assert factory.file_stamp(model) != first


class TestDefaultModel:
    """The model of a request that names none."""

    def test_without_gpu(self, catalog: list[ModelSpec]) -> None:
        """On a CPU it is espeak-ng."""
        assert _factory(catalog).default_model() == "espeak-ng"

    def test_gpu_without_engine(self, catalog: list[ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the packages of Qwen3-TTS it is espeak-ng on a GPU, too."""
        _without(monkeypatch, "qwen_tts")
        assert _factory(catalog, "cuda").default_model() == "espeak-ng"

    @pytest.mark.parametrize(("size", "expected"), [("large", "1.7b"), ("0.6B", "0.6b")])
    def test_gpu(self, catalog: list[ModelSpec], monkeypatch: pytest.MonkeyPatch, size: str, expected: str) -> None:
        """On a GPU it is Qwen3-TTS CustomVoice of the default size."""
        factory = _factory(catalog, "cuda", DEFAULT_MODEL_SIZE=size)
        monkeypatch.setattr(factory, "problem_of", lambda _: None)
        assert factory.default_model() == f"qwen3-tts-{expected}-customvoice"

    @pytest.mark.parametrize("name", ["Espeak", "espeak-ng"])
    def test_named(self, catalog: list[ModelSpec], name: str) -> None:
        """TTS_DEFAULT_MODEL takes any name of a model, on any device."""
        assert _factory(catalog, "cuda", DEFAULT_MODEL=name).default_model() == "espeak-ng"

    def test_named_but_unknown(self, catalog: list[ModelSpec]) -> None:
        """An unknown name is a SettingsError that names the setting."""
        with pytest.raises(SettingsError, match=r"TTS_DEFAULT_MODEL: there is no model 'x'; there are .*espeak-ng"):
            _factory(catalog, DEFAULT_MODEL="x").default_model()


class TestPreload:
    """The models to load at start."""

    def test_default_first_and_each_once(self, catalog: list[ModelSpec]) -> None:
        """The default model comes first, then those of TTS_PRELOAD, none twice."""
        factory = _factory(catalog, PRELOAD="espeak, Qwen/Qwen3-TTS-12Hz-0.6B-Base,qwen3-tts-0.6b-base")
        assert factory.models_to_preload("espeak-ng") == ["espeak-ng", "qwen3-tts-0.6b-base"]

    def test_unknown(self, catalog: list[ModelSpec]) -> None:
        """An unknown name is a SettingsError."""
        with pytest.raises(SettingsError, match="TTS_PRELOAD: there is no model 'x'"):
            _factory(catalog, PRELOAD="x").models_to_preload("espeak-ng")
