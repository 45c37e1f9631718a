"""The classes of the official `qwen_tts` package that only tests and benchmarks use.

gpu_worker's `load_official` does the import itself.
"""

import atexit
import functools
import gc
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import msgspec
from torch import Tensor

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
    """Import the official package as the engine does; seconds, the first time.

    Its objects are frozen: collections that walk all of them would take a tenth of the time of the engine's tests.
    """
    gc.disable()
    try:
        load_official()
        package, core = (importlib.import_module(name) for name in ("qwen_tts", "qwen_tts.core"))
        models = importlib.import_module("qwen_tts.core.models")
    finally:
        gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else Triton prints at the end what was not freed
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
    """Let transformers make its attention masks by broadcasting instead of vmap, and read each signature once.

    The masks are the same. With vmap they take most of the time of a small model, signatures a tenth of the rest.
    """
    masking = importlib.import_module("transformers.masking_utils")
    # vmap alone needs TransformGetItemToIndex: it makes an index of each lookup.
    masks = patch.multiple(masking, _vmap_for_bhqkv=_by_broadcast, TransformGetItemToIndex=nullcontext)
    with masks, patch.object(inspect, "signature", functools.cache(inspect.signature)):
        yield


def _by_broadcast(mask_function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`mask_function` of each batch, head, query and key."""

    def mask(*indices: Tensor) -> Tensor:
        batch, head, queries, keys = indices
        found = mask_function(batch[:, None, None, None], head[:, None, None], queries[:, None], keys)
        return found.expand([len(one) for one in indices])

    return mask
