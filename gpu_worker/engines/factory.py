"""Which engine speaks for which model: whether it could, what it will take, and how one is opened.

torch is imported only where a model that needs it can be opened.
"""

import gc
import importlib.util
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from gpu_worker.engines.base import Engine, JobError
from shared.catalog import ModelSpec
from shared.settings import Settings, SettingsError

if TYPE_CHECKING:
    from gpu_worker.engines.qwen.build import QwenOptions

DEMO_EXTRA: Final = 'espeak-ng is not installed; install the "demo" extra: pip install "qwen3-tts-server[demo]"'
GPU_EXTRA: Final = 'install the "gpu" extra: pip install "qwen3-tts-server[gpu]", or `make serve WITH_QWEN=1`'

_KIND_OF_TASK: Final = {"CustomVoice": "custom_voice", "VoiceDesign": "voice_design", "Base": "base"}


class EngineFactory:
    """Opens engines for the models of the catalogue, on one device.

    Engines are opened by one thread at a time; everything else may be asked from any.
    """

    def __init__(
        self,
        settings: Settings,
        specs: Sequence[ModelSpec],
        device: Literal["cuda", "cpu"],
        *,
        progress: Callable[[str, str], None] = lambda _model, _detail: None,
        room: Callable[[], int] | None = None,
        start_device: Callable[[], None] = lambda: None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`progress` hears, from the thread that fetches, how far a model's download has come.

        `room` tells it how many bytes of the device may still be taken; None: all that are free.
        `start_device` is called once, by the thread that opens, before anything of the device is used.
        `wake` is called, from any thread, when an engine may have become runnable by itself.
        """
        self._settings = settings
        self._specs = list(specs)
        self._device: Literal["cuda", "cpu"] = device
        self._progress = progress
        self._room = room
        self._start_device = start_device
        self._wake = wake
        self._options: QwenOptions | None = None

    def problem_of(self, spec: ModelSpec) -> str | None:
        """Why this model cannot speak here and now, and what to do; None where nothing speaks against it.

        Looks at what is installed and on disk without importing torch, so it may be asked again before every load.
        """
        if spec.engine == "espeak":
            return DEMO_EXTRA if importlib.util.find_spec("espeakng_loader") is None else None
        missing = [name for name in ("torch", "qwen_tts") if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed; {GPU_EXTRA}"
        if self._settings.allow_download:
            return None
        try:
            self._directory_of(spec, allow_download=False)
        except JobError as error:
            return error.message
        return None

    def prepare(self) -> None:
        """Import what opening the models that are there takes, before anybody speaks.

        torch and the official package hold the interpreter for up to 1.2 s at a time while they are imported
        (2 cores, busy), and whoever spoke meanwhile would fall silent; opening a model then takes 30 ms of it at most.
        A collection of garbage would look through all they made, 250 to 800 ms, so it is told to leave that alone.
        """
        if not any(spec.engine == "qwen" and self.problem_of(spec) is None for spec in self._specs):
            return
        from gpu_worker.engines.qwen import build, codec  # noqa: F401, PLC0415 -- this is the import
        from gpu_worker.engines.qwen.checkpoint import official  # noqa: PLC0415 -- likewise

        official.load_official()
        gc.collect()
        gc.freeze()

    def estimated(self, spec: ModelSpec) -> ModelSpec:
        """The model, with what its checkpoint here will take instead of what the published one would.

        Where there is none (yet), or none that can be computed with, the catalogue's figure stands. After `prepare`.
        """
        if spec.engine != "qwen" or self.problem_of(spec) is not None:
            return spec
        from gpu_worker.engines.qwen.build import estimated_bytes  # noqa: PLC0415 -- imports torch

        settings = self._settings
        try:
            directory = self._directory_of(spec, allow_download=False)
            needed = estimated_bytes(directory, self._device, settings.dtype, settings.max_concurrency)
        except JobError:
            return spec
        return msgspec.structs.replace(spec, estimated_bytes=needed)

    def needs_fetch(self, spec: ModelSpec) -> bool:
        """Whether the model could be opened if only its checkpoint were here, which `fetch` would see to."""
        if spec.engine != "qwen" or not self._settings.allow_download or self._configured(spec) is not None:
            return False
        try:
            self._directory_of(spec, allow_download=False)
        except JobError:
            return True
        return False

    def fetch(self, spec: ModelSpec) -> None:
        """Bring the model's checkpoint here, for minutes to hours; JobError where it cannot be had or will not do."""
        self._directory_of(spec, allow_download=self._settings.allow_download)

    def stamp_of(self, spec: ModelSpec) -> str:
        """Something that changes with the files of the model's checkpoint, from whichever directory it would be read.

        Copies in the Hugging Face cache, which nobody writes to by hand, do not count.
        """
        if spec.engine != "qwen":
            return ""
        directory = self._configured(spec) or self._settings.models_dir / spec.hf_id.rpartition("/")[2]
        entries = ((file, file.stat()) for file in sorted(directory.rglob("*")) if file.is_file())
        return "\n".join(f"{file} {status.st_size} {status.st_mtime_ns}" for file, status in entries)

    def open(self, spec: ModelSpec) -> Engine:
        """Load the model from what is here, ready to speak; JobError says why it cannot be."""
        if problem := self.problem_of(spec):
            raise JobError("model_unavailable", f"{spec.id}: {problem}")
        if spec.engine == "espeak":
            from gpu_worker.engines.espeak import EspeakEngine  # noqa: PLC0415 -- an optional extra

            return EspeakEngine(spec)
        directory = self._directory_of(spec, allow_download=False)
        from gpu_worker.engines.qwen.build import open_engine  # noqa: PLC0415 -- imports torch

        return open_engine(directory, self._qwen_options())

    def shared_bytes(self) -> dict[str, int]:
        """Device bytes that several models use together, by purpose."""
        return {} if self._options is None else {"codec": self._options.codecs.bytes}

    def default_model(self) -> str:
        """The model that a request without one means.

        `TTS_DEFAULT_MODEL` if it names one; "auto" is Qwen3-TTS CustomVoice of the default size where a CUDA device is
        at hand and the model is there or may be fetched, else espeak-ng.
        SettingsError where the setting names a model that the catalogue lacks.
        """
        wanted = self._settings.default_model
        if wanted != "auto":
            return self._named(wanted, "TTS_DEFAULT_MODEL").id
        if self._device == "cuda":
            for spec in self._specs:
                wanted_one = spec.task == "CustomVoice" and spec.size == self._settings.default_model_size
                if wanted_one and self.problem_of(spec) is None:
                    return spec.id
        return next(spec.id for spec in self._specs if spec.engine == "espeak")

    def preloaded(self, default_model: str) -> list[str]:
        """The models to load at start: the default one and those of TTS_PRELOAD; SettingsError as `default_model`."""
        named = [self._named(name, "TTS_PRELOAD").id for name in self._settings.preload]
        return list(dict.fromkeys([default_model, *named]))

    def _named(self, name: str, setting: str) -> ModelSpec:
        for spec in self._specs:
            if spec.answers_to(name):
                return spec
        known = ", ".join(spec.id for spec in self._specs)
        raise SettingsError([f"{setting}: there is no model {name!r}; there are {known}"])

    def _configured(self, spec: ModelSpec) -> Path | None:
        """Where TTS_MODEL_PATHS says that the model's checkpoint is."""
        configured = {name.casefold(): path for name, path in self._settings.model_paths.items()}
        names = (name.casefold() for name in (spec.id, spec.hf_id, *spec.aliases))
        return next((configured[name] for name in names if name in configured), None)

    def _directory_of(self, spec: ModelSpec, *, allow_download: bool) -> Path:
        """The verified checkpoint of a Qwen3-TTS model, fetched first where that is allowed; JobError if there is none.

        A whole checkpoint of another type than the catalogue says is refused as well.
        """
        from gpu_worker.engines.qwen.checkpoint.location import locate  # noqa: PLC0415 -- of the gpu extra
        from gpu_worker.engines.qwen.checkpoint.model_config import read_config  # noqa: PLC0415 -- of the gpu extra

        directory = locate(
            spec.hf_id,
            configured=self._configured(spec),
            models_dir=self._settings.models_dir,
            allow_download=allow_download,
            progress=lambda detail: self._progress(spec.id, detail),
        )
        found = read_config(directory).tts_model_type
        if found != _KIND_OF_TASK[spec.task]:
            problem = f"holds a {found} model, where {spec.id} is {_KIND_OF_TASK[spec.task]}"
            raise JobError("model_unavailable", f"{directory / 'config.json'}: {problem}")
        return directory

    def _qwen_options(self) -> "QwenOptions":
        """How every Qwen3-TTS engine is opened; what they share is in it."""
        if self._options is None:
            import torch  # noqa: PLC0415 -- two seconds that only this engine is worth

            from gpu_worker.engines.qwen.build import QwenOptions, compute_dtype  # noqa: PLC0415 -- imports torch
            from gpu_worker.engines.qwen.codec.shared_codecs import SharedCodecs  # noqa: PLC0415 -- imports torch

            self._start_device()
            dtype = compute_dtype(self._device, self._settings.dtype)
            self._options = QwenOptions(
                codecs=SharedCodecs(dtype=dtype, device=torch.device(self._device)),
                device=self._device,
                dtype=self._settings.dtype,
                attention_backend=self._settings.attention_backend,
                slots=self._settings.max_concurrency,
                pause_s=self._settings.sentence_pause_ms / 1000,
                reference_cache_bytes=self._settings.reference_cache_mb * 2**20,
                encoder_lock=threading.Lock(),
                room=self._room,
                wake=self._wake,
            )
        return self._options
