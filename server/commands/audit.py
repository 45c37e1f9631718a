"""`audit verify`: check the audit log of saved voices line by line, and print the first line that is broken."""

import argparse
import sys
from pathlib import Path
from typing import Final

from server.commands.client import ClientError
from shared.audit import AuditError, default_key_file, head_file, read_key, verify
from shared.environment import environment
from shared.settings import Settings, load_settings

_MAX_SHOWN: Final = 500
"""Characters of a broken line that are printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The log, its key, and what is known of it."""
    parser.add_argument("action", choices=["verify"], help="check every line; exit code 1 for a broken one")
    parser.add_argument("file", nargs="?", type=Path, help="the log (default: TTS_AUDIT_LOG)")
    parser.add_argument("--key", type=Path, metavar="FILE", help="its key (default: TTS_AUDIT_KEY_FILE, or FILE.key)")
    parser.add_argument("--mac", default="", help="a line must have this MAC, which the service's log once had")


def run(arguments: argparse.Namespace) -> int:
    """Check the log; returns the exit code."""
    settings = load_settings(environment())
    path = arguments.file or settings.audit_path()
    key_file = arguments.key or settings.audit_key_file or default_key_file(path)
    try:
        if not any(file.exists() for file in (path, head_file(path), default_key_file(path))):
            return _without_log(path, settings, needed=bool(arguments.file or arguments.mac))
        verdict = verify(path, read_key(key_file), arguments.mac.strip().lower())
    except AuditError as error:
        raise ClientError(str(error)) from error
    except OSError as error:
        raise ClientError(f"{path} cannot be read: {error.strerror or error}") from error
    if verdict.problem:
        shown = f"\n{verdict.text[:_MAX_SHOWN]!a}" if verdict.text else ""
        sys.stdout.write(f"{path}:{verdict.broken}: {verdict.problem}{shown}\n")
        return 1
    sys.stdout.write(f"{path}: {verdict.end.line} lines, unbroken; the last has the MAC {verdict.end.mac}\n")
    return 0


def _without_log(path: Path, settings: Settings, *, needed: bool) -> int:
    """A service that has never saved a voice has no log, and nothing is wrong with that."""
    if needed:
        raise ClientError(f"{path}: there is no audit log")
    if any(settings.voices_dir.rglob("*.json")):
        raise ClientError(f"{path}: there is no audit log, but there are saved voices in {settings.voices_dir}")
    sys.stdout.write(f"{path}: there is no audit log yet; the first voice that is saved begins one (TTS_AUDIT_LOG)\n")
    return 0
