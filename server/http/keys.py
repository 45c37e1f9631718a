"""The API keys that the service knows, and what each may do: TTS_API_KEYS, TTS_ADMIN_KEYS and the file TTS_KEYS_FILE.

Only SHA-256 digests of keys are kept. A key of `new_key` has 256 random bits, so its digest needs no salt,
and a look-up by digest tells nothing about the key by the time that it takes.
"""

import difflib
import hashlib
import re
import secrets
from collections.abc import Iterable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from server.http.errors import ApiError
from shared.access import read_file
from shared.protocol import KeyLimit, KeyLimits, Priority, VoiceAccess
from shared.settings import Settings
from shared.validation_messages import choices_in, reword, split_path

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The name of a key: it stands in logs and figures in the place of the key."""

MAX_KEYS: Final = 10_000
MAX_FILE_BYTES: Final = 16_000_000

_DIGEST: Final = "sha256:"
_HASH_FORM: Final = f'must be "{_DIGEST}" and 64 hexadecimal digits, as `python -m server key new` writes it'
_FORM: Final = 'the file has a table for each key: [alice], and in it hash = "sha256:…"'

Names = list[Annotated[str, Meta(min_length=1, max_length=200)]]


class KeysError(Exception):
    """The file of keys cannot be used; the message is for the operator and holds no key."""


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A key as the file has it. A limit that is absent is no limit; a list that is empty allows everything.

    The key is no longer taken from the day `expires` on, UTC.
    """

    hash: Annotated[str, Meta(pattern=rf"^{_DIGEST}[0-9a-f]{{64}}$")]
    role: Literal["user", "admin"] = "user"
    requests_per_minute: KeyLimit | None = None
    characters_per_day: KeyLimit | None = None
    concurrent_requests: KeyLimit | None = None
    priority: Priority = "interactive"
    models: Names = []
    voices: Names = []
    expires: date | None = None


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The sender of a request, and their rights. `client` is the fairness key of their requests.

    `access`: the saved voices that exist for them. Only a key of the file has a name, and can own voices.
    `models` and `voices` are in lower case; an empty set allows all.
    """

    client: str
    is_admin: bool = False
    limits: KeyLimits = KeyLimits()
    priority: Priority = "interactive"
    models: frozenset[str] = frozenset()
    voices: frozenset[str] = frozenset()
    expires: date | None = None
    access: VoiceAccess = VoiceAccess()

    def is_expired(self, today: date) -> bool:
        """True from the day on at which the key is no longer taken."""
        return self.expires is not None and today >= self.expires

    def require_model(self, model_id: str) -> None:
        """Raise ApiError (`insufficient_permissions`) if the key may not use that model."""
        if self.models and model_id.casefold() not in self.models:
            raise _not_allowed("model", self.models)

    def require_voice(self, *names: str, param: str = "voice") -> None:
        """Raise ApiError (`insufficient_permissions`) if the key may not use a voice that has these names and ids."""
        if self.voices and not self.voices & _in_lower_case(names):
            raise _not_allowed(param, self.voices)


class Keyring(msgspec.Struct, frozen=True):
    """All known keys, by digest. `guards_speech`: everything needs a key; else only the admin routes do, if any."""

    keys: dict[str, Caller]
    guards_speech: bool

    @property
    def guards_admin(self) -> bool:
        """True if the admin routes need a key."""
        return self.guards_speech or bool(self.keys)

    def find(self, key: str) -> Caller | None:
        """The caller with that key, expired or not; None for an unknown key."""
        return self.keys.get(digest_of(key))


def load_keyring(settings: Settings) -> Keyring:
    """The keys of the settings and of their file. Raises KeysError."""
    keys = {}
    for given, is_admin in ((settings.api_keys, False), (settings.admin_keys, True)):
        for key in given:
            digest = digest_of(key)
            client = f"key:{digest.removeprefix(_DIGEST)[:16]}"
            keys[digest] = Caller(client=client, is_admin=is_admin, access=VoiceAccess(all=is_admin))
    entries = read_entries(settings.keys_file) if settings.keys_file is not None else {}
    if settings.keys_file is not None and not entries:
        raise KeysError(f"{settings.keys_file} has no key: python -m server key new NAME makes one")
    for name, entry in entries.items():
        if entry.hash in keys:
            raise KeysError(f"{settings.keys_file}: [{name}] has the hash of another key")
        keys[entry.hash] = _caller_of(name, entry)
    return Keyring(keys, guards_speech=bool(settings.api_keys or entries))


def read_entries(path: Path) -> dict[str, KeyEntry]:
    """The entries of a file of keys, by name. Raises KeysError."""
    try:
        tables = msgspec.toml.decode(read_file(path, MAX_FILE_BYTES), type=dict[str, dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KeysError(f"{path}: {error}; {_FORM}") from error
    except ValueError as error:
        raise KeysError(f"{error}; `python -m server key new NAME` makes the file, or adds a key to it") from error
    if len(tables) > MAX_KEYS:
        raise KeysError(f"{path} has more than {MAX_KEYS} keys")
    entries = {}
    for name, table in tables.items():
        if not NAME.fullmatch(name):
            raise KeysError(f"{path}: [{name}] is no name: letters, digits, dots, hyphens and underscores, at most 64")
        try:
            entries[name] = key_entry(table)
        except ValueError as error:
            raise KeysError(f"{path}: [{name}]: {error}") from error
    return entries


def key_entry(table: dict[str, Any]) -> KeyEntry:
    """The key that a table of the file describes. ValueError: what is wrong with it."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(KeyEntry)}
    for name in table.keys() - kinds.keys():
        meant = difflib.get_close_matches(name, kinds, n=1)
        advice = f"did you mean {meant[0]}?" if meant else f"there are {', '.join(kinds)}"
        raise ValueError(f"there is no field {name}; {advice}")
    try:
        return msgspec.convert(table, KeyEntry)
    except msgspec.ValidationError as error:
        problem, field = split_path(str(error))
        said = _HASH_FORM if field == "hash" else reword(problem, choices_in(kinds.get(field)))
        raise ValueError(f"{field}: {said}" if field else said) from error


def new_key() -> str:
    """A new key: 256 random bits."""
    return f"sk-tts-{secrets.token_urlsafe(32)}"


def digest_of(key: str) -> str:
    """The hash of a key. The key itself is not kept."""
    return _DIGEST + hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def today() -> date:
    """The day, UTC."""
    return datetime.now(UTC).date()


def _caller_of(name: str, entry: KeyEntry) -> Caller:
    return Caller(
        client=f"key:{name}",
        is_admin=entry.role == "admin",
        limits=KeyLimits(
            requests_per_minute=entry.requests_per_minute,
            characters_per_day=entry.characters_per_day,
            concurrent_requests=entry.concurrent_requests,
        ),
        priority=entry.priority,
        models=_in_lower_case(entry.models),
        voices=_in_lower_case(entry.voices),
        expires=entry.expires,
        access=VoiceAccess(owner=name, all=entry.role == "admin"),
    )


def _not_allowed(param: str, allowed: frozenset[str]) -> ApiError:
    message = f"{param}: this API key may use only {', '.join(sorted(allowed))}."
    return ApiError("insufficient_permissions", message, param=param)


def _in_lower_case(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.casefold() for name in names)
