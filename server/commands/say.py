"""`say`: text in, from the command line or stdin; audio out, into a file or a pipe, written as it arrives."""

import argparse
import http.client
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from server.audio import CONTENT_TYPES
from server.commands.client import SPEECH_TIMEOUT_S, Client, ClientError, UsageError, add_service_arguments, client_of

_FORMAT_OF_SUFFIX: Final = {f".{name}": name for name in CONTENT_TYPES} | {".ogg": "opus", ".raw": "pcm"}
_READ_BYTES: Final = 65_536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to say, how, and where to."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        '  python -m server say "Good morning." -o hello.mp3\n'
        '  python -m server say --voice coral --speed 1.2 "Good morning." -o -  --format wav | aplay\n'
        "  python -m server say -o book.flac < chapter.txt"
    )
    parser.add_argument("text", nargs="?", help="what to say; without it, or with -, it is read from stdin")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="where to; - is stdout (default: stdout, if it is piped)"
    )
    parser.add_argument("--format", choices=list(CONTENT_TYPES), help="default: as FILE ends; mp3 into a pipe")
    parser.add_argument("--model", help="a model's id or alias (default: the service's)")
    parser.add_argument("--voice", help="a voice of that model, or a saved one (default: the model's first)")
    parser.add_argument("--language", help="English, en, en-US … (default: auto)")
    parser.add_argument("--instructions", help="how to say it, for models that follow instructions")
    parser.add_argument("--speed", type=float, help="0.25 to 4 (default: 1)")
    parser.add_argument("--seed", type=int, help="for the same speech again")
    add_service_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Speak; ClientError where that does not work, UsageError where it is not clear what is wanted."""
    output = arguments.output or ("speech.mp3" if sys.stdout.isatty() else "-")
    if output == "-" and sys.stdout.isatty():
        raise ClientError("audio is not for a terminal: pipe it into a player, or name a file with -o")
    chosen = arguments.format or _format_of(output)
    text = arguments.text
    if text is None or text == "-":
        text = _stdin_text()
    client = client_of(arguments)
    body = _body(arguments, text, chosen)
    if output == "-":
        _copy(client, body, sys.stdout.buffer)
        return 0
    with _replaced(Path(output)) as file:
        _copy(client, body, file)
    sys.stderr.write(f"{output}\n")
    return 0


def _stdin_text() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ClientError(f"stdin is not text: {error}") from None


def _format_of(output: str) -> str:
    """The format that the file's name asks for; mp3 into a pipe. UsageError where it asks for none of ours."""
    if output == "-":
        return "mp3"
    suffix = Path(output).suffix.lower()
    if suffix not in _FORMAT_OF_SUFFIX:
        known = ", ".join(_FORMAT_OF_SUFFIX)
        ending = f"{suffix} is no ending of a format that is spoken here" if suffix else "it has no ending"
        raise UsageError(f"{output}: {ending}; choose one of {known}, or say which format it is to be with --format")
    return _FORMAT_OF_SUFFIX[suffix]


def _body(arguments: argparse.Namespace, text: str, response_format: str) -> dict[str, Any]:
    body = {"input": text, "response_format": response_format}
    for name in ("model", "voice", "language", "instructions", "speed", "seed"):
        if (value := getattr(arguments, name)) is not None:
            body[name] = value
    return body


def _copy(client: Client, body: dict[str, Any], target: BinaryIO) -> None:
    """Audio from the service to `target` as it arrives; a bar on stderr, where that is a terminal, shows how much."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("waiting", total=None)
        with client.open("/v1/audio/speech", body, timeout_s=SPEECH_TIMEOUT_S) as answer:
            try:
                while piece := answer.read1(_READ_BYTES):
                    target.write(piece)
                    target.flush()
                    progress.update(task, advance=len(piece), description="speaking")
            except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                raise ClientError("the service broke off while it was speaking; the audio is incomplete") from error


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is complete, and of which nothing stays otherwise."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    except OSError as error:
        raise ClientError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
