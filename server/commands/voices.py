"""`voices`: the preset and saved voices of a running service, as a table or as JSON."""

import argparse
import urllib.parse
from typing import Final

from rich.table import Table

from server.commands.client import add_service_arguments, client_of
from server.commands.output import console, print_json

SUMMARY: Final = "list the voices of a running service"
_COLUMNS: Final = ("id", "name", "model", "language", "kind", "description")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which voices to show, and how."""
    parser.add_argument("--model", help="list the voices of this model, not of the default one")
    parser.add_argument("--json", action="store_true", help="print the service's own answer")
    add_service_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """List the voices; returns the exit code."""
    query = f"?model={urllib.parse.quote(arguments.model, safe='')}" if arguments.model else ""
    answer = client_of(arguments).get(f"/v1/audio/voices{query}", listing="voices")
    if arguments.json:
        print_json(answer)
        return 0
    table = Table("voice", *_COLUMNS[1:], box=None)
    for voice in answer["voices"]:
        table.add_row(*(str(voice.get(column) or "") for column in _COLUMNS))
    console().print(table)
    return 0
