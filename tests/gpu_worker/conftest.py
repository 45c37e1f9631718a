"""What the worker's tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.gpu_worker.worker_bench import WorkerBench


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[Callable[..., WorkerBench]]:
    """Make a WorkerBench that is taken down with the test."""
    benches: list[WorkerBench] = []

    def make(*arguments: object, **options: object) -> WorkerBench:
        bench = WorkerBench(tmp_path / "voices", *arguments, **options)  # type: ignore[arg-type] # passed on as given
        benches.append(bench)
        return bench

    with capture_logs():  # tracebacks of the faults that tests provoke take longer to render than all the rest
        yield make
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., WorkerBench]) -> WorkerBench:
    """A WorkerBench with one model, "m"."""
    return make_bench()
