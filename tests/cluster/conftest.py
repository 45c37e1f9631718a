"""One cluster that the tests of this folder share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, running_cluster

SLOTS: int = 2
QUEUE: int = 2


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two replicas with two slots each, and a queue for two more."""
    folder: Path = tmp_path_factory.mktemp("cluster")
    with running_cluster(folder, MAX_CONCURRENCY=SLOTS, MAX_QUEUE=QUEUE) as running:
        yield running
