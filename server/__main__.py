"""`python -m server`: serve, or one of the commands that talk to a running service.

It only finds the command; what each does is in server/commands.
"""

import argparse
import os
import sys
from typing import Final

from server.commands import listing, say, serve, top
from server.commands.client import ClientError, UsageError
from shared.settings import SettingsError

_EXIT_FAILED: Final = 1
_EXIT_WRONG_USE: Final = 2
_EXIT_INTERRUPTED: Final = 130

_EPILOG: Final = """\
examples:
  python -m server                                  serve on TTS_HOST:TTS_PORT (127.0.0.1:8000)
  python -m server say "Good morning." -o hi.mp3    speak into a file
  python -m server say --format wav < text.txt | aplay
  python -m server voices --model espeak-ng
  python -m server top                              watch a running service

The service is set up by TTS_* variables, from the environment or from .env (see .env.example);
the other commands find it by the same ones, or by --url.
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    found = argparse.ArgumentParser(
        prog="python -m server",
        description="A self-hosted, OpenAI-compatible speech server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.set_defaults(run=serve.run)
    commands = found.add_subparsers(title="commands", metavar="COMMAND")
    for name, add_arguments, run, summary in (
        ("serve", serve.add_arguments, serve.run, "run the service (the default)"),
        ("say", say.add_arguments, say.run, "let a running service speak into a file, or a player"),
        ("models", listing.add_arguments, listing.run_models, "list the models of a running service"),
        ("voices", listing.add_voice_arguments, listing.run_voices, "list its voices"),
        ("top", top.add_arguments, top.run, "watch its models, memory, queue and streams"),
    ):
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        add_arguments(command)
        command.set_defaults(run=run)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code."""
    chosen = parser().parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
        sys.stdout.flush()
    except ClientError as error:
        sys.stderr.write(f"{error}\n")
        return _EXIT_FAILED
    except (UsageError, SettingsError) as error:
        sys.stderr.write(f"{error}\n")
        return _EXIT_WRONG_USE
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has heard enough. The interpreter would flush stdout once more, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
