"""Many requests of twenty keys with limits, usage and events on: every answer is counted, and nothing grows."""

import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.system.keyed_load import ADMIN, KEYS, KeyedLoad, write_keys
from tests.system.residency_service import EXACT_MALLOC
from tests.system.service import Service, eventually, resident_bytes, running_service
from tests.system.test_soak import ROUNDS, growth

WARM_UP = 1000
EACH = 750
COUNTED = ("requests", "refusals", "failed", "cancelled")
MAX_USAGE_BYTES = 1_000_000
"""Of the usage file with its log: a row for each key, model and day is a hundred bytes."""


def _watch(service: Service, over: threading.Event) -> None:
    """A dashboard that reads every event."""
    with service.http.stream("GET", "/admin/events", headers=ADMIN) as events:
        for _ in events.iter_raw():
            if over.is_set():
                return


def _usage(service: Service) -> dict[str, Counter[str]]:
    """The sums by key; the day may change meanwhile."""
    sums: dict[str, Counter[str]] = {name: Counter() for name in KEYS}
    for row in service.http.get("/admin/usage", headers=ADMIN).json()["data"]:
        sums[row["key"]].update({name: row[name] for name in COUNTED})
    return sums


def _bytes_of(usage_file: Path) -> int:
    return sum(file.stat().st_size for file in usage_file.parent.glob(f"{usage_file.name}*"))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_with_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key's usage is exact, the file of usage stays small, and neither process grows."""
    for name, value in EXACT_MALLOC.items():
        monkeypatch.setenv(name, value)
    usage_file = tmp_path / "usage.sqlite"
    settings = {"KEYS_FILE": write_keys(tmp_path / "keys.toml"), "USAGE_FILE": usage_file, "LOG_LEVEL": "warning"}
    over = threading.Event()
    with running_service(tmp_path, **settings) as service:
        service.http.headers.update(ADMIN)
        (web,), gpu = service.web_pids(), service.worker_pid()
        watching = threading.Thread(target=_watch, args=(service, over))
        watching.start()
        load = KeyedLoad(service)
        load.run(WARM_UP)
        memory: dict[int, list[int]] = {web: [], gpu: []}
        sizes = []
        for _ in range(ROUNDS):
            load.run(EACH)
            sizes.append(_bytes_of(usage_file))
            for pid, found in memory.items():
                found.append(resident_bytes(pid))
        statuses = Counter(load.statuses)
        spoken = sum(count for (_, status), count in statuses.items() if status == httpx.codes.OK)
        eventually(lambda: sum(row["requests"] for row in _usage(service).values()) == spoken, 60, "all are counted")
        usage = _usage(service)
        over.set()
        load.run(len(KEYS))  # events, which end the dashboard
        watching.join()
    assert sum(statuses.values()) == WARM_UP + ROUNDS * EACH
    assert {status for name, status in statuses if name == "wrong"} <= {401}
    assert {status for name, status in statuses if name != "wrong"} <= {200, 429}
    for name in KEYS:
        row = usage[name]
        assert (row["requests"], row["refusals"]) == (statuses[name, 200], statuses[name, 429]), name
        assert (row["failed"], row["cancelled"]) == (0, 0)
    assert max(sizes) < MAX_USAGE_BYTES, sizes
    print("memory", memory, "usage file", sizes, "growth", [growth(found) for found in memory.values()])  # noqa: T201
    for found in memory.values():
        assert growth(found) < 0.01, memory
