"""Running services for the system tests: one shared by the tests that leave it as it was, others on demand."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.service import Service


@pytest.fixture(scope="session")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two web workers over one GPU worker, for tests that break nothing."""
    service = Service(tmp_path_factory.mktemp("service"), WEB_WORKERS=2)
    try:
        service.wait_ready()
        yield service
        assert service.stop() == 0
    finally:
        service.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start a service of this test's own, to be treated as badly as the test likes."""
    services: list[Service] = []

    def started(**settings: object) -> Service:
        service = Service(tmp_path, **settings)
        services.append(service)
        return service.wait_ready()

    yield started
    for service in services:
        service.kill()
