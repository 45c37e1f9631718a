"""A reload of the settings: which of them a running service takes, and which need a restart.

The annotation of a setting (`Live`, `WorkerLive`) is the only place that says so.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Final, get_args, get_origin

import msgspec

from shared.settings import LIVE, WORKER_LIVE, Settings, is_ours, load_settings, variable_of


def _marked(mark: str) -> frozenset[str]:
    fields = msgspec.structs.fields(Settings)
    return frozenset(
        variable_of(field.name)
        for field in fields
        if get_origin(field.type) is Annotated and mark in get_args(field.type)[1:]
    )


LIVE_VARIABLES: Final = _marked(LIVE)
"""The variables that a reload takes."""

WORKER_LIVE_VARIABLES: Final = _marked(WORKER_LIVE)
"""Those of them that the GPU worker takes. None is a secret."""


class NewSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Variables and settings after a reload. `variables` are in force from now on, and `settings` is made of them.

    `changed` and `needs_restart` are sorted names of variables; the latter keep their old values.
    """

    variables: dict[str, str]
    settings: Settings
    changed: list[str]
    needs_restart: list[str]


def reload_settings(
    in_force: Mapping[str, str], found: Mapping[str, str], *checks: Callable[[Settings], list[str]]
) -> NewSettings:
    """Compare the variables in force with those found now.

    Raises SettingsError with every mistake, also in settings that need a restart.
    """
    old, new = load_settings(in_force), load_settings(found, *checks)
    names = [field.name for field in msgspec.structs.fields(Settings)]
    differing = sorted(variable_of(name) for name in names if getattr(old, name) != getattr(new, name))
    variables = {name: text for name, text in in_force.items() if is_ours(name) and name not in LIVE_VARIABLES}
    variables |= {name: text for name, text in found.items() if name in LIVE_VARIABLES}
    return NewSettings(
        variables=variables,
        settings=load_settings(variables),
        changed=[name for name in differing if name in LIVE_VARIABLES],
        needs_restart=[name for name in differing if name not in LIVE_VARIABLES],
    )
