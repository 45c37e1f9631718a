"""The stages of a step: their times, their floors by memory bandwidth, and the number of kernels.

On CPU a stage is timed by the host's clock. On a GPU a call returns before its stage ends: CUDA events time it.
The floor counts bytes alone: every weight is read once a forward, keys and values once a frame, at the bandwidth of a
copy on this device. No step reaches the floor, and arithmetic rather than memory limits a large codec batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from gpu_worker.engines.qwen.engine import QwenEngine

Clock = Callable[[], float]
"""Returns seconds that never decrease."""

COPY_BYTES: Final = {"cuda": 2 << 30, "cpu": 256 << 20}
"""Far more than any cache."""

WARM_UP_STEPS: Final = 8

_GRAPHS: Final = {
    "code_predictor_step": "code predictor",
    "talker_step": "talker",
    "prefill": "prefill",
    "decode": "codec",
}
"""The stages' names in the table, by captured function."""


@contextmanager
def staged(engine: QwenEngine, clock: Clock) -> Iterator[dict[str, float]]:
    """Time the stages of every step inside the `with` block; at its end the dict has the seconds by stage."""
    stages: dict[str, float] = {}
    with _events(engine, stages) if engine._cuda else _calls(engine, stages, clock):
        yield stages


@contextmanager
def _calls(engine: QwenEngine, stages: dict[str, float], clock: Clock) -> Iterator[None]:
    parts = engine._parts
    runner: Any = parts.runner
    model = runner._model
    spots: Sequence[tuple[Any, str, str]] = (
        (model, "prefill", "prefill"),
        (runner._traces, "run", "code predictor"),
        (model, "talker_step", "talker"),
        (parts.vocoder, "decode", "codec"),
    )
    for owner, name, stage in spots:
        setattr(owner, name, _timed(getattr(owner, name), stages, stage, clock))
    kernels = model._kernels
    sample = _timed(kernels.next_codebook0, stages, "of which sampling", clock)
    model._kernels = msgspec.structs.replace(kernels, next_codebook0=sample)
    try:
        yield
    finally:
        model._kernels = kernels
        for owner, name, _ in spots:
            delattr(owner, name)


def _timed(function: Callable[..., Any], stages: dict[str, float], stage: str, clock: Clock) -> Callable[..., Any]:
    stages[stage] = 0.0

    def call(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        try:
            return function(*args, **kwargs)
        finally:
            stages[stage] += clock() - start

    return call


@contextmanager
def _events(engine: QwenEngine, stages: dict[str, float]) -> Iterator[None]:
    """Record events around every replay, on its stream. They are read at the end, so that no step waits for them."""
    parts = engine._parts
    runner: Any = parts.runner
    graphs = (runner._buckets, parts.vocoder._buckets)
    spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    for owner in graphs:
        replay = owner.run

        def run(key: Any, function: Callable[[], None], replay: Callable[..., None] = replay) -> None:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            replay(key, function)
            end.record()
            spans.append((_GRAPHS[key[0]], begin, end))

        setattr(owner, "run", run)  # noqa: B010 -- mypy refuses assignment to a method
    try:
        yield
    finally:
        for owner in graphs:
            del owner.run
        torch.cuda.synchronize()
        for stage, begin, end in spans:
            stages[stage] = stages.get(stage, 0.0) + begin.elapsed_time(end) / 1000


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes a second of a copy within the device's memory, read and written; the best of five."""
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        start = clock()
        target.copy_(source)
        _wait(device)
        best = min(best, clock() - start)
    return 2 * source.nbytes / best


def floors_ms(engine: QwenEngine, streams: int, context: int, *, chunk: int, bandwidth: float) -> dict[str, float]:
    """Milliseconds a frame of all streams, by stage, if only reading the bytes took time.

    `context`: tokens in each stream's cache; `chunk`: frames of each stream in one decoder call.
    """
    parts = engine._parts
    runner: Any = parts.runner
    model = runner._model
    talker, predictor = model.talker, model.code_predictor
    cache = list(talker.cache.tensors())
    token = sum(_bytes([tensor]) // (tensor.shape[0] * tensor.shape[1]) for tensor in cache)
    heads = _bytes(tensor for head in predictor.heads for tensor in head.tensors())
    known = _bytes(predictor.stack.layers[0].qkv.tensors())
    forwards = predictor.groups - 1
    read = {
        # Each forward reads the stack; only the first one reads the first layer's projections; one reads each head.
        "code predictor": forwards * _bytes(predictor.stack.tensors()) - (forwards - 1) * known + heads,
        "talker": _bytes(talker.stack.tensors()) + _bytes(talker.head.tensors()) + streams * context * token,
        "codec": _bytes(parts.vocoder._codec._decoder.tensors()) / chunk,
    }
    return {part: 1000 * size / bandwidth for part, size in read.items()}


def launches(engine: QwenEngine, steps: int) -> float:
    """Kernels (on CPU: operators) that one step launches; the mean over `steps` steps of running jobs."""
    cuda = engine._cuda
    for _ in range(WARM_UP_STEPS):
        engine.step(())
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if cuda else [activity.CPU]) as profile:
        for _ in range(steps):
            engine.step(())
        if cuda:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profile.events() or () if event.device_type == kind]
    return sum(cuda or (_is_operator(event) and not _is_operator(event.cpu_parent)) for event in events) / steps


def _is_operator(event: Any) -> bool:
    """Whether an event of the profile is an operator."""
    return event is not None and event.name.startswith("aten::")


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors; a tensor that shares its storage (a weight and its transpose) counts once."""
    once = {id(x) if x.is_mkldnn else x.data_ptr(): x for x in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in once.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
