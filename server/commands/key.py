"""`key new`: make an API key, print it once, and add its hash to the file of keys."""

import argparse
import os
import sys
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Final

import msgspec

from server.commands.client import UsageError
from server.http.keys import NAME, KeysError, digest_of, key_entry, new_key, read_entries
from shared.catalog import load_catalog
from shared.environment import environment
from shared.settings import load_settings, variable_of

_LIMITS: Final = {
    "--requests-per-minute": "requests that the key may send a minute",
    "--characters-per-day": "characters that it may have spoken a day, UTC",
    "--concurrent-requests": "requests that it may have open at once",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The name of the key, its rights and its limits."""
    parser.add_argument("action", choices=["new"], help="make a key")
    parser.add_argument("name", help="its name in logs and figures")
    parser.add_argument("--file", type=Path, help="the file of keys (default: TTS_KEYS_FILE)")
    parser.add_argument("--admin", action="store_true", help="the key may administer")
    parser.add_argument("--batch", action="store_true", help="its requests come after all others")
    for option, text in _LIMITS.items():
        parser.add_argument(option, type=int, metavar="N", help=text)
    parser.add_argument("--model", action="append", default=[], help="the id of a model that it may use (default: all)")
    parser.add_argument("--voice", action="append", default=[], help="a voice that it may use (default: all)")
    parser.add_argument("--expires", type=_day, metavar="YYYY-MM-DD", help="the first day on which it is refused, UTC")


def run(arguments: argparse.Namespace) -> int:
    """Add the key to the file, and print it."""
    path = arguments.file or load_settings(environment()).keys_file
    if path is None:
        raise UsageError("name the file of keys: --file, or TTS_KEYS_FILE for the service as well")
    if not NAME.fullmatch(arguments.name):
        raise UsageError("a name has letters, digits, dots, hyphens and underscores, 64 at most")
    try:
        known = read_entries(path) if path.exists() else {}
    except (KeysError, OSError) as error:  # a folder may be closed to this user
        raise UsageError(str(error)) from error
    if arguments.name in known:
        raise UsageError(f"{path} has a key named {arguments.name}; choose another name, or remove its table there")
    key = new_key()
    table = _table(arguments, key)
    try:
        _append(path, table)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    sys.stdout.write(f"{key}\n")
    sys.stderr.write(f"{path} has its hash. Nothing shows the key again.\n")
    sys.stderr.write(f"A service with {variable_of('keys_file')}={path} takes it at its start, or at a reload.\n")
    _warn_of_unknown(arguments.model)
    return 0


def _warn_of_unknown(models: list[str]) -> None:
    """Say which names are no ids of models here. The key may be for a service that has others."""
    known = [spec.id for spec in load_catalog()]
    for model in models:
        if model.casefold() not in known:
            sys.stderr.write(f"Warning: no model here has the id {model}; there are {', '.join(known)}.\n")


def _day(text: str) -> date:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no date such as 2027-12-31") from None
    if day <= datetime.now(UTC).date():
        raise argparse.ArgumentTypeError(f"{text} is not in the future; the key would never work")
    return day


def _table(arguments: argparse.Namespace, key: str) -> str:
    table = {
        "hash": digest_of(key),
        "role": "admin" if arguments.admin else "user",
        "priority": "batch" if arguments.batch else "interactive",
        "requests_per_minute": arguments.requests_per_minute,
        "characters_per_day": arguments.characters_per_day,
        "concurrent_requests": arguments.concurrent_requests,
        "models": arguments.model,
        "voices": arguments.voice,
        "expires": arguments.expires,
    }
    try:
        entry = key_entry(table)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return msgspec.toml.encode({arguments.name: entry}).decode()


def _append(path: Path, table: str) -> None:
    """Add `table` to the file; others cannot read a new file."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "rb+") as file:
        file.seek(0, os.SEEK_END)
        file.write(("\n" if file.tell() else "").encode() + table.encode())
        os.fsync(file.fileno())
