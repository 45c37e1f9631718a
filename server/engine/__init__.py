"""The web side's end of the conversation with the GPU worker: speech requests, admin calls, snapshots and lookups.

Outsiders import the names below, never a module of the package.
"""

from server.engine.client import INITIAL_CREDIT as INITIAL_CREDIT
from server.engine.client import Chunk as Chunk
from server.engine.client import EngineClient as EngineClient
from server.engine.client import Speech as Speech
from server.engine.client import silent_speech as silent_speech
from server.engine.lookups import cached_catalog as cached_catalog
from server.engine.lookups import find_saved_voice as find_saved_voice
from server.engine.lookups import find_speech as find_speech
from server.engine.lookups import fresh_catalog as fresh_catalog
from server.engine.lookups import require_consent as require_consent
from server.engine.lookups import status_of as status_of
from server.engine.outage import Outage as Outage
from server.engine.outage import OutageFile as OutageFile
from server.engine.reports import ReplicaReport as ReplicaReport
from server.engine.web_process import WebProcess as WebProcess
from server.engine.zmq import ZmqEngineClient as ZmqEngineClient
