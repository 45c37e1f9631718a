"""The router as Serve calls it: its choices, and what it takes from Serve's reports of requests."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from server.engine import ReplicaReport
from shared.protocol import ModelStatus
from tests.fakes import a_snapshot

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray defines its own schemas in a deprecated way
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID

    from server.cluster.router import EngineRouter

pytestmark = pytest.mark.slow

SLOTS = 2
CANDIDATES: Any = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in ("x", "y")]


def request(number: int, *, method: str = "speak", model: str = "a") -> Any:
    """A request as Serve passes it to the router."""
    metadata = SimpleNamespace(multiplexed_model_id=model, call_method=method, internal_request_id=str(number))
    return SimpleNamespace(metadata=metadata, kwargs={})


@pytest.fixture
def router() -> EngineRouter:
    """A router that knows two replicas with two slots each, where the model is resident."""
    made = EngineRouter(DeploymentID("engine", "speech"), DeploymentHandleSource.REPLICA)
    made.initialize_state(model_replicas={"b": [1, 1]})
    home = a_snapshot([], models=[ModelStatus(id="a", state="resident")], slots=SLOTS)
    made.placement.reports = {name: ReplicaReport(replica=name, snapshot=home) for name in ("x", "y")}
    return made


async def choice(router: EngineRouter, pending: Any) -> Any:
    """The replica that the request goes to."""
    ranks = await router.choose_replicas(CANDIDATES, pending)
    assert all(len(rank) == 1 for rank in ranks)
    return ranks[0][0]


async def test_choices_count_at_once(router: EngineRouter) -> None:
    """Two requests fill the slots of a replica before it has answered; one that ends frees its slot."""
    first = await choice(router, request(0))
    for number in range(1, 2 * SLOTS):
        await choice(router, request(number))
    counted = {view.id: view.running for view in router.placement._estimates.replicas}
    assert counted == {"x": SLOTS, "y": SLOTS}
    router.on_request_routed(request(0), first.replica_id, None)
    router.on_request_completed(first.replica_id, "0")
    assert await choice(router, request(9)) is first


async def test_serve_took_another_replica(router: EngineRouter) -> None:
    """The request counts where it is."""
    first = await choice(router, request(0))
    other = next(one for one in CANDIDATES if one is not first)
    router.on_request_routed(request(0), other.replica_id, None)
    counted = {view.id: view.running for view in router.placement._estimates.replicas}
    assert counted == {first.replica_id.unique_id: 0, other.replica_id.unique_id: 1}


async def test_calls_take_no_slot(router: EngineRouter) -> None:
    """A request that is not speech changes no choice."""
    first = await choice(router, request(0, method="call"))
    assert await choice(router, request(1, method="name", model="")) is not None
    assert await choice(router, request(2)) is first
    assert router.placement._estimates.replicas[0].running + router.placement._estimates.replicas[1].running == 1
