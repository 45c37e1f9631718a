"""The cost of a request in the front end, beside an older commit: `python -m tests.benchmarks.request_cost COMMIT`.

Three services run at once: the older commit, this one without keys, and this one with everything on (twenty keys with
limits, usage, a dashboard). Each gets a batch of the same short requests in turn, so a busy machine is busy for all.
The figure is the CPU time of the web worker for each request. On a busy machine the same work takes more CPU time in
some rounds, and never less, so the lowest tenth of the rounds says most; the median stands beside it.
The older commit must be able to start with the packages that are installed.
"""

import argparse
import contextlib
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx

from tests.benchmarks import machine
from tests.system.keyed_load import ADMIN, KEYS, write_keys
from tests.system.service import ROOT, Service, running_service

BODY: Final = {"input": "Good morning, this is a short sentence.", "response_format": "pcm"}
OLD: Final = "the older commit"
PLAIN: Final = "this commit, without keys"
_START_S: Final = 120.0
FULL: Final = "this commit, keys, limits, usage and a dashboard"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.request_cost", description=__doc__)
    parser.add_argument("commit", help="the older commit")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--requests", type=int, default=40, help="of each service in each round")
    chosen = parser.parse_args()
    print("\n".join(f"- {line}" for line in machine.describe()))
    print(f"- {chosen.rounds} rounds of {chosen.requests} requests each, beside commit {chosen.commit}")
    costs = measure(chosen.commit, chosen.rounds, chosen.requests)
    print("\n| service | CPU ms a request, lowest tenth | beside the older commit | p50 | beside it |")
    print("|---|---|---|---|---|")
    for name, found in costs.items():
        low, old_low = _lowest_tenth(found), _lowest_tenth(costs[OLD])
        middle, old_middle = statistics.median(found), statistics.median(costs[OLD])
        print(f"| {name} | {1000 * low:.2f} | {low / old_low:.3f} | {1000 * middle:.2f} | {middle / old_middle:.3f} |")


def _lowest_tenth(costs: list[float]) -> float:
    return statistics.mean(sorted(costs)[: max(1, len(costs) // 10)])


def measure(commit: str, rounds: int, requests: int) -> dict[str, list[float]]:
    """CPU seconds of the web worker for a request, of each service in each round."""
    costs: dict[str, list[float]] = {OLD: [], PLAIN: [], FULL: []}
    with running_services(commit) as services:
        for name, (service, _web) in services.items():
            _send(service, requests, name)  # warms up
        for number in range(rounds):
            order = list(services.items())
            for name, (service, web) in order if number % 2 else order[::-1]:
                before = _cpu_s(web)
                _send(service, requests, name)
                costs[name].append((_cpu_s(web) - before) / requests)
    return costs


@contextlib.contextmanager
def running_services(commit: str) -> Iterator[dict[str, tuple[Service, int]]]:
    """The three services, each with the process id of its web worker."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tts-cost-")))
        old = stack.enter_context(_checked_out(commit, folder / "commit"))
        (folder / "full").mkdir()
        settings = {"KEYS_FILE": write_keys(folder / "full" / "keys.toml", limited=False)}
        found = {
            # It may not know this setting yet.
            OLD: stack.enter_context(running_service(folder, start_timeout_s=_START_S, root=old, USAGE_FILE="")),
            PLAIN: stack.enter_context(running_service(folder, start_timeout_s=_START_S)),
            FULL: stack.enter_context(running_service(folder / "full", start_timeout_s=_START_S, **settings)),
        }
        found[FULL].http.headers.update(ADMIN)
        over = threading.Event()
        watching = threading.Thread(target=_watch, args=(found[FULL], over), daemon=True)
        watching.start()
        yield {name: (service, next(iter(service.web_pids()))) for name, service in found.items()}
        over.set()


@contextlib.contextmanager
def _checked_out(commit: str, folder: Path) -> Iterator[Path]:
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def _send(service: Service, requests: int, name: str) -> None:
    keys = list(KEYS.values())
    with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as http:
        for number in range(requests):
            headers = {"authorization": f"Bearer {keys[number % len(keys)]}"} if name == FULL else {}
            answer = http.post("/v1/audio/speech", json=BODY, headers=headers)
            assert answer.status_code == httpx.codes.OK, answer.text


def _watch(service: Service, over: threading.Event) -> None:
    with contextlib.suppress(httpx.TransportError), service.http.stream("GET", "/admin/events", headers=ADMIN) as feed:
        for _ in feed.iter_raw():
            if over.is_set():
                return


def _cpu_s(pid: int) -> float:
    """The CPU time of all threads; /proc/PID/stat has it in steps of 10 ms, a fortieth of a round."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


if __name__ == "__main__":
    main()
