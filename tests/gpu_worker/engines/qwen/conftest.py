"""Engines that the tests of a module share."""

from collections.abc import Iterator

import pytest

from gpu_worker.engines.qwen.engine import QwenEngine
from tests.gpu_worker.engines.qwen.driving import engine


@pytest.fixture(scope="module")
def speaker() -> Iterator[QwenEngine]:
    """A CustomVoice engine with four slots. Each test must leave it idle."""
    made = engine("custom_voice")
    yield made
    assert made.capacity() == 4
    assert not made.runnable(())
    made.close()


@pytest.fixture(scope="module")
def cloner() -> Iterator[QwenEngine]:
    """A Base engine with four slots. Each test must leave it idle."""
    made = engine("base")
    yield made
    assert made.capacity() == 4
    made.close()
