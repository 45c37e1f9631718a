"""The codes of recordings, compared with those of the official tokenizer."""

import numpy as np
import pytest
import torch

from gpu_worker.engines.qwen.codec import Codec
from tests.checkpoints import tiny
from tests.gpu_worker.engines.qwen.parity import official


@pytest.mark.parametrize("samples", [1, 1919, 1920, 5 * 1920, 60_000])
def test_codes_are_the_official_ones(samples: int) -> None:
    """Recordings of any length give the official codes. The encoder computes in float32, even in a bfloat16 codec."""
    pcm = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
    expected = official("base", None).model.speech_tokenizer.encode([pcm], sr=24_000).audio_codes[0]

    for dtype in (torch.float32, torch.bfloat16):
        codes = Codec(tiny("base"), dtype=dtype, device=torch.device("cpu")).encode(torch.from_numpy(pcm))
        assert codes.shape == (-(-samples // 1920), 16)
        assert torch.equal(codes, expected)
    assert samples < 5 * 1920 or len(codes.unique()) > 16
