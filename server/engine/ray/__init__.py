"""EngineClient over the replicas of a cluster: each replica keeps one GPU worker, and Ray Serve chooses the replica.

This package knows messages, streams and failures. It does not import ray: server/cluster implements `EngineReplicas`
over a deployment handle. What crosses Ray are the encoded messages of shared/protocol/, as bytes.
Outsiders import the names below.
"""

from server.engine.ray.client import RayEngineClient
from server.engine.ray.interface import EngineReplicas, Frames, ReplicaLostError, ReplicaStream, ReportRequest
from server.engine.ray.polling import REPORT_INTERVAL_S

__all__ = [
    "REPORT_INTERVAL_S",
    "EngineReplicas",
    "Frames",
    "RayEngineClient",
    "ReplicaLostError",
    "ReplicaStream",
    "ReportRequest",
]
