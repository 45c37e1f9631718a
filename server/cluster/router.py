"""The class that Serve makes routers of: it has no code, because Serve copies that code and not its module."""

from server.cluster.router_base import RouterBase


class EngineRouter(RouterBase):
    """The request router of the engine deployment."""
