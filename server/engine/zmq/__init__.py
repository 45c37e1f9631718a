"""EngineClient over ZeroMQ: each web process has one connection to the one GPU worker of its machine.

Outsiders import the name below.
"""

from server.engine.zmq.client import ZmqEngineClient as ZmqEngineClient
