"""The options of the engine deployment, as Serve reads them."""

import warnings
from typing import Any

import pytest

from shared.settings import load_settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray defines its own schemas in a deprecated way
    from server.cluster.application import build

pytestmark = pytest.mark.slow


def engine(**variables: str) -> Any:
    """The engine deployment of an application for four GPUs."""
    settings = load_settings({f"TTS_{name}": value for name, value in variables.items()})
    return build(settings, gpus=4)._bound_deployment.init_args[1]._bound_deployment


def test_bounds_of_models() -> None:
    """By the id of the model, whichever of its names the setting has."""
    router = engine(MODEL_REPLICAS="espeak=2:3")._deployment_config.request_router_config
    assert router.request_router_kwargs == {"model_replicas": {"espeak-ng": [2, 3]}}
