"""Which replica a request goes to: plain data in, names of replicas out."""

from collections.abc import Collection, Mapping, Sequence

from server.engine import ReplicaReport


def choose(
    replicas: Sequence[str], reports: Mapping[str, ReplicaReport], model: str, avoid: Collection[str]
) -> list[str]:
    """The replicas that may take a request for `model`, the best one first.

    `avoid` names replicas that have refused the request; they come last.
    """

    def rank(name: str) -> tuple[bool, bool, bool, int]:
        report = reports.get(name)
        snapshot = report.snapshot if report else None
        if report is None or snapshot is None:
            return name in avoid, True, True, 0
        ready = any(status.id == model and status.state in {"resident", "loading"} for status in snapshot.models)
        return name in avoid, report.error is not None, not ready, snapshot.running + snapshot.queued

    return sorted(replicas, key=rank)
