"""The application as a config file of Ray Serve, for `serve deploy` and for KubeRay, and the builder that it names.

The file has the settings as TTS_* variables, without secrets: it only names those, and each node must have them itself.
"""

from typing import Any, Final

import msgspec.yaml
import ray
from ray import serve

from server.cluster.application import APP_NAME, build
from server.cluster.node_settings import NodeSettings, settings_for_nodes, settings_on_node
from shared.settings import Settings

BUILDER: Final = "server.cluster.config:application"

_HEAD: Final = (
    "# Made by `python -m server cluster --print-config`; `serve deploy` or KubeRay's serveConfigV2 takes it.\n"
)


class BuilderArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `args` of the file: the settings, and how many GPUs and nodes there are; None: as many as the cluster has.

    `revision` is of no use here: Serve replaces the replicas when it changes, as it does for every change of the file.
    """

    settings: NodeSettings
    gpus: int | None = None
    nodes: int | None = None
    revision: str | int | None = None


def serve_config(settings: Settings, *, gpus: int | None = None, nodes: int | None = None) -> dict[str, Any]:
    """The config, which ray.serve.schema.ServeDeploySchema describes."""
    http: dict[str, Any] = {"host": settings.host, "port": settings.port}
    if settings.tls_cert:
        http |= {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
    arguments = BuilderArguments(settings_for_nodes(settings), gpus, nodes)
    return {
        "proxy_location": "EveryNode",
        "http_options": http,
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": BUILDER,
                "args": {name: part for name, part in msgspec.to_builtins(arguments).items() if part is not None},
            }
        ],
    }


def to_yaml(config: dict[str, Any]) -> str:
    """The config as the text of a file."""
    return _HEAD + msgspec.yaml.encode(config).decode()


def application(args: dict[str, Any]) -> serve.Application:
    """The application of a config file's `args`. Serve calls it in the cluster."""
    arguments = msgspec.convert(args, BuilderArguments)
    gpus, nodes = arguments.gpus, arguments.nodes
    if gpus is None:
        gpus = int(ray.cluster_resources().get("GPU", 0))
    if nodes is None:
        nodes = sum(node["Alive"] for node in ray.nodes())
    return build(settings_on_node(arguments.settings), gpus=gpus, nodes=nodes)
