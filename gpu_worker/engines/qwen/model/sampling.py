"""The parameters and the uniforms of sampling. The kernels sample_code and next_codebook0 have the arithmetic."""

from typing import Final

import msgspec
import numpy as np

from gpu_worker.engines.qwen.kernels.candidates import CANDIDATES

_BELOW_ONE: Final = np.float32(1 - 2**-22)
"""The largest uniform: u * total stays below total after rounding, so a removed candidate is never sampled."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters by which one utterance is sampled. `top_k` 0 means no limit.

    `greedy` takes the best candidate in talker and code predictor, `greedy_codes` in the code predictor alone.
    """

    greedy: bool
    greedy_codes: bool = False
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float

    @property
    def full_vocab(self) -> bool:
        """True if sampling has to sort the full vocabulary instead of its best CANDIDATES."""
        return not self.greedy and not 1 <= self.top_k <= CANDIDATES


def uniforms(seed: int, utterance: int, frames: int, groups: int) -> np.ndarray:
    """The uniforms of one utterance, float32 [frames * groups + 1]: one for the first code, then `groups` a frame.

    Philox is counter based, and its key is (seed, utterance): equal seeds give equal numbers for any `frames`.
    """
    generator = np.random.Generator(np.random.Philox(key=(utterance << 64) | (seed & (1 << 64) - 1)))
    return np.minimum(generator.random(frames * groups + 1, dtype=np.float32), _BELOW_ONE)
