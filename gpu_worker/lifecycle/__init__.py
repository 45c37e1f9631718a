"""The life of a request: its admission to a slot, the steps of its engine, its text, its timeouts and its end.

All of it runs on the synthesis thread. `scheduling` decides; this package carries it out with engines and models.
Outsiders import from this package only, never from its modules.
"""

from gpu_worker.lifecycle.admission import Admission as Admission
from gpu_worker.lifecycle.bounds import RequestBounds as RequestBounds
from gpu_worker.lifecycle.engine_steps import EngineSteps as EngineSteps
from gpu_worker.lifecycle.open_requests import OpenRequests as OpenRequests
from gpu_worker.lifecycle.open_text import OpenText as OpenText
from gpu_worker.lifecycle.timeouts import Timeouts as Timeouts
