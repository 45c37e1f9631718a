"""Where the command line finds its settings: the environment and, behind it, the file .env in the current folder."""

import os
from collections.abc import Mapping

from dotenv import dotenv_values

from shared.catalog import load_catalog
from shared.settings import PREFIX, Settings, SettingsError, load_settings, variable_of


def environment() -> dict[str, str]:
    """The process's environment, completed by the TTS_* variables of .env."""
    from_file = {name: value for name, value in dotenv_values(".env").items() if name.startswith(PREFIX) and value}
    return from_file | os.environ


def checked_settings(environ: Mapping[str, str]) -> Settings:
    """The settings of a whole service; SettingsError also where they name models that the catalogue lacks.

    CatalogError where models/ itself cannot be read.
    """
    settings = load_settings(environ)
    catalog = load_catalog()
    problems: list[str] = []
    named = [("preload", name) for name in settings.preload]
    if settings.default_model != "auto":
        named.insert(0, ("default_model", settings.default_model))
    for field, name in named:
        if not any(spec.answers_to(name) for spec in catalog):
            known = ", ".join(spec.id for spec in catalog)
            problems.append(f"{variable_of(field)}: there is no model {name!r}; there are {known}")
    if problems:
        raise SettingsError(problems)
    return settings
