"""The options of the engine deployment and its autoscaling policy, as Serve reads and calls them."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from shared.settings import load_settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray defines its own schemas in a deprecated way
    from server.cluster.application import build

pytestmark = pytest.mark.slow


def engine(**variables: str) -> Any:
    """The configuration of the engine deployment in an application for four GPUs."""
    settings = load_settings({f"TTS_{name}": value for name, value in variables.items()})
    return build(settings, gpus=4)._bound_deployment.init_args[1]._bound_deployment._deployment_config


def test_bounds_of_models() -> None:
    """By the id of the model, whichever of its names the setting has."""
    router = engine(MODEL_REPLICAS="espeak=2:3").request_router_config
    assert router.request_router_kwargs == {"model_replicas": {"espeak-ng": [2, 3]}}


def test_the_number_stays() -> None:
    """Without a minimum, and with one that is the maximum; then TTS_DRAIN_TIMEOUT limits the end of each replica."""
    for found in (engine(), engine(MIN_REPLICAS="4")):
        assert (found.autoscaling_config, found.num_replicas) == (None, 4)
        assert 30 < found.graceful_shutdown_timeout_s < 60


def test_the_bounds_of_the_number() -> None:
    """From TTS_MIN_REPLICAS to one a GPU, or to TTS_REPLICAS. A replica that is given up ends with its last stream."""
    found = engine(MIN_REPLICAS="0", SCALE_DOWN_DELAY="60")
    scaling = found.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, None, 4)
    assert scaling.upscale_delay_s < 10
    assert scaling.downscale_delay_s == 60
    assert found.graceful_shutdown_timeout_s > 36_000
    scaling = engine(MIN_REPLICAS="2", REPLICAS="3").autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 3)
    with pytest.raises(ValueError, match="TTS_MIN_REPLICAS is 5, but there are at most 4 replicas"):
        engine(MIN_REPLICAS="5")


class TestPolicy:
    """The policy that Serve asks for the number."""

    def wanted(self, *replicas: dict[str, list[float]], target: int, queued: float = 0.0) -> int:
        """The number for replicas that have noted these figures; a figure that is not named is 0, slots are 10."""
        policy = engine(MIN_REPLICAS="0").autoscaling_config.policy.get_policy()
        fields = ("running", "queued", "without_room", "streams", "slots")
        series: dict[str, Any] = {field: {} for field in fields}
        for number, figures in enumerate(replicas):
            for field in fields if figures else ():
                values = figures.get(field, [10.0] if field == "slots" else [0.0])
                series[field][f"r{number}"] = [SimpleNamespace(value=value) for value in values]
        context = SimpleNamespace(
            raw_metrics=series,
            running_replicas=[f"r{number}" for number in range(len(replicas))],
            target_num_replicas=target,
            total_queued_requests=queued,
        )
        number, state = policy(context)
        assert state == {}
        return int(number)

    def test_a_figure_that_is_over_changes_nothing(self) -> None:
        """The last two figures must agree, up and down; older ones do not count."""
        assert self.wanted({"running": [0, 9, 9]}, target=1) == 2
        assert self.wanted({"running": [9, 9, 0]}, target=1) == 1
        assert self.wanted({"running": [0, 0, 9]}, target=1) == 1
        assert self.wanted({"streams": [1]}, {"streams": [1, 0, 0]}, target=2) == 1
        assert self.wanted({"streams": [1]}, {"streams": [0, 1, 0]}, target=2) == 2

    def test_requests_without_a_replica(self) -> None:
        """Serve counts them."""
        assert self.wanted(target=0, queued=1) == 1
        assert self.wanted({"running": [8]}, target=1, queued=2) == 2

    def test_a_replica_that_has_noted_nothing_yet(self) -> None:
        """It may have requests: nothing is given up until it says that it has none."""
        assert self.wanted({"running": [0]}, {}, target=2) == 2
        assert self.wanted({"running": [0]}, {"running": [0]}, target=2) == 0
