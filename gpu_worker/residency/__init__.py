"""Which model is where: on the device, in host RAM or nowhere; what moves it, and how memory is measured.

`Residency` decides and keeps account; `Mover` and `Checkpoints` are the threads that carry its decisions out.
Outsiders import from this package only, never from its modules.
"""

from gpu_worker.residency.checkpoints import Checkpoints
from gpu_worker.residency.cleanup import ResidencyOptions
from gpu_worker.residency.manager import ModelBusyError, Residency
from gpu_worker.residency.memory import MemoryProbe, open_probe
from gpu_worker.residency.models import (
    Downloaded,
    FilesChecked,
    MoverFailed,
    Progress,
    Refusal,
    Report,
    TransitionDone,
    TransitionFailed,
)
from gpu_worker.residency.mover import Mover
from gpu_worker.residency.nvidia import cuda_present

__all__ = [
    "Checkpoints",
    "Downloaded",
    "FilesChecked",
    "MemoryProbe",
    "ModelBusyError",
    "Mover",
    "MoverFailed",
    "Progress",
    "Refusal",
    "Report",
    "Residency",
    "ResidencyOptions",
    "TransitionDone",
    "TransitionFailed",
    "cuda_present",
    "open_probe",
]
