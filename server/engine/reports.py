"""The report of a cluster's replica: its GPU worker's snapshot, and its node and GPUs."""

from typing import Any

import msgspec

from shared.catalog import ModelSpec
from shared.protocol import Snapshot, SpeechError


class ReplicaReport(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a replica, sent several times a second.

    `error` is the reason why its GPU worker takes no requests, with `retry_after_s`. The report has the catalogue and
    the settings if the web process did not know this life (`boot_id`) of the GPU worker.
    """

    replica: str
    node: str = ""
    gpus: list[str] = []
    boot_id: str = ""
    snapshot: Snapshot | None = None
    age_s: float = 0.0
    """That of the snapshot."""

    catalog: list[ModelSpec] | None = None
    settings: dict[str, Any] = {}
    error: SpeechError | None = None
    retry_after_s: float | None = None
