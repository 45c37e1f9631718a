"""Serve's custom autoscaling policy of the engine deployment: it reads Serve's figures; autoscaling.py has the rules.

Serve copies the code of this module into its controller, so the module defines nothing else.
"""

from typing import Any

from ray.serve.config import AutoscalingContext

from server.cluster.autoscaling import ReplicaLoad, wanted_replicas


def replicas_wanted(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """The number of replicas, by the last two figures of each one (`EngineReplica.record_autoscaling_stats`).

    The number changes only if both say so: what one figure shows may be over. Serve keeps it within the bounds of the
    deployment, and waits before it follows.
    """
    series = context.raw_metrics or {}
    names = ReplicaLoad.__struct_fields__
    replicas = [one for one in context.running_replicas if all(series.get(name, {}).get(one) for name in names)]
    target = context.target_num_replicas
    unassigned = context.total_queued_requests or 0.0
    wanted = [target]
    for ago in (1, 2):
        loads = [
            ReplicaLoad(**{name: series[name][one][-min(ago, len(series[name][one]))].value for name in names})
            for one in replicas
        ]
        wanted.append(wanted_replicas(loads, unassigned=unassigned, target=target))
    return sorted(wanted)[1], {}
