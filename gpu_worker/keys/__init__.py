"""The limits of each API key, and its usage, which is kept on disk.

Outsiders import from this package only, never from its modules.
"""

from gpu_worker.keys.limits import LimitCounter as LimitCounter
from gpu_worker.keys.usage import AddUsage as AddUsage
from gpu_worker.keys.usage import Sums as Sums
from gpu_worker.keys.usage import UsageFile as UsageFile
from gpu_worker.keys.usage import UsageFound as UsageFound
from gpu_worker.keys.usage import UsageLog as UsageLog
