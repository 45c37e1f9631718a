"""The place of each model (device, host RAM or none), the moves between places, and the measurement of memory.

`Residency` decides and keeps account; `Mover` and `Checkpoints` are the threads that carry its decisions out.
Outsiders import from this package only, never from its modules.
"""

from gpu_worker.residency.checkpoints import Checkpoints as Checkpoints
from gpu_worker.residency.cleanup import ResidencyOptions as ResidencyOptions
from gpu_worker.residency.manager import ModelBusyError as ModelBusyError
from gpu_worker.residency.manager import Residency as Residency
from gpu_worker.residency.memory import MemoryProbe as MemoryProbe
from gpu_worker.residency.memory import open_probe as open_probe
from gpu_worker.residency.models import Downloaded as Downloaded
from gpu_worker.residency.models import FilesChecked as FilesChecked
from gpu_worker.residency.models import MoverFailed as MoverFailed
from gpu_worker.residency.models import Progress as Progress
from gpu_worker.residency.models import Refusal as Refusal
from gpu_worker.residency.models import Report as Report
from gpu_worker.residency.models import TransitionDone as TransitionDone
from gpu_worker.residency.models import TransitionFailed as TransitionFailed
from gpu_worker.residency.mover import Mover as Mover
from gpu_worker.residency.nvidia import cuda_capability as cuda_capability
from gpu_worker.residency.nvidia import cuda_present as cuda_present
from gpu_worker.residency.nvidia import cuda_problem as cuda_problem
