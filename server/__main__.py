"""`python -m server`: find the command and run it; server/commands has one module for each."""

import argparse
import importlib
import os
import sys
from typing import Final

from server.commands.client import ClientError, UsageError
from shared.settings import SettingsError

_SERVE: Final = "serve"
_COMMANDS: Final = {
    _SERVE: "run the service (the default command)",
    "cluster": "run the service with many GPUs, as a Ray Serve application",
    "key": "make an API key for the file TTS_KEYS_FILE",
    "audit": "check that the audit log of saved voices is unbroken",
    "say": "let a running service speak into a file or a player",
    "models": "list the models of a running service",
    "voices": "list the voices of a running service",
    "top": "watch the models, memory, queue and streams of a running service",
}
"""What each command does, for the help."""

_EXIT_FAILED: Final = 1
_EXIT_WRONG_USE: Final = 2
_EXIT_INTERRUPTED: Final = 130

_EPILOG: Final = """\
examples:
  python -m server                                  serve on TTS_HOST:TTS_PORT (127.0.0.1:8000)
  python -m server cluster                          serve with all GPUs of this machine
  python -m server say "Good morning." -o hi.mp3    speak into a file
  python -m server say --format wav < text.txt | aplay
  llm "Tell me a story." | python -m server say --stdin --live -o story.mp3
  python -m server voices --model espeak-ng
  python -m server top                              watch a running service

TTS_* variables configure the service, in the environment or in .env (see .env.example).
The other commands find the service by the same variables, or by --url.
"""


def argument_parser(chosen: str) -> argparse.ArgumentParser:
    """The parser of the command line with the arguments of `chosen`; without a command, the service runs.

    It imports no other command: the service's modules take 0.6 s of CPU time, and no client needs them.
    """
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="A self-hosted, OpenAI-compatible speech server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command = importlib.import_module(f"server.commands.{chosen}")
    parser.set_defaults(run=command.run, refuse=parser.error)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            command.add_arguments(subparser)
            subparser.set_defaults(refuse=subparser.error)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    chosen = given[0] if given and given[0] in _COMMANDS else _SERVE
    parsed, unknown = argument_parser(chosen).parse_known_args(given)
    if unknown:  # parse_args would show the usage of all commands, and not what this one takes
        parsed.refuse(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except ClientError as error:
        sys.stderr.write(f"{error}\n")
        return _EXIT_FAILED
    except (UsageError, SettingsError) as error:
        sys.stderr.write(f"{error}\n")
        return _EXIT_WRONG_USE
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except OSError as error:
        if chosen == _SERVE:
            raise
        # The interpreter would flush stdout again, and fail with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # the reader of our output has closed it on purpose
            sys.stderr.write(f"stdin or stdout failed: {error.strerror or error}\n")
        return _EXIT_FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
