"""The settings and their surroundings: the variables they come from, and the models and folders that they name.

The variables are those of the environment and, where it lacks one, of the file .env in the current folder.
"""

import os
from pathlib import Path
from typing import Final

from shared.catalog import load_catalog
from shared.dotenv_file import read_dotenv
from shared.settings import Settings, variable_of

NO_CUDA: Final = "there is no CUDA device that this process may use"
"""The problem of TTS_DEFAULT_DEVICE=cuda on a machine without such a device; the GPU worker looks for it."""


def environment() -> dict[str, str]:
    """The environment of the process, and the TTS_* variables of .env that it lacks; SettingsError for a wrong file."""
    return read_dotenv(Path(".env")) | os.environ


def unknown_models(settings: Settings) -> list[str]:
    """Problems of settings that name an unknown model; CatalogError if models/ cannot be read."""
    catalog = load_catalog()
    named = [("preload", name) for name in settings.preload] + [("model_paths", name) for name in settings.model_paths]
    if settings.default_model != "auto":
        named.insert(0, ("default_model", settings.default_model))
    known = ", ".join(spec.id for spec in catalog)
    return [
        f"{variable_of(field)}: there is no model {name!r}; there are {known}"
        for field, name in named
        if not any(spec.answers_to(name) for spec in catalog)
    ]


def unusable_folders(settings: Settings) -> list[str]:
    """Problems of settings that name a missing folder of weights, or a folder for voices that cannot be written.

    Call it on the machine of the GPU worker. It creates nothing.
    """
    problems = [
        f"{variable_of('model_paths')}: {path} (for {name}) is not a folder"
        for name, path in settings.model_paths.items()
        if not os.path.isdir(path)  # noqa: PTH112 -- Path's raises where a folder above may not be entered
    ]
    if settings.max_voices and not _writable(settings.voices_dir):
        problems.append(
            f"{variable_of('voices_dir')}: {settings.voices_dir} cannot be written; name another folder, "
            f"or save no voices ({variable_of('max_voices')}=0)"
        )
    return problems


def _writable(directory: Path) -> bool:
    """True if files can be created in `directory`, or the directory itself."""
    existing = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)  # noqa: PTH112 -- as above
