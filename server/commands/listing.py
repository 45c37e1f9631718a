"""`models` and `voices`: what a running service speaks with, as tables, or as JSON for other programs."""

import argparse
import json
import sys
import urllib.parse
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from server.commands.client import add_service_arguments, client_of

_PIPE_WIDTH: Final = 200
"""Characters a line may have where no terminal limits it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How to show them."""
    parser.add_argument("--json", action="store_true", help="the service's own answer")
    add_service_arguments(parser)


def add_voice_arguments(parser: argparse.ArgumentParser) -> None:
    """Which voices, and how to show them."""
    parser.add_argument("--model", help="only this model's")
    add_arguments(parser)


def run_models(arguments: argparse.Namespace) -> int:
    """List the models."""
    answer = client_of(arguments).get("/v1/models")
    if arguments.json:
        return _print_json(answer)
    table = Table("model", "state", "task", "languages", "voices", "loaded", "aliases", box=None)
    for model in answer["data"]:
        loaded = model.get("loaded_bytes") or 0
        table.add_row(
            model["id"],
            model.get("state", ""),
            model.get("task", ""),
            str(len(model.get("languages", []))),
            str(len(model.get("voices", []))),
            megabytes(loaded) if loaded else "",
            ", ".join(model.get("aliases", [])),
        )
    console().print(table)
    return 0


def run_voices(arguments: argparse.Namespace) -> int:
    """List the voices."""
    query = f"?model={urllib.parse.quote(arguments.model, safe='')}" if arguments.model else ""
    answer = client_of(arguments).get(f"/v1/audio/voices{query}")
    if arguments.json:
        return _print_json(answer)
    table = Table("voice", "name", "model", "language", "kind", "description", box=None)
    for voice in answer["voices"]:
        table.add_row(
            *(str(voice.get(key) or "") for key in ("id", "name", "model", "language", "kind", "description"))
        )
    console().print(table)
    return 0


def console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)


def megabytes(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 2**20:,.0f} MB"


def _print_json(answer: Any) -> int:
    sys.stdout.write(json.dumps(answer, indent=2, ensure_ascii=False) + "\n")
    return 0
