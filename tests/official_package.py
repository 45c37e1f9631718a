"""The classes of the official `qwen_tts` package that only tests and benchmarks use.

gpu_worker's `load_official` does the import itself.
"""

import functools
import importlib
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
