"""EngineFactory opens the engine of a model. It also says whether a model could be opened, and how large it will be.

It decides neither when a model is loaded nor where it is. It never imports torch unless a model that needs torch can be
opened.
"""

import contextlib
import functools
import gc
import importlib.util
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from gpu_worker.engines.base import Engine, JobError
from shared.access import folder_problem, unreadable
from shared.catalog import ModelSpec
from shared.settings import EVERY_MODEL, Settings, SettingsError

if TYPE_CHECKING:
    from gpu_worker.engines.qwen.build import DtypeName, QwenOptions
    from gpu_worker.engines.qwen.checkpoint.text_tokenizer import SharedTokenizers
    from gpu_worker.engines.qwen.runtime.products_trial import Quantization

_FOLDER: Final = "in the service's folder"
DEMO_EXTRA: Final = f"espeak-ng is not installed; `make serve` installs it, or `pip install -e '.[demo]'` {_FOLDER}"
GPU_EXTRA: Final = f"`make serve WITH_QWEN=1` installs what Qwen3-TTS needs, or `pip install -e '.[gpu]'` {_FOLDER}"

_MODEL_TYPE_OF_TASK: Final = {"CustomVoice": "custom_voice", "VoiceDesign": "voice_design", "Base": "base"}


def trial_file(environ: Mapping[str, str]) -> Path | None:
    """The file that keeps the outcomes of trials on this machine; None if the user has no home folder."""
    try:
        return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qwen3-tts-server" / "products.json"
    except RuntimeError:
        return None


class EngineFactory:
    """Opens engines for the models of the catalogue, on one device.

    `open` runs on one thread at a time; every other method may be called from any thread.
    """

    def __init__(
        self,
        settings: Settings,
        specs: Sequence[ModelSpec],
        device: Literal["cuda", "cpu"],
        *,
        capability: tuple[int, int] | None = None,
        progress: Callable[[str, str], None] = lambda _model, _detail: None,
        free_bytes: Callable[[], int] | None = None,
        cpu_budget_bytes: int | None = None,
        start_device: Callable[[], None] = lambda: None,
        wake: Callable[[], None] = lambda: None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """`capability`: the compute capability of the CUDA device, if it is known before CUDA is started.

        `progress(model, detail)` is called on the thread that downloads.

        `free_bytes` returns the bytes of the device that may still be taken; None: all that are free.
        `cpu_budget_bytes`: what the models may take of RAM on a CPU; None: they are not limited.
        `start_device` is called once, on the thread that opens engines, before the first use of the device.
        `wake` is called on any thread when an engine may have become runnable without a call.
        `interrupted` returns True if a step must not wait for the device, because a command waits for its caller.
        """
        self._settings = settings
        self._specs = list(specs)
        self._device: Literal["cuda", "cpu"] = device
        self._capability = capability
        self._progress = progress
        self._free_bytes = free_bytes
        self._cpu_budget_bytes = cpu_budget_bytes
        self._start_device = start_device
        self._wake = wake
        self._interrupted = interrupted
        self._options: QwenOptions | None = None

    def problem_of(self, spec: ModelSpec) -> str | None:
        """Why this model cannot be opened now, and what to do about it; None if it can.

        It checks packages and files without importing torch, so it is cheap enough to be called before every load.
        """
        if spec.engine == "espeak":
            return DEMO_EXTRA if importlib.util.find_spec("espeakng_loader") is None else None
        missing = [name for name in ("torch", "qwen_tts") if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed; {GPU_EXTRA}"
        configured = self._configured(spec)
        for folder in [self._settings.models_dir, self._own_folder(spec)] if configured is None else [configured]:
            if problem := folder_problem(folder):
                return problem
        if self._settings.allow_download:
            return None
        try:
            self._directory_of(spec, allow_download=False)
        except JobError as error:
            return error.message
        return None

    def prepare(self) -> None:
        """Import what the models need that can be opened now, before the first request.

        That is torch, and for models that clone voices the official package. Text tokenizers are loaded as well.
        An import holds the GIL for up to 1.2 s at a time (2 cores, busy): running streams would fall silent.
        Afterwards, opening a model holds it for 30 ms at most.
        The objects they create are frozen: a full garbage collection would scan them for 250 to 800 ms.
        SettingsError names the settings that this device cannot compute with, and what to do about them.
        """
        specs = [spec for spec in self._specs if spec.engine == "qwen" and self.problem_of(spec) is None]
        if not specs:
            return
        self._refuse_unsupported(specs)
        import torch  # noqa: PLC0415 -- takes a second

        from gpu_worker.engines.qwen import build, codec  # noqa: F401, PLC0415 -- imports torch
        from gpu_worker.engines.qwen.checkpoint import official  # noqa: PLC0415 -- imports torch

        torch.get_num_threads()  # now this thread has its number: later it would take what another one has set last
        if any(spec.task == "Base" for spec in specs):
            official.load_official()
        for spec in specs:
            with contextlib.suppress(JobError):  # the load of the model will say so
                self._tokenizers.load(self._directory_of(spec, allow_download=False))
        gc.collect()
        gc.freeze()

    def _refuse_unsupported(self, specs: Sequence[ModelSpec]) -> None:
        from gpu_worker.engines.qwen import device_checks  # noqa: PLC0415 -- imports torch

        wanted = device_checks.Computation(
            device=self._device,
            capability=self._capability,
            dtype=self._settings.dtype,
            codec_dtype=self._settings.codec_dtype,
            attention_backend=self._settings.attention_backend,
            kernels=self._settings.kernels,
        )
        found: list[str] = []
        for quantization in dict.fromkeys(map(self._quantization_of, specs)):
            found += device_checks.problems(msgspec.structs.replace(wanted, quantization=quantization))
        if found:
            raise SettingsError(list(dict.fromkeys(found)))

    def _dtype(self) -> "DtypeName":
        """TTS_DTYPE, or what "auto" is on this device."""
        from gpu_worker.engines.qwen.device_checks import dtype_on  # noqa: PLC0415 -- imports torch

        return dtype_on(self._device, self._settings.dtype, self._capability)

    def _quantization_of(self, spec: ModelSpec) -> "Quantization":
        """The form of this model's weights: its own value of TTS_QUANTIZATION, or that of all models."""
        values = self._settings.quantization
        own = next((value for name, value in values.items() if spec.answers_to(name)), None)
        return own or values.get(EVERY_MODEL, "auto")

    def estimated(self, spec: ModelSpec) -> ModelSpec:
        """`spec` with the bytes that its local checkpoint will take. Call after `prepare`.

        The catalogue's figure, that of the published checkpoint, stays if there is no local one,
        or if the device cannot compute with it.
        """
        if spec.engine != "qwen" or self.problem_of(spec) is not None:
            return spec
        from gpu_worker.engines.qwen.build import estimated_bytes  # noqa: PLC0415 -- imports torch

        settings = self._settings
        try:
            directory = self._directory_of(spec, allow_download=False)
            needed = estimated_bytes(
                directory,
                self._device,
                self._dtype(),
                settings.max_concurrency,
                self._quantization_of(spec),
                cpu_budget_bytes=self._cpu_budget_bytes,
            )
        except JobError:
            return spec
        return msgspec.structs.replace(spec, estimated_bytes=needed)

    def needs_download(self, spec: ModelSpec) -> bool:
        """True if the model's checkpoint is not here but `download` may fetch it."""
        if spec.engine != "qwen" or not self._settings.allow_download or self._configured(spec) is not None:
            return False
        try:
            self._directory_of(spec, allow_download=False)
        except JobError:
            return True
        return False

    def download(self, spec: ModelSpec) -> None:
        """Download the model's checkpoint, for minutes to hours; JobError if that fails or the files are wrong."""
        self._directory_of(spec, allow_download=self._settings.allow_download)

    def file_stamp(self, spec: ModelSpec) -> str:
        """A string that changes when the files of the model's checkpoint change.

        It covers the directory from TTS_MODEL_PATHS or TTS_MODELS_DIR. The Hugging Face cache is left out:
        people do not edit files there.
        """
        if spec.engine != "qwen":
            return ""
        directory = self._configured(spec) or self._own_folder(spec)
        try:
            entries = [(file, file.stat()) for file in sorted(directory.rglob("*")) if file.is_file()]
        except OSError as error:  # may not be read, or was just deleted: the stamp changes once that has changed
            return unreadable(directory, error)
        return "\n".join(f"{file} {status.st_size} {status.st_mtime_ns}" for file, status in entries)

    def open(self, spec: ModelSpec) -> Engine:
        """Load the model from its local files, ready to speak; JobError if that is impossible."""
        if problem := self.problem_of(spec):
            raise JobError("model_unavailable", f"{spec.id}: {problem}")
        if spec.engine == "espeak":
            from gpu_worker.engines.espeak import EspeakEngine  # noqa: PLC0415 -- an optional extra

            return EspeakEngine(spec)
        directory = self._directory_of(spec, allow_download=False)
        from gpu_worker.engines.qwen.build import open_engine  # noqa: PLC0415 -- imports torch

        quantization = self._quantization_of(spec)
        return open_engine(directory, msgspec.structs.replace(self._qwen_options(), quantization=quantization))

    def checkpoint(self, spec: ModelSpec) -> Path:
        """The directory of the model's verified local checkpoint; JobError if there is none."""
        return self._directory_of(spec, allow_download=False)

    def shared_bytes(self) -> dict[str, int]:
        """Device bytes that several models share, by purpose."""
        return {} if self._options is None else {"codec": self._options.codecs.bytes}

    def default_model(self) -> str:
        """The model of a request that names none: TTS_DEFAULT_MODEL.

        "auto" is Qwen3-TTS CustomVoice of TTS_DEFAULT_MODEL_SIZE on a CUDA device, if the model is here or may be
        downloaded, else espeak-ng. SettingsError if the catalogue lacks the named model.
        """
        wanted = self._settings.default_model
        if wanted != "auto":
            return self._named(wanted, "TTS_DEFAULT_MODEL").id
        if self._device == "cuda":
            size = self._settings.default_model_size
            for spec in self._specs:
                if spec.task == "CustomVoice" and spec.size == size and self.problem_of(spec) is None:
                    return spec.id
        return next(spec.id for spec in self._specs if spec.engine == "espeak")

    def models_to_preload(self, default_model: str) -> list[str]:
        """The models to load at start: `default_model`, then TTS_PRELOAD; SettingsError as `default_model()`."""
        named = [self._named(name, "TTS_PRELOAD").id for name in self._settings.preload]
        return list(dict.fromkeys([default_model, *named]))

    def _named(self, name: str, setting: str) -> ModelSpec:
        for spec in self._specs:
            if spec.answers_to(name):
                return spec
        known = ", ".join(spec.id for spec in self._specs)
        raise SettingsError([f"{setting}: there is no model {name!r}; there are {known}"])

    def _configured(self, spec: ModelSpec) -> Path | None:
        """The directory of the model's checkpoint according to TTS_MODEL_PATHS, or None."""
        configured = {name.casefold(): path for name, path in self._settings.model_paths.items()}
        names = (name.casefold() for name in (spec.id, spec.hf_id, *spec.aliases))
        return next((configured[name] for name in names if name in configured), None)

    def _own_folder(self, spec: ModelSpec) -> Path:
        """The folder of the model's checkpoint within TTS_MODELS_DIR; it may not exist."""
        return self._settings.models_dir / spec.hf_id.rpartition("/")[2]

    def _directory_of(self, spec: ModelSpec, *, allow_download: bool) -> Path:
        """The directory of a Qwen3-TTS model's verified checkpoint, downloaded first if that is allowed.

        JobError if there is none, or if it holds another kind of model than the catalogue says.
        """
        from gpu_worker.engines.qwen.checkpoint.location import locate  # noqa: PLC0415 -- needs the gpu extra
        from gpu_worker.engines.qwen.checkpoint.model_config import read_config  # noqa: PLC0415 -- needs the gpu extra

        try:
            directory = locate(
                spec.hf_id,
                configured=self._configured(spec),
                models_dir=self._settings.models_dir,
                allow_download=allow_download,
                progress=lambda detail: self._progress(spec.id, detail),
            )
        except OSError as error:
            path = Path(error.filename or self._configured(spec) or self._own_folder(spec))
            raise JobError("model_unavailable", unreadable(path, error)) from error
        found = read_config(directory).tts_model_type
        if found != _MODEL_TYPE_OF_TASK[spec.task]:
            problem = f"holds a {found} model, where {spec.id} is {_MODEL_TYPE_OF_TASK[spec.task]}"
            raise JobError("model_unavailable", f"{directory / 'config.json'}: {problem}")
        return directory

    @functools.cached_property
    def _tokenizers(self) -> "SharedTokenizers":
        from gpu_worker.engines.qwen.checkpoint.text_tokenizer import SharedTokenizers  # noqa: PLC0415 -- the gpu extra

        return SharedTokenizers()

    def _qwen_options(self) -> "QwenOptions":
        """The options of every Qwen3-TTS engine, with the parts that all engines share."""
        if self._options is None:
            import torch  # noqa: PLC0415 -- takes two seconds

            from gpu_worker.engines.qwen.build import QwenOptions, codec_dtype  # noqa: PLC0415 -- imports torch
            from gpu_worker.engines.qwen.codec.shared_codecs import SharedCodecs  # noqa: PLC0415 -- imports torch

            self._start_device()
            dtype = codec_dtype(self._device, self._dtype(), self._settings.codec_dtype)
            self._options = QwenOptions(
                codecs=SharedCodecs(
                    dtype=dtype,
                    device=torch.device(self._device),
                    kernels=self._settings.kernels,
                    may_quantize=self._settings.codec_dtype == "auto",
                    trial_file=trial_file(os.environ),
                ),
                tokenizers=self._tokenizers,
                device=self._device,
                dtype=self._dtype(),
                attention_backend=self._settings.attention_backend,
                kernels=self._settings.kernels,
                trial_file=trial_file(os.environ),
                slots=self._settings.max_concurrency,
                pause_s=self._settings.sentence_pause_ms / 1000,
                reference_cache_bytes=self._settings.reference_cache_mb * 2**20,
                encoder_lock=threading.Lock(),
                room=self._free_bytes,
                cpu_budget_bytes=self._cpu_budget_bytes,
                wake=self._wake,
                interrupted=self._interrupted,
            )
        return self._options
