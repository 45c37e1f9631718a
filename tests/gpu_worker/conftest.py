"""The bench of the worker's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.gpu_worker.worker_bench import MakeBench, WorkerBench


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[MakeBench]:
    """Make a WorkerBench that is closed after the test."""
    benches: list[WorkerBench] = []

    def make(*arguments: object, **options: object) -> WorkerBench:
        bench = WorkerBench(tmp_path / "voices", *arguments, **options)  # type: ignore[arg-type] # passed on as given
        benches.append(bench)
        return bench

    with capture_logs():  # rendering the tracebacks of provoked errors takes longer than all the rest
        yield make
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(make_bench: MakeBench) -> WorkerBench:
    """A WorkerBench with one model, "m"."""
    return make_bench()
