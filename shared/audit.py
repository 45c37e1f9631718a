"""The audit log: who changed which saved voice or consent, when, and with which consent; one JSON line a change.

Each line ends with a MAC (HMAC-SHA256) over itself and the MAC of the line before it: without the key, no line can be
changed, added, removed or moved unseen. The file beside it, `.head`, has the number and the MAC of the last line, under
a MAC of its own: so missing lines at the end are seen too. A line is written and synced before the change that it tells
of. So there is no change without a line; a line with `failed` follows one whose change did not happen.

What this does not prove: who has the key can write everything anew, and who has an older copy of both files can put
that in their place. Against the second, the service's own log has the number and the MAC of each line.

The log is never rotated: a line has some 300 bytes, and at most MAX_LINE. Several processes may write one log.
"""

import contextlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final, Literal

import msgspec
import structlog

from shared.file_locks import lock

MAX_LINE: Final = 16_384
"""Bytes of a line: seven fields, in which JSON needs up to six bytes for a character."""

MIN_KEY_BYTES: Final = 32

_MAX_FIELD: Final = 200
"""Characters of a field; a longer one is cut."""

_GENESIS: Final = "0" * 64
"""The first line is signed over this, in the place of a line before it."""

_LINE: Final = re.compile(rb'(\{"line":([0-9]{1,18}),.*),"mac":"([0-9a-f]{64})"\}')

log = structlog.get_logger(__name__)

EventName = Literal[
    "voice.cloned",
    "voice.designed",
    "voice.imported",
    "voice.renamed",
    "voice.shared",
    "voice.unshared",
    "voice.exported",
    "voice.deleted",
    "consent.recorded",
    "consent.renamed",
    "consent.deleted",
]


class AuditError(Exception):
    """The log cannot be written, or has been tampered with. The message is for the operator."""


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A change. `by` is the client: `key:` and the name of its key, or else `peer:` and its address (of IPv6: its /64).

    `id` and `name` are those of the voice or consent; `was` is the name before. `consent` is as it was given.
    `failed`: the change did not happen, for this reason.
    """

    event: EventName
    by: str
    id: str
    name: str
    was: str = ""
    owner: str = ""
    consent: str = ""
    failed: str = ""


class Head(msgspec.Struct, frozen=True):
    """The end of a log: the number of its last line, and its MAC."""

    line: int = 0
    mac: str = _GENESIS


class Verdict(msgspec.Struct, frozen=True):
    """The result of `verify`: the last sound line, and the number, problem and text of the first broken one, if any."""

    end: Head
    broken: int = 0
    problem: str = ""
    text: str = ""


class AuditLog:
    """Writes the log at `path`. `wall` gives Unix seconds.

    `key_file` has the key; without it, a key is made in a file beside the log (mode 0600), before the first line.
    """

    def __init__(self, path: Path, key_file: Path | None = None, wall: Callable[[], float] = time.time) -> None:
        self._path = path
        self._key_file = key_file
        self._wall = wall

    def append(self, entries: Sequence[AuditEntry]) -> None:
        """Write a line for each entry, synced when this returns. Raises AuditError; the caller then changes nothing."""
        if not entries:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Append-only by the kernel as well: `chattr +a` may hold the file.
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "rb+", buffering=0) as file:
                lock(file)
                self._append(file, entries)
        except OSError as error:
            raise AuditError(f"{self._path}: {error.strerror or error}") from error

    def _append(self, file: BinaryIO, entries: Sequence[AuditEntry]) -> None:
        _drop_torn_line(file, self._path)
        key = self._key(is_new=not os.fstat(file.fileno()).st_size and not head_file(self._path).exists())
        end = self._checked_end(file, key)
        if end == Head():
            _write_synced(head_file(self._path), _encode_head(key, end))
        data = b""
        for entry in entries:
            body = self._body(end.line + 1, entry)
            end = Head(end.line + 1, _mac(key, end.mac, body))
            data += body + f',"mac":"{end.mac}"}}\n'.encode()
            log.info("audit_line", line=end.line, change=entry.event, mac=end.mac)
        size = os.fstat(file.fileno()).st_size
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
            _write_synced(head_file(self._path), _encode_head(key, end))
        except OSError:
            # The changes do not happen, so their lines go; unless the head, which counts them, is in place already.
            with contextlib.suppress(OSError, AuditError):
                if _read_head(self._path, key) != end:
                    os.ftruncate(file.fileno(), size)
            raise

    def _checked_end(self, file: BinaryIO, key: bytes) -> Head:
        """The end of the log. AuditError if it is not where the last write has left it."""
        size = file.seek(0, os.SEEK_END)
        if not size and not head_file(self._path).exists():
            return Head()
        file.seek(max(0, size - MAX_LINE - 1))
        last = _LINE.fullmatch(file.read().rstrip(b"\n").rpartition(b"\n")[2])
        end = Head(int(last[2]), last[3].decode()) if last else Head()
        if end == _read_head(self._path, key):
            return end
        # A process has died between the line and its head, or the files were changed by hand: this takes reading all.
        verdict = verify(self._path, key)
        if verdict.problem:
            raise AuditError(f"{self._path}:{verdict.broken}: {verdict.problem}")
        return verdict.end

    def _body(self, line: int, entry: AuditEntry) -> bytes:
        at = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = {name: text[:_MAX_FIELD] for name, text in msgspec.to_builtins(entry).items()}
        return msgspec.json.encode({"line": line, "at": at, **fields})[:-1]

    def _key(self, *, is_new: bool) -> bytes:
        """The key; a new one if the log `is_new` and no setting names a file."""
        path = self._key_file or default_key_file(self._path)
        if is_new and self._key_file is None and not path.exists():
            _write_synced(path, secrets.token_hex(MIN_KEY_BYTES).encode() + b"\n")
        return read_key(path)


def verify(path: Path, key: bytes, known_mac: str = "") -> Verdict:
    """Check every line of a log, and that none is missing at its end. OSError if the log cannot be read.

    With `known_mac`, one line must have this MAC: from the service's log, or from an earlier check.
    """
    try:
        head = _read_head(path, key)
    except AuditError as error:
        return Verdict(Head(), 1, str(error))
    end = Head()
    is_known = not known_mac
    for raw in _lines(path):
        problem = _problem_of(raw, end, key)
        end = end if problem else Head(end.line + 1, raw[-67:-3].decode())
        if not problem and head is not None and end.line == head.line and end.mac != head.mac:
            problem = f"it is not the line that {head_file(path)} has seen here"
        if problem:
            return Verdict(end, end.line + 1, problem, raw.decode(errors="replace").rstrip("\n"))
        is_known = is_known or end.mac == known_mac
    if head is None and end.line:
        return Verdict(end, end.line, f"{head_file(path)} is missing, so lines behind this one may be too")
    if head is not None and head.line > end.line:
        return Verdict(end, end.line + 1, f"it is missing: there were {head.line} lines, and {end.line} are left")
    if not is_known:
        return Verdict(end, end.line + 1, "no line has the MAC that one must have: the lines that had it are missing")
    return Verdict(end)


def read_key(path: Path) -> bytes:
    """The key in a file; AuditError if there is none."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise AuditError(f"the key of the audit log, {path}, cannot be read: {error.strerror or error}") from error
    if len(key) < MIN_KEY_BYTES:
        raise AuditError(f"the key of the audit log, {path}, has less than {MIN_KEY_BYTES} bytes")
    return key


def default_key_file(path: Path) -> Path:
    """The file in which the key of a log is made."""
    return path.with_name(f"{path.name}.key")


def head_file(path: Path) -> Path:
    """The file with the end of a log."""
    return path.with_name(f"{path.name}.head")


def _problem_of(raw: bytes, before: Head, key: bytes) -> str:
    """The problem of the line behind `before`; "" for a sound line."""
    if not raw.endswith(b"\n"):
        return "its end is missing" if len(raw) <= MAX_LINE else f"it has more than {MAX_LINE} bytes"
    match = _LINE.fullmatch(raw[:-1])
    if match is None:
        return "it is no line of an audit log"
    if not hmac.compare_digest(match[3].decode(), _mac(key, before.mac, match[1])):
        return "it was changed, or lines before it were removed, added or changed, or this is not its key"
    return "" if int(match[2]) == before.line + 1 else f"it has the number {int(match[2])}"


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE + 1):
            yield line


def _drop_torn_line(file: BinaryIO, path: Path) -> None:
    """Remove a last line that was not written in full: its process died, and its change did not happen."""
    size = file.seek(0, os.SEEK_END)
    start = file.seek(max(0, size - MAX_LINE - 1))
    tail = file.read()
    if tail and not tail.endswith(b"\n"):
        whole = start + tail.rfind(b"\n") + 1
        log.warning("audit_line_torn", file=str(path), bytes=size - whole)
        os.ftruncate(file.fileno(), whole)


def _mac(key: bytes, before: str, body: bytes) -> str:
    return hmac.digest(key, before.encode() + b"\n" + body, "sha256").hex()


def _encode_head(key: bytes, head: Head) -> bytes:
    return msgspec.json.encode({"line": head.line, "mac": head.mac, "seal": _seal(key, head)}) + b"\n"


def _read_head(path: Path, key: bytes) -> Head | None:
    """The end of the log by its head; None without one. AuditError if the head is not ours."""
    try:
        found = msgspec.json.decode(head_file(path).read_bytes(), type=dict[str, int | str])
        head = Head(int(found["line"]), str(found["mac"]))
        is_ours = hmac.compare_digest(str(found["seal"]).encode(), _seal(key, head).encode())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, msgspec.MsgspecError):
        is_ours = False
    if not is_ours:
        raise AuditError(f"{head_file(path)} was changed, or this is not its key")
    return head


def _seal(key: bytes, head: Head) -> str:
    return hmac.digest(key, f"head\n{head.line}\n{head.mac}".encode(), "sha256").hex()


def _write_synced(path: Path, data: bytes) -> None:
    """Replace a file, readable by this user alone; it is synced when this returns."""
    part = path.with_name(f"{path.name}.new")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
