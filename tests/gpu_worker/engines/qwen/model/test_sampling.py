import numpy as np

from gpu_worker.engines.qwen.model.sampling import uniforms


def test_randomness_belongs_to_seed_and_utterance() -> None:
    """More frames extend the uniforms, another seed or utterance changes them all, and 1 is never reached."""
    assert np.array_equal(uniforms(5, 0, 10, 16), uniforms(5, 0, 20, 16)[:161])
    assert not np.array_equal(uniforms(5, 0, 10, 16), uniforms(5, 1, 10, 16))
    assert not np.array_equal(uniforms(5, 0, 10, 16), uniforms(6, 0, 10, 16))
    assert uniforms(-1, 0, 1, 16).dtype == np.float32
    assert uniforms(1, 0, 100_000, 16).max() <= np.float32(1 - 2**-22)
