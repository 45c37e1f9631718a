"""EngineClient over the replicas of a cluster: each replica keeps one GPU worker, and Ray Serve chooses the replica.

This package knows messages, streams and failures. It does not import ray: server/cluster implements `EngineReplicas`
over a deployment handle. What crosses Ray are the encoded messages of shared/protocol/, as bytes.
Outsiders import the names below.
"""

from server.engine.ray.client import RayEngineClient as RayEngineClient
from server.engine.ray.interface import EngineReplicas as EngineReplicas
from server.engine.ray.interface import Frames as Frames
from server.engine.ray.interface import ReplicaLostError as ReplicaLostError
from server.engine.ray.interface import ReplicaStream as ReplicaStream
from server.engine.ray.interface import ReportRequest as ReportRequest
from server.engine.ray.polling import REPORT_INTERVAL_S as REPORT_INTERVAL_S
