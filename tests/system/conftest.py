"""Services for the system tests: one that several tests share, and services of a test's own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.service import Service, running_service


@pytest.fixture(scope="session")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two web workers over one GPU worker, for tests that leave the service as they found it.

    The places for connections are few, so that test_connections.py can fill them.
    """
    few = {"MAX_CONNECTIONS": 64, "MAX_CONNECTIONS_PER_ADDRESS": 4, "TRUSTED_PROXIES": "127.0.0.1"}
    with running_service(tmp_path_factory.mktemp("service"), WEB_WORKERS=2, **few) as service:
        service.wait_serving(2)  # /ready is answered before the second one has opened its files, which tests count
        yield service


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start a service that this test alone uses and may damage."""
    services: list[Service] = []

    def started(**settings: object) -> Service:
        service = Service(tmp_path, **settings)
        services.append(service)
        return service.wait_ready()

    yield started
    for service in services:
        service.kill()
