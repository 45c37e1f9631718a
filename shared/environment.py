"""Where settings come from: the environment and, behind it, the file .env in the current folder.

And whether they fit what there is: the catalogue, and the disk of the machine that the GPU worker runs on.
"""

import os
from pathlib import Path
from typing import Final

from dotenv import dotenv_values

from shared.catalog import load_catalog
from shared.settings import PREFIX, Settings, variable_of

NO_CUDA: Final = "there is no CUDA device that this process may use"
"""What is wrong with TTS_DEFAULT_DEVICE=cuda, where it is; the GPU worker finds out."""


def environment() -> dict[str, str]:
    """The process's environment, completed by the TTS_* variables of .env."""
    from_file = {name: value for name, value in dotenv_values(".env").items() if name.startswith(PREFIX) and value}
    return from_file | os.environ


def unknown_models(settings: Settings) -> list[str]:
    """The settings that name a model which the catalogue lacks; CatalogError where models/ itself cannot be read."""
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


def wrong_places(settings: Settings) -> list[str]:
    """The settings that name folders which are not there, or cannot be written where voices are to be saved.

    For the machine that the GPU worker runs on; nothing is created.
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
    """Whether files can be made in it, or it can be made itself."""
    place = next(place for place in (directory, *directory.absolute().parents) if os.path.lexists(place))
    return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)  # noqa: PTH112 -- as above
