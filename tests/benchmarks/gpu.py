"""What needs a GPU, for little time on one: `python -m tests.benchmarks.gpu`, and with `--full` the rest.

Each stage is a process of its own with a time limit, and prints its tables as it goes. A stage that fails, hangs or
takes the device down does not stop the next one. The stages come in the order in which they save time: first what is
wrong, then what is slow, then why. Without `--full` all limits together are eight minutes.
Exit code 1 if a stage failed.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

import msgspec

FULL_S: Final = 1800.0
"""The limit of a stage of the full run."""


class Stage(msgspec.Struct, frozen=True):
    """A command and its time limit."""

    name: str
    command: list[str]
    limit_s: float


class StageOutcome(msgspec.Struct, frozen=True):
    """How a stage ended: "ok", or what went wrong."""

    name: str
    result: str
    seconds: float


def module(name: str, *arguments: str) -> list[str]:
    """The command of a module of this environment."""
    return [sys.executable, "-m", name, *arguments]


def pytest(*arguments: str) -> list[str]:
    """The command of tests that print their figures, and name what they skip."""
    return module("pytest", "-p", "no:cacheprovider", "-q", "-s", "-rs", *arguments)


def engine(*arguments: str, size: str = "1.7B") -> list[str]:
    """The command of the engine's benchmark on a random checkpoint of published size."""
    return module("tests.benchmarks.engine", "--device", "cuda", "--size", size, *arguments)


BRIEF: Final = ("--brief", "--streams", "1", "16")

SHORT: Final = [
    Stage("the same codes and samples as on a CPU", pytest("tests/gpu/test_engine.py", "tests/gpu/test_codec.py"), 110),
    Stage("Triton's kernels beside torch's", pytest("tests/gpu/test_kernels.py", "tests/gpu/test_quantization.py"), 70),
    Stage("a random checkpoint of 1.7B", module("tests.benchmarks.endless", "--size", "1.7B"), 45),
    Stage("a frame at 1, 4 and 16 streams", engine("--streams", "1", "4", "16", "--repeat", "1", "--no-official"), 80),
    Stage("load, first requests, offload, restore", module("tests.benchmarks.moves", "--size", "1.7B"), 50),
    Stage("the same frame with int8 weights", engine(*BRIEF, "--quantization", "int8"), 45),
    Stage("the same frame with torch's kernels", engine(*BRIEF, "--kernels", "torch"), 40),
    Stage("the same frame with SDPA", engine(*BRIEF, "--attention", "sdpa"), 40),
]
"""Their limits together are at most eight minutes."""

FULL: Final = [
    Stage("all tests that need a GPU", pytest("tests/gpu"), FULL_S),
    *(
        stage
        for size in ("1.7B", "0.6B")
        for stage in (
            Stage(f"a random checkpoint of {size}", module("tests.benchmarks.endless", "--size", size), FULL_S),
            Stage(f"the engine, {size}", engine(size=size), FULL_S),
            Stage(f"moves, {size}", module("tests.benchmarks.moves", "--size", size), FULL_S),
            Stage(
                f"the service under load, {size}",
                module("tests.benchmarks.load", *f"--device cuda --size {size}".split()),
                FULL_S,
            ),
        )
    ),
]


def run(stages: Sequence[Stage]) -> list[StageOutcome]:
    """Run every stage, and print what each does and how it ended."""
    outcomes = []
    for number, stage in enumerate(stages, 1):
        print(f"\n=== {number} of {len(stages)}: {stage.name} (at most {stage.limit_s:.0f} s)", flush=True)
        outcome = run_one(stage)
        print(f"=== {outcome.result} after {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
    return outcomes


def run_one(stage: Stage) -> StageOutcome:
    """Run a stage; past its limit, kill it with all that it has started."""
    began = time.monotonic()
    process = subprocess.Popen(stage.command, start_new_session=True, stdin=subprocess.DEVNULL)
    result = f"over its limit of {stage.limit_s:.0f} s"
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(stage.limit_s)
            result = f"exit code {code}" if code else "ok"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return StageOutcome(stage.name, result, time.monotonic() - began)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, and print a table of their ends."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all tests, and every table for both sizes")
    outcomes = run(FULL if parser.parse_args(arguments).full else SHORT)
    print("\n| stage | result | s |\n|---|---|---|")
    for outcome in outcomes:
        print(f"| {outcome.name} | {outcome.result} | {outcome.seconds:.0f} |")
    return 1 if any(outcome.result != "ok" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
