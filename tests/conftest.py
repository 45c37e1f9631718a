"""Settings of the whole suite: compute threads, Hypothesis profiles, the groups for parallel runs, and `--quick`."""

import os
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Final

import hypothesis
import pytest

SYSTEM: Final = Path(__file__).parent / "system"
BESIDE_OTHERS: Final = {"test_clients.py", "test_load.py", "test_proxies.py", "test_start.py"}
"""System tests that measure neither time nor memory closely: another service may run beside theirs."""

# On two cores, several processes that each compute with two threads take longer than with one thread each.
# torch reads the variable when it is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with SIGINT ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored

# "default" is short and fails in the same way each time. `make soak` takes "soak", which looks for new failures.
hypothesis.settings.register_profile("default", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("soak", max_examples=1000, deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("default")


class WithoutTorch:
    """Finds no module; skips whatever imports torch: a test module, or a test that imports torch as it runs."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name == "torch":
            pytest.skip("needs torch", allow_module_level=True)
        return None


def skip_services(event: str, arguments: tuple[Any, ...]) -> None:
    """Skip the test that is about to start a server or a GPU worker."""
    if event == "subprocess.Popen" and {"server", "gpu_worker"} & set(arguments[1]):
        pytest.skip("starts a service")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--quick`."""
    parser.addoption("--quick", action="store_true", help="leave out the tests that import torch or start a service")


def pytest_configure(config: pytest.Config) -> None:
    """Watch for torch and for services: no list of slow tests has to be kept."""
    if config.option.quick:
        sys.meta_path.insert(0, WithoutTorch())
        sys.addaudithook(skip_services)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests for `-n 2 --dist loadgroup`: a file stays together, and so do most of the system tests.

    These, the longest group, come first: at the end of a run no process waits for the other.
    """

    def is_measured(item: pytest.Item) -> bool:
        return item.path.is_relative_to(SYSTEM) and item.path.name not in BESIDE_OTHERS

    items.sort(key=lambda item: not is_measured(item))
    for item in items:
        group = "system" if is_measured(item) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
