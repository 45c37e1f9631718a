"""The reference for sampling: Transformers' processors, and the inverse of their distribution."""

import functools
import importlib
from typing import Any

import torch

from gpu_worker.engines.qwen.kernels.next_codebook0 import SamplingTensors

VOCABULARY = 2049


def parameters(rows: int, *, temperature: float, top_k: int, top_p: float, uniform: torch.Tensor) -> SamplingTensors:
    """The same parameters for every row."""
    return SamplingTensors(
        torch.full((rows, 1), temperature),
        torch.full((rows, 1), top_k - 1),
        torch.full((rows, 1), top_p),
        torch.ones(rows, 1),
        uniform,
    )


@functools.cache
def logits_processors() -> Any:
    """Those of Transformers: their import takes seconds, which a process that only collects this file is spared."""
    return importlib.import_module("transformers.generation.logits_process")


def official(scores: torch.Tensor, *, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The probabilities that Transformers' processors leave."""
    made = logits_processors()
    processors = made.LogitsProcessorList([made.TemperatureLogitsWarper(temperature), made.TopKLogitsWarper(top_k)])
    if top_p < 1:
        processors.append(made.TopPLogitsWarper(top_p))
    return processors(torch.zeros(len(scores), 0, dtype=torch.int64), scores).softmax(-1)


def inverse(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The ids that the uniforms choose by the inverse of the cumulative distribution, best first."""
    values, ids = probabilities.sort(descending=True, stable=True)
    cumulative = values.double().cumsum(-1)
    return ids.gather(1, torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True))[:, 0]
