"""The simulated cluster: what the table shows holds at a small size."""

import functools
import statistics

import pytest

from tests.benchmarks.cluster import DAY_S, Cluster, Figures, Policy


def simulate(policy: Policy, gpus: int) -> Figures:
    """A sixth of a day."""
    return Cluster(gpus, policy, seconds=DAY_S / 6).run()


simulated = functools.cache(simulate)


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [2, 6])
def test_chosen_beats_random_and_least_loaded(gpus: int) -> None:
    """In every figure; with two GPUs there is room for four of the five models, with six for all."""
    chosen = simulated("chosen", gpus)
    for other in (simulated("random", gpus), simulated("least loaded", gpus)):
        assert chosen.hits / chosen.requests > 1.2 * other.hits / other.requests
        assert chosen.loads < other.loads / 2
        assert chosen.evictions < other.evictions / 2
        assert chosen.refused <= other.refused
        assert _p95(chosen) < _p95(other)


def test_a_model_does_not_spread() -> None:
    """With room for all models, each is loaded about once, though every GPU has free slots for it."""
    assert simulated("chosen", 6).evictions == 0
    assert simulated("chosen", 6).loads <= 5


def test_same_seed_same_figures() -> None:
    """The table can be made again."""
    assert simulated("chosen", 2) == simulate("chosen", 2)


def _p95(figures: Figures) -> float:
    return statistics.quantiles(figures.waits_s, n=20)[18]
