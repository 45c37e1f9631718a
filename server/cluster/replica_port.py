"""The address of the port that Serve opens in each replica, for calls from other nodes by gRPC.

Serve opens it at every address of the machine, and unpickles what comes with Ray's token, or without if Ray has none.
Nothing here calls by gRPC, and Serve has no option to leave the port out.
"""

from typing import Any

import ray
from ray._common.network_utils import build_address
from ray.serve._private import replica

_open_port = replica.add_port_to_grpc_server


def hide_port() -> None:
    """Let the port of this process be at the node's own address: the loopback, for a Ray that starts with the service.

    Call it in the constructor of a deployment: Serve opens the port next.
    """
    address = build_address(ray.util.get_node_ip_address(), 0)

    def open_port(server: Any, _everywhere: str) -> int:
        return int(_open_port(server, address))

    replica.add_port_to_grpc_server = open_port
