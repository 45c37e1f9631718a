"""The settings in force, from the start of the main process through every reload.

`Configuration` belongs to the main process. It reads .env and the files of keys and pronunciations again when it is
told to, and takes all of it or nothing. Processes that the main process starts later begin with what is in force.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from server.http.keys import KeysError, load_keyring
from server.reload.messages import ReloadOutcome, WebState
from server.text import PronunciationsError, load_pronunciations, reload_pronunciations
from shared.access import read_bytes
from shared.catalog import CatalogError
from shared.environment import environment
from shared.settings import Settings, SettingsError, is_ours, load_settings, variable_of
from shared.settings_reload import WORKER_LIVE_VARIABLES, reload_settings

Check = Callable[[Settings], list[str]]
"""Returns problems of settings."""


class Configuration:
    """The configuration of the service. Raises SettingsError or CatalogError if it cannot be used."""

    def __init__(self, checks: Sequence[Check], start_checks: Sequence[Check]) -> None:
        """`start_checks` are made at the start alone, `checks` also at every reload."""
        self._checks = checks
        found = environment()
        settings = load_settings(found, *checks, *start_checks)
        self._variables = {name: text for name, text in found.items() if is_ours(name)}
        self._worker_url = settings.worker_url
        self._files = _digests(settings)
        self._worker_changes: set[str] = set()
        """Variables of the GPU worker that reloads have changed."""

        self.state = WebState(settings=settings, keyring=load_keyring(settings))
        """The configuration in the form that web workers take."""

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self.state.settings

    def use_worker(self, url: str) -> None:
        """The main process starts the GPU worker itself, at this address."""
        self._worker_url = url
        self.state = msgspec.structs.replace(
            self.state, settings=msgspec.structs.replace(self.settings, worker_url=url)
        )

    def worker_environ(self) -> dict[str, str]:
        """The environment of a GPU worker that starts now: it has every setting, so the worker needs no .env."""
        inherited = {name: text for name, text in os.environ.items() if not is_ours(name)}
        return inherited | self._variables | {variable_of("worker_url"): self._worker_url or ""}

    def reload(self) -> tuple[ReloadOutcome, WebState | None]:
        """Read everything anew: what came of it, and the new state, or None if nothing has changed."""
        try:
            new = reload_settings(self._variables, environment(), *self._checks)
            keyring, files = load_keyring(new.settings), _digests(new.settings)
            reload_pronunciations(new.settings.pronunciations)
            load_pronunciations(new.settings.pronunciations)  # web workers that are forked later have them
        except SettingsError as error:
            return ReloadOutcome(problems=error.problems), None
        except (CatalogError, KeysError, PronunciationsError) as error:
            return ReloadOutcome(problems=[str(error)]), None
        rewritten = {name for name, digest in files.items() if digest != self._files[name]}
        if TLS & set(new.needs_restart):  # the files that were checked are others than those in force
            rewritten -= TLS
        needs_restart = new.needs_restart
        changed = sorted({*new.changed, *rewritten})
        if changed:
            self._worker_changes |= WORKER_LIVE_VARIABLES & set(changed)
            self._variables = new.variables
            self._files |= {name: files[name] for name in rewritten}
            self.state = WebState(
                settings=msgspec.structs.replace(new.settings, worker_url=self._worker_url),
                keyring=keyring,
                worker_variables={name: new.variables.get(name, "") for name in self._worker_changes},
            )
        return ReloadOutcome(changed=changed, needs_restart=needs_restart), self.state if changed else None


_FILES = ("keys_file", "pronunciations", "tls_cert", "tls_key")
TLS: Final = {variable_of("tls_cert"), variable_of("tls_key")}
"""The variables of the files that web workers read at their start alone."""


def _digests(settings: Settings) -> dict[str, str]:
    """The digests of the files that settings name, by variable; "" without a file."""
    return {variable_of(name): _digest(getattr(settings, name)) for name in _FILES}


def _digest(path: Path | None) -> str:
    try:
        return "" if path is None else hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError:  # the checks have said so, or will
        return ""
