"""The cost of Ray over ZeroMQ, in one run: `python -m tests.benchmarks.cluster_cost`.

The same GPU worker, which sends recorded speech in real time, speaks to `python -m server` and to
`python -m server cluster` with one replica, with two web workers each, one after the other.

- Time to the first byte over HTTP, one client.
- Real-time streams, as in tests.benchmarks.frontend: a stream underruns if a player with a buffer of 200 ms ran dry.
- Memory of all processes but the GPU worker (PSS: a page that several share counts once), before and after the streams.

All processes share the machine's cores, the client as well: read the figures with the machine's line above them.
"""

import argparse
import contextlib
import http.client
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import uvloop

from tests.benchmarks import machine
from tests.benchmarks.frontend import first_byte_s, measure, percentiles, running
from tests.cluster.cluster import Cluster, running_cluster
from tests.system.service import Service, children_of, running_service

WEB_WORKERS: Final = 2
WARM_UP: Final = 10


def main() -> None:
    """Measure both, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cluster_cost", description=__doc__)
    parser.add_argument("--requests", type=int, default=100, help="requests for the time to the first byte")
    parser.add_argument("--streams", type=int, nargs="+", default=[10, 25, 50, 100], help="rounds of streams at once")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each stream is")
    chosen = parser.parse_args()
    print("\n".join(f"- {line}" for line in machine.describe()))
    print(
        f"- {WEB_WORKERS} web workers each, one GPU worker; {chosen.requests} requests; streams of {chosen.seconds:g} s"
    )
    print("\n| | first byte p50 ms | p95 ms | memory MB | after |\n|---|---|---|---|---|")
    tables = []
    for name in ("ZeroMQ", "Ray"):
        with tempfile.TemporaryDirectory() as folder, serving(name, Path(folder), chosen.seconds) as service:
            before = memory_mb(service)
            p50, p95 = first_bytes(service, chosen.requests)
            rows = [streams(service, count) for count in chosen.streams]
            print(f"| {name} | {p50:.1f} | {p95:.1f} | {before:.0f} | {memory_mb(service):.0f} |")
            tables += [f"| {name} | {row} |" for row in rows]
    print("\n| | streams | complete | underruns | late p99 ms | max ms | cores used |\n|---|---|---|---|---|---|---|")
    print("\n".join(tables))


@contextlib.contextmanager
def serving(name: str, folder: Path, seconds: float) -> Iterator[Service]:
    """The service over that transport, and its GPU worker."""
    with running(folder, "tests.benchmarks.fixed_rate_worker", str(seconds)) as url:
        settings: dict[str, object] = {"WORKER_URL": url, "WEB_WORKERS": WEB_WORKERS, "LOG_LEVEL": "warning"}
        start: Any = running_service
        if name == "Ray":
            start, settings["REPLICAS"] = running_cluster, 1
        with start(folder, **settings) as service:
            yield service


def first_bytes(service: Service, requests: int) -> tuple[float, float]:
    """The median and the 95th percentile of the time to the first byte, in milliseconds."""
    times = []
    for _ in range(requests + WARM_UP):
        connection = http.client.HTTPConnection("127.0.0.1", service.port)
        connection.connect()
        times.append(first_byte_s(connection, "pcm", whole=False))
        connection.close()
    return percentiles(times[WARM_UP:])


def streams(service: Service, count: int) -> str:
    """One round of streams: the cells of its row."""
    load = uvloop.run(measure(service.port, "pcm", count, sorted(processes(service))))
    cores = load.cpu_s["web"] / load.wall_s
    return (
        f"{load.streams} | {load.complete} | {load.underruns} | {load.late_p99_ms:.0f} | {load.late_max_ms:.0f} "
        f"| {cores:.2f}"
    )


def processes(service: Service) -> set[int]:
    """All processes of the service; the GPU worker is none of them."""
    others = service.processes() if isinstance(service, Cluster) else children_of(service.process.pid)
    return {service.process.pid, *others}


def memory_mb(service: Service) -> float:
    """The memory of all processes together, each page counted once."""
    total = 0
    for pid in processes(service):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


if __name__ == "__main__":
    main()
