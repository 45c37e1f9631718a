"""The order of requests: the queue of those that wait, and the slots of those that speak.

Outsiders import from this package only, never from its modules.
"""

from gpu_worker.scheduling.scheduler import Scheduler as Scheduler
from gpu_worker.scheduling.slot_policy import NEWCOMERS_IN_A_ROW as NEWCOMERS_IN_A_ROW
from gpu_worker.scheduling.slots import Place as Place
from gpu_worker.scheduling.slots import Slots as Slots
