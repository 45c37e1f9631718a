"""`python -m server`: find the command and run it; server/commands has one module for each."""

import argparse
import os
import sys
from typing import Final

from server.commands import audit, cluster, key, models, say, serve, top, voices
from server.commands.client import ClientError, UsageError
from shared.settings import SettingsError

_COMMANDS: Final = {
    "serve": serve,
    "cluster": cluster,
    "key": key,
    "audit": audit,
    "say": say,
    "models": models,
    "voices": voices,
    "top": top,
}

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


def argument_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; without a command, the service runs."""
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="A self-hosted, OpenAI-compatible speech server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=serve.run)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in _COMMANDS.items():
        summary = command.SUMMARY
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parsed = argument_parser().parse_args(arguments)
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
        if parsed.run == serve.run:
            raise
        # The interpreter would flush stdout again, and fail with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # the reader of our output has closed it on purpose
            sys.stderr.write(f"stdin or stdout failed: {error.strerror or error}\n")
        return _EXIT_FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
