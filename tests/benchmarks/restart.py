"""How soon speech is back after a `kill -9` of the GPU worker: `python -m tests.benchmarks.restart`.

The times of the stages are those of the service's own log lines; the last one is a client's.

- process started, loop runs, model loaded: log lines of the supervisor and of the new GPU worker (imports of torch are
  between the first two).
- first audio: until a client that asks every 20 ms has the first byte of an answer.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import httpx

from tests.benchmarks import machine
from tests.checkpoints import tiny
from tests.system.service import Service, running_service

MODEL = "qwen3-tts-0.6b-customvoice"


def main() -> None:
    """Kill and measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.restart", description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="how often the GPU worker is killed")
    parser.add_argument("--checkpoint", type=Path, help="of 0.6B-CustomVoice; without it a small random one")
    chosen = parser.parse_args()
    print("\n".join(f"- {line}" for line in machine.describe()))
    checkpoint = (chosen.checkpoint or tiny("custom_voice")).resolve()
    settings = {"DEFAULT_MODEL": MODEL, "MODEL_PATHS": f"{MODEL}={checkpoint}", "LOG_FORMAT": "json"}
    rows = []
    for _ in range(chosen.times):  # each time another service: a second early death would be followed by a pause
        with tempfile.TemporaryDirectory() as folder, running_service(Path(folder), **settings) as service:
            rows.append(killed(service))
    size = "given" if chosen.checkpoint else "small random"
    print(f"- {MODEL}, {size} checkpoint; {chosen.times} services, one kill each\n")
    print("| s after the kill | min | median | max |\n|---|---|---|---|")
    for stage in rows[0]:
        times = [row[stage] for row in rows]
        print(f"| {stage} | {min(times):.2f} | {statistics.median(times):.2f} | {max(times):.2f} |")


def killed(service: Service) -> dict[str, float]:
    """Kill the worker once: seconds from then to each stage."""
    logged = len(service.log.read_text().splitlines())
    pid = service.worker_pid()
    began = time.time()
    os.kill(pid, signal.SIGKILL)
    while not first_byte(service):
        time.sleep(0.02)
        if time.time() - began > 120:
            sys.exit("no speech within two minutes of a kill")
    spoken_s = time.time() - began
    at: dict[str, float] = {}
    for line in service.log.read_text().splitlines()[logged:]:
        entry = json.loads(line)
        at.setdefault(entry["event"], datetime.fromisoformat(entry["timestamp"]).timestamp() - began)
    return {
        "process started": at["worker_started"],
        "loop runs": at["worker_ready"],
        "model loaded": at["transition_done"],
        "first audio": spoken_s,
    }


def first_byte(service: Service) -> bool:
    """Ask for speech once; whether audio came."""
    try:
        with service.stream("Hello.", response_format="pcm") as answer:
            return answer.status_code == httpx.codes.OK and bool(next(answer.iter_raw(), b""))
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
