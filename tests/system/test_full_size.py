"""The published shapes, with random weights, on a CPU: slow, but whole and within its memory."""

import shutil
from collections.abc import Callable
from typing import Final

import httpx
import pytest

from shared.pcm import FRAME_SAMPLES
from tests.benchmarks.endless import endless
from tests.system.service import Service, resident_bytes

MODEL: Final = "qwen3-tts-0.6b-customvoice"
FRAMES: Final = 12
NEEDED_BYTES: Final = 5 * 10**9
"""Of disk for the checkpoint, which is written once and kept, and of slack."""

MOST_BYTES: Final = {"bfloat16": 5 * 2**30, "float32": 9 * 2**30}
"""The published weights are 1.8 and 3.6 GB; the codec, the caches of eight slots and torch come on top."""


@pytest.mark.soak
@pytest.mark.parametrize("dtype", MOST_BYTES)
def test_full_size_speaks_within_its_memory(start: Callable[..., Service], dtype: str) -> None:
    """Loaded while the first request waits, every frame arrives, and the worker holds no more than it should."""
    if shutil.disk_usage(".").free < NEEDED_BYTES:
        pytest.skip("the disk has no room for a full-size checkpoint")
    service = start(
        MODEL_PATHS=f"{MODEL}={endless('0.6B').resolve()}",
        DEFAULT_DEVICE="cpu",
        DEFAULT_MODEL="espeak-ng",
        DTYPE=dtype,
    )
    request = {"input": "Hello world.", "model": MODEL, "response_format": "pcm", "max_new_tokens": FRAMES}
    answer = httpx.post(f"{service.url}/v1/audio/speech", json=request, timeout=600)
    assert answer.status_code == httpx.codes.OK, answer.text
    assert len(answer.content) == FRAMES * FRAME_SAMPLES * 2
    held = resident_bytes(service.worker_pid())
    print(f"{dtype}: {held / 2**30:.1f} GiB resident")  # noqa: T201 -- the figure is the point
    assert held < MOST_BYTES[dtype]
