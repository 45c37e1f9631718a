"""The web side's end of the conversation with the GPU worker: speech requests, admin calls, snapshots and lookups.

Outsiders import the names below, never a module of the package.
"""

from server.engine.client import INITIAL_CREDIT, Chunk, EngineClient, Speech, silent_speech
from server.engine.lookups import (
    cached_catalog,
    find_saved_voice,
    find_speech,
    fresh_catalog,
    require_consent,
    status_of,
)
from server.engine.outage import Outage, OutageFile
from server.engine.reports import ReplicaReport
from server.engine.web_process import WebProcess
from server.engine.zmq import ZmqEngineClient

__all__ = [
    "INITIAL_CREDIT",
    "Chunk",
    "EngineClient",
    "Outage",
    "OutageFile",
    "ReplicaReport",
    "Speech",
    "WebProcess",
    "ZmqEngineClient",
    "cached_catalog",
    "find_saved_voice",
    "find_speech",
    "fresh_catalog",
    "require_consent",
    "silent_speech",
    "status_of",
]
