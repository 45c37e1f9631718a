"""The settings and their surroundings: the variables they come from, and the models and folders that they name.

The variables are those of the environment and, where it lacks one, of the file .env in the current folder.
"""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from shared.access import current_user, folder_problem
from shared.audit import AuditError, read_key
from shared.catalog import OPENAI_MODELS, load_catalog
from shared.dotenv_file import WrongLinesError, read_dotenv
from shared.settings import EVERY_MODEL, Settings, SettingsError, load_settings, variable_of

NO_CUDA: Final = "there is no CUDA device that this process may use (nvidia-smi and CUDA_VISIBLE_DEVICES tell of them)"
"""The problem of TTS_DEFAULT_DEVICE=cuda on a machine without such a device; the GPU worker looks for it."""


def environment() -> dict[str, str]:
    """The environment of the process, and the TTS_* variables of .env that it lacks.

    SettingsError if .env is wrong; its other lines, and the environment, are checked then as well.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise SettingsError([f"the current folder cannot be used: {error.strerror or error}"]) from None
    try:
        return read_dotenv(Path(".env")) | os.environ
    except WrongLinesError as error:
        raise SettingsError([*error.problems, *_wrong_values(error.found | os.environ)]) from None


def _wrong_values(variables: Mapping[str, str]) -> list[str]:
    try:
        load_settings(variables)
    except SettingsError as error:
        return error.problems
    return []


def unknown_models(settings: Settings) -> list[str]:
    """Problems of settings that name an unknown model; CatalogError if models/ cannot be read."""
    catalog = load_catalog()
    named = [("preload", name) for name in settings.preload] + [("model_paths", name) for name in settings.model_paths]
    named += [("model_replicas", name) for name in settings.model_replicas]
    named += [("quantization", name) for name in settings.quantization if name != EVERY_MODEL]
    targets = [name for name in settings.model_aliases.values() if name.casefold() not in OPENAI_MODELS]
    named += [("model_aliases", name) for name in targets]
    if settings.default_model != "auto":
        named.insert(0, ("default_model", settings.default_model))
    known = ", ".join(spec.id for spec in catalog)
    taken = [name for name in settings.model_aliases if any(spec.answers_to(name) for spec in catalog)]
    return [f"{variable_of('model_aliases')}: {name!r} is the name of a model already" for name in taken] + [
        f"{variable_of(field)}: there is no model {name!r}; there are {known}"
        for field, name in named
        if not any(spec.answers_to(name) for spec in catalog)
    ]


def impossible_kernels(settings: Settings) -> list[str]:
    """The problem of TTS_KERNELS=triton without Triton or on a CPU. Call it on the machine of the GPU worker."""
    if settings.kernels != "triton":
        return []
    if settings.default_device == "cpu":
        problem = f"triton needs a CUDA device, but {variable_of('default_device')} is cpu"
    elif importlib.util.find_spec("triton") is None:
        problem = "the package triton is not installed"
    else:
        return []
    return [f"{variable_of('kernels')}: {problem}; use auto or torch"]


def unusable_folders(settings: Settings) -> list[str]:
    """Problems of settings that name an unusable folder of weights or of voices, or an unusable audit log.

    TTS_MODELS_DIR is none of them: without it the service speaks with espeak-ng.
    Call it on the machine of the GPU worker. It creates nothing.
    """
    problems = []
    for name, path in settings.model_paths.items():
        problem = folder_problem(path)
        if problem is None and not os.path.isdir(path):  # noqa: PTH112 -- Path's raises where a folder may not be entered
            problem = f"{path} is not a folder"
        if problem is not None:
            problems.append(f"{variable_of('model_paths')}: {problem} (for {name})")
    if settings.max_voices:
        problem = folder_problem(settings.voices_dir)
        if problem is None and not _writable(settings.voices_dir):
            problem = f"{settings.voices_dir} cannot be written by {current_user()}"
        if problem is not None:
            advice = f"name another folder, or save no voices ({variable_of('max_voices')}=0)"
            problems.append(f"{variable_of('voices_dir')}: {problem}; {advice}")
        problems += _audit_problems(settings)
    return problems


def _audit_problems(settings: Settings) -> list[str]:
    problems = []
    if settings.audit_log is not None and not _writable(settings.audit_log.parent):
        problem = f"{settings.audit_log.parent} cannot be written by {current_user()}"
        problems.append(f"{variable_of('audit_log')}: {problem}")
    if settings.audit_key_file is not None:
        try:
            read_key(settings.audit_key_file)
        except AuditError as error:
            problems.append(f"{variable_of('audit_key_file')}: {error}")
    return problems


def _writable(directory: Path) -> bool:
    """True if files can be created in `directory`, or the directory itself."""
    existing = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)  # noqa: PTH112 -- as above
