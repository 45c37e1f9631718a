"""`voices`: the preset and saved voices of a running service, and whose they are, as a table or as JSON."""

import argparse
import urllib.parse
from typing import Any, Final

from rich.table import Table

from server.commands.client import add_service_arguments, client_of
from server.commands.output import console, print_json

_COLUMNS: Final = ("id", "name", "model", "language", "kind", "owner", "shared", "description")
_KINDS: Final = {"audio_sample": "clone", "prompt": "design"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The voices to show, and the form of the list."""
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
    for voice in _rows(answer):
        table.add_row(*(str(voice.get(column) or "") for column in _COLUMNS))
    console().print(table)
    return 0


def _rows(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The voices of one model, then the saved ones that no model speaks with now."""
    saved = {voice["id"]: voice for voice in answer.get("uploaded_voices", [])}
    rows = [{**voice, **_ownership(saved.pop(voice["id"], None))} for voice in answer["voices"]]
    rows += [{**voice, "kind": _KINDS.get(voice["type"]), **_ownership(voice)} for voice in saved.values()]
    return rows


def _ownership(saved: dict[str, Any] | None) -> dict[str, str]:
    """The owner of a saved voice, as far as the service tells this key, and whether every key may use it."""
    return {} if saved is None else {"owner": saved.get("owner", ""), "shared": "yes" if saved["shared"] else "no"}
