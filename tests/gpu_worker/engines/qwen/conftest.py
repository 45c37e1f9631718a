"""Engines on parts that all tests share."""

from collections.abc import Iterator

import pytest

from gpu_worker.engines.qwen.engine import QwenEngine
from tests.gpu_worker.engines.qwen.driving import kept_engine


@pytest.fixture
def speaker() -> Iterator[QwenEngine]:
    """A CustomVoice engine with four slots. The test must leave it idle."""
    made = kept_engine("custom_voice")
    yield made
    assert made.capacity() == 4
    assert not made.runnable(())


@pytest.fixture
def cloner() -> Iterator[QwenEngine]:
    """A Base engine with four slots. The test must leave it idle."""
    made = kept_engine("base")
    yield made
    assert made.capacity() == 4
