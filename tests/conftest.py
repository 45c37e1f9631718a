"""Settings of the whole suite: compute threads, Hypothesis profiles, the groups for parallel runs, and `--quick`."""

import atexit
import functools
import gc
import os
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Final

import hypothesis
import pytest
import structlog

SYSTEM: Final = Path(__file__).parent / "system"
BESIDE_OTHERS: Final = {
    "test_admin.py",
    "test_clients.py",
    "test_load.py",
    "test_proxies.py",
    "test_qwen.py",
    "test_start.py",
}
"""System tests that measure neither time nor memory closely: another service may run beside theirs."""

ENGINE: Final = (
    Path(__file__).parent / "gpu_worker" / "engines" / "qwen",
    Path(__file__).parent / "gpu_worker" / "engines" / "test_factory.py",
    Path(__file__).parent / "test_checkpoints.py",
)
"""Tests with the official package, whose import takes 4 s of CPU time in each process."""

KERNELS: Final = ENGINE[0] / "kernels"
"""Most wait for one process of Triton's interpreter. test_norm.py alone needs the official package."""

BROWSER: Final = Path(__file__).parent / "browser"
CLUSTER: Final = Path(__file__).parent / "cluster"
REAL_PROCESSES: Final = (
    *(SYSTEM, BROWSER, CLUSTER, Path(__file__).parent / "test_readme.py"),
    *(Path(__file__).parent / "server" / "commands", Path(__file__).parent / "server" / "processes"),
)
LONGEST: Final = ("system", "engine", "browser", "cluster", "kernels", str(SYSTEM))
"""The order of the groups that take minutes, and of the files that take half a minute."""

PROCESS_OF: Final[dict[str, str]] = {}
"""The process of pytest-xdist that runs a file's tests."""

# On two cores, several processes that each compute with two threads take longer than with one thread each.
# torch reads the variable when it is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tests start many services. Without bytecode each of them would compile our sources anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell starts background jobs with SIGINT ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored

# The default tracebacks of structlog take seconds to draw, once there are local variables of some size.
structlog.configure(processors=[structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)])

# "default" is short and fails in the same way each time. `make soak` takes "soak", which looks for new failures.
hypothesis.settings.register_profile("default", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("soak", max_examples=1000, deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("default")


class SkipImports:
    """Finds no module; skips whatever imports one of `names`: a test module, or a test that does so as it runs."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name in self._names:
            pytest.skip(f"needs {name}", allow_module_level=True)
        return None


EXTRAS: Final = SkipImports("opentelemetry", "starlette")
"""Skips the test modules that need them."""


def skip_services(event: str, arguments: tuple[Any, ...]) -> None:
    """Skip the test that is about to start a server or a GPU worker."""
    if event == "subprocess.Popen" and {"server", "gpu_worker"} & set(arguments[1]):
        pytest.skip("starts a service")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--quick`."""
    left_out = "leave out the tests that import torch or ray, start a service, or are slow"
    parser.addoption("--quick", action="store_true", help=left_out)


def pytest_configure(config: pytest.Config) -> None:
    """Watch for large modules and for services: no list of their tests has to be kept."""
    if config.option.quick:
        sys.meta_path.insert(0, SkipImports("torch", "ray"))
        sys.meta_path.append(EXTRAS)  # the last: it is asked only for what is not installed


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the folders in which nearly every test starts a service: to collect them takes a second."""
    return (config.option.quick and collection_path in {SYSTEM, BROWSER, CLUSTER}) or None


def pytest_collection_finish() -> None:
    """From now on the code that is tested looks for OpenTelemetry, and does without it.

    What the collection has made stays until the end. The garbage collector need not look at these 250,000 objects.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else Triton prints at the end what was not freed
    if EXTRAS in sys.meta_path:
        sys.meta_path.remove(EXTRAS)
        sys.addaudithook(skip_services)


@functools.cache
def group_of(path: Path) -> str:
    """The tests of a group run in one process.

    Services that are measured run one at a time; what else runs beside them, `in_time` allows for. The tests of the
    engine share models and official runs, those of the page a browser and its services.
    """
    if path.is_relative_to(SYSTEM) and path.name not in BESIDE_OTHERS:
        return "system"
    if path.is_relative_to(BROWSER):
        return "browser"
    if path.is_relative_to(CLUSTER):
        return "cluster"
    if path.is_relative_to(KERNELS) and path.name != "test_norm.py":
        return "kernels"
    return "engine" if any(map(path.is_relative_to, ENGINE)) else str(path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the longest groups come first: at the end of a run no process waits for the other.

    A test of real processes runs up to twice more if it fails: it shares the machine with whatever else runs there.
    The summary lists these runs, and a name that is seen in two summaries is a fault to be mended.
    """

    @functools.cache
    def rank(path: Path) -> int:
        group = group_of(path)
        return next((place for place, name in enumerate(LONGEST) if group.startswith(name)), len(LONGEST))

    @functools.cache
    def has_processes(path: Path) -> bool:
        return any(map(path.is_relative_to, REAL_PROCESSES))

    items.sort(key=lambda item: rank(item.path))
    for item in items:
        if has_processes(item.path):
            item.add_marker(pytest.mark.flaky(reruns=2))
        if config.option.quick and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip("slow"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file, and of a group, in one process: they share their fixtures.

    pytest-xdist 3.8 has groups of its own, but with pytest 9.2 it puts no test into them.
    """
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415 -- quick runs of one file may lack it

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(config.rootpath / nodeid.partition("::")[0])

    return Groups(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why tests ran again: the list under RERUN has their names alone."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.write_line(f"{report.nodeid} ran again: {getattr(report.longrepr, 'reprcrash', '')}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Fail loudly if a file's tests are in two processes: nothing else would show it but time."""
    process = getattr(report, "worker_id", "")
    file = report.nodeid.partition("::")[0]
    assert PROCESS_OF.setdefault(file, process) == process, f"{file} runs in several processes"
