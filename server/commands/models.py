"""`models`: the models of a running service, as a table or as JSON."""

import argparse

from rich.table import Table

from server.commands.client import add_service_arguments, client_of
from server.commands.output import console, megabytes, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How to show the models."""
    parser.add_argument("--json", action="store_true", help="print the service's own answer")
    add_service_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """List the models; returns the exit code."""
    answer = client_of(arguments).get("/v1/models", listing="data")
    if arguments.json:
        print_json(answer)
        return 0
    table = Table("model", "state", "task", "languages", "voices", "loaded", "aliases", box=None)
    for model in answer["data"]:
        loaded = model.get("loaded_bytes") or 0
        table.add_row(
            str(model.get("id", "?")),
            model.get("state", ""),
            model.get("task", ""),
            str(len(model.get("languages", []))),
            str(len(model.get("voices", []))),
            megabytes(loaded) if loaded else "",
            ", ".join(model.get("aliases", [])),
        )
    output = console()
    output.print(table)
    details = [f"{model.get('id', '?')}: {model['detail']}" for model in answer["data"] if model.get("detail")]
    if details:
        output.print("", *details, sep="\n", highlight=False, soft_wrap=True)
    return 0
