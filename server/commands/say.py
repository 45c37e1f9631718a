"""`say`: speak a text from the command line or stdin into a file or a pipe; the audio is written as it arrives."""

import argparse
import contextlib
import http.client
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from server.audio import CONTENT_TYPES, SAMPLE_RATES, Format
from server.commands.client import SPEECH_TIMEOUT_S, Client, ClientError, UsageError, add_service_arguments, client_of
from server.commands.live import speak_live
from shared.environment import environment
from shared.settings import load_settings

_FORMAT_OF_SUFFIX: Final[dict[str, Format]] = {f".{name}": name for name in CONTENT_TYPES} | {".raw": "pcm"}
_READ_BYTES: Final = 65_536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, the voice and the output."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        '  python -m server say "Good morning." -o hello.mp3\n'
        '  python -m server say --voice coral --speed 1.2 "Good morning." -o -  --format wav | aplay\n'
        "  python -m server say -o book.flac < chapter.txt\n"
        "  llm 'Tell me a story.' | python -m server say --stdin --live --format wav -o - | aplay"
    )
    parser.add_argument("text", nargs="?", help="the text to speak (default, and with -: read from stdin)")
    parser.add_argument("--stdin", action="store_true", help="read the text from stdin")
    parser.add_argument("--live", action="store_true", help="speak what comes on stdin when it comes, word by word")
    parser.add_argument("-o", "--output", metavar="FILE", help="- is stdout (default: stdout if piped, or speech.mp3)")
    parser.add_argument("--format", choices=list(CONTENT_TYPES), help="default: by the ending of FILE, or mp3")
    parser.add_argument("--model", help="a model's id or alias (default: the service's)")
    parser.add_argument("--voice", help="a preset or saved voice (default: the model's first)")
    parser.add_argument("--language", help="the language of the text: English, en, en-US … (default: auto)")
    parser.add_argument("--instructions", help="the style of speaking, for models that follow instructions")
    parser.add_argument("--speed", type=_speed, help="the speed, from 0.25 to 4 (default: 1)")
    parser.add_argument("--sample-rate", type=int, metavar="HZ", help="8000 to 48000 (default: 24000)")
    parser.add_argument("--seed", type=int, help="a number; the same seed gives the same speech")
    add_service_arguments(parser)


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not math.isfinite(speed):  # JSON has no such number
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}")
    return speed


def run(arguments: argparse.Namespace) -> int:
    """Speak; returns the exit code. Raises ClientError if the service fails, UsageError for wrong arguments."""
    output = arguments.output or ("speech.mp3" if sys.stdout.isatty() else "-")
    if output == "-" and sys.stdout.isatty():
        raise ClientError("audio cannot go to a terminal: pipe it into a player, or name a file with -o")
    response_format: Format = arguments.format or _format_of(output)
    text = None if arguments.text == "-" else arguments.text
    if text is not None and (arguments.stdin or arguments.live):
        raise UsageError("--stdin and --live take the text from stdin: leave TEXT out")
    rate, rates = arguments.sample_rate, SAMPLE_RATES[response_format]
    if arguments.live and rate not in {None, *rates}:
        known = ", ".join(map(str, rates))
        raise UsageError(f"--sample-rate: {response_format} cannot have {rate} Hz; it can have: {known}")
    client = client_of(arguments)
    with contextlib.nullcontext(sys.stdout.buffer) if output == "-" else _replacing(Path(output)) as target:
        if arguments.live:
            fields = _fields(arguments)
            speak_live(
                client,
                fields,
                sys.stdin.fileno(),
                target,
                audio_format=response_format,
                streaming=output == "-",
                labelled=load_settings(environment()).provenance,
            )
        else:
            body = {"input": _read_stdin() if text is None else text, "response_format": response_format}
            _copy(client, body | _fields(arguments), target)
    if output != "-":
        sys.stderr.write(f"{output}\n")
    return 0


def _read_stdin() -> str:
    try:
        text = sys.stdin.read()
        text.encode()  # in the locale C, Python lets bytes that are no UTF-8 pass as halves of characters
    except UnicodeError:
        raise ClientError("stdin is not text, or in another encoding; UTF-8 is right") from None
    return text


def _format_of(output: str) -> Format:
    """The format of a file by the ending of its name, mp3 for a pipe; UsageError for an unknown ending."""
    if output == "-":
        return "mp3"
    suffix = Path(output).suffix.lower()
    if suffix not in _FORMAT_OF_SUFFIX:
        known = ", ".join(_FORMAT_OF_SUFFIX)
        problem = f"{suffix} is not the ending of a known audio format" if suffix else "the name has no ending"
        raise UsageError(f"{output}: {problem}; use one of {known}, or choose the format with --format")
    return _FORMAT_OF_SUFFIX[suffix]


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """How to speak, as far as the arguments say it."""
    names = ("model", "voice", "language", "instructions", "speed", "sample_rate", "seed")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _copy(client: Client, body: dict[str, Any], target: BinaryIO) -> None:
    """Write the audio to `target` as it arrives; a progress bar goes to stderr if that is a terminal."""
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
                raise ClientError("the service broke the transfer off; the audio is incomplete") from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` when it is complete, and is removed if it is not."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    except OSError as error:
        raise ClientError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
