"""The classes of the official `qwen_tts` package that only tests and benchmarks use.

gpu_worker's `load_official` does the import itself.
"""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from gpu_worker.engines.qwen.checkpoint.official import load_official


class OfficialPackage(msgspec.Struct, frozen=True, kw_only=True):
    """Classes of qwen-tts 0.1.1, without type annotations there.

    `Model` is the wrapper for users, with `from_pretrained`.
    `ForConditionalGeneration` and `Config` are the transformers model and its config,
    `TokenizerModel` and `TokenizerConfig` those of the 12 Hz speech tokenizer. `Processor` has the text tokenizer.
    """

    Model: Any
    ForConditionalGeneration: Any
    Config: Any
    TokenizerModel: Any
    TokenizerConfig: Any
    Processor: Any


@functools.cache
def official_package() -> OfficialPackage:
    """Import the official package as the engine does; seconds, the first time."""
    load_official()
    package, core = (importlib.import_module(name) for name in ("qwen_tts", "qwen_tts.core"))
    models = importlib.import_module("qwen_tts.core.models")
    return OfficialPackage(
        Model=package.Qwen3TTSModel,
        ForConditionalGeneration=models.Qwen3TTSForConditionalGeneration,
        Config=models.Qwen3TTSConfig,
        TokenizerModel=core.Qwen3TTSTokenizerV2Model,
        TokenizerConfig=core.Qwen3TTSTokenizerV2Config,
        Processor=models.Qwen3TTSProcessor,
    )


@contextmanager
def quick_masks() -> Iterator[None]:
    """Let transformers make its attention masks by the function that it uses with torch before 2.6.

    The masks are the same. The newer function can also be compiled; run as it is, it takes most of the time of a small
    model: 9 of 16 s for the thirteen runs of test_sampled_parity.py.
    """
    masking = importlib.import_module("transformers.masking_utils")
    made = masking.sdpa_mask
    masking.sdpa_mask = masking.sdpa_mask_older_torch
    try:
        yield
    finally:
        masking.sdpa_mask = made
