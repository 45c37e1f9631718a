"""Parts of an engine with injected faults, to be put in the place of the real ones."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gpu_worker.engines.qwen.engine import Parts
from gpu_worker.engines.qwen.reference_cache import EncodedReference, ReferenceCache

ALLOCATING: Sequence[Callable[..., Any]] = (torch.cat, torch.empty, torch.addcmul, torch.topk, functional.linear)
"""Operators in all parts of a step, which allocate their result."""


class OutOfMemoryPart:
    """Delegates to `part`. Every `every`-th call of the named methods raises torch's out-of-memory error instead."""

    def __init__(self, part: object, *methods: str, every: int) -> None:
        self._part, self._methods, self._every = part, methods, every
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._part, name)
        return functools.partial(self._call, attribute) if name in self._methods else attribute

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        if self._calls % self._every == self._every // 2:
            raise torch.OutOfMemoryError("made up")
        return method(*args, **kwargs)


def out_of_memory_parts(parts: Parts, every: int) -> Parts:
    """Parts that run out of memory now and then, before they have changed anything."""
    faulty: dict[str, Any] = {
        "planner": OutOfMemoryPart(parts.planner, "utterance", every=2),
        "runner": OutOfMemoryPart(parts.runner, "prefill", "decode_step", every=every),
        "vocoder": OutOfMemoryPart(parts.vocoder, "decode", every=every),
    }
    return msgspec.structs.replace(parts, **faulty)


class OutOfMemoryOperators(TorchFunctionMode):
    """Within the context, every `every`-th call of an operator in ALLOCATING raises torch's out-of-memory error."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self._every = every
        self._calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func in ALLOCATING:
            self._calls += 1
            if self._calls % self._every == 0:
                raise torch.OutOfMemoryError("made up")
        return func(*args, **(kwargs or {}))


class FaultyEncoder:
    """Encodes no recording: returns made-up references, or raises the next of `errors` where codes are wanted."""

    def __init__(self, hidden: int, errors: Sequence[Exception] = ()) -> None:
        self._hidden = hidden
        self._errors = list(errors)

    def __call__(self, waveform: np.ndarray, wants_codes: bool) -> EncodedReference:  # noqa: FBT001 -- ReferenceCache calls it so
        """Take part in ReferenceCache."""
        del waveform
        if wants_codes and self._errors:
            raise self._errors.pop()
        embedding = torch.ones(self._hidden)
        return EncodedReference(embedding, torch.zeros(4, 16, dtype=torch.int64) if wants_codes else None)


@contextmanager
def with_encoder(
    parts: Parts, encode: Callable[[np.ndarray, bool], EncodedReference], wake: Callable[[], None]
) -> Iterator[Parts]:
    """Parts that encode references by `encode`, and keep them apart."""
    cache = ReferenceCache(encode, 1 << 20, wake)
    yield msgspec.structs.replace(parts, reference_cache=cache)
    cache.close()


class SilentCodec:
    """A codec whose waveforms are silent."""

    def __init__(self, codec: Any) -> None:
        self._codec = codec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def decode(self, *args: Any) -> Tensor:
        """Zeros in the shape of the decoded waveform."""
        return torch.zeros_like(self._codec.decode(*args))


class LastMemoryCodec(TorchFunctionMode):
    """A codec whose waveforms take the last memory: within the context, operators with new results fail after them."""

    def __init__(self, codec: Any) -> None:
        super().__init__()
        self._codec = codec
        self._full = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def decode(self, *args: Any) -> Tensor:
        """The decoded waveform."""
        waveform: Tensor = self._codec.decode(*args)
        self._full = True
        return waveform

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if self._full and isinstance(result, Tensor) and not any(result is argument for argument in args):
            raise torch.OutOfMemoryError("made up")
        return result
