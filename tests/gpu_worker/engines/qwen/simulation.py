"""Requests that come to an engine on a virtual device, and when their audio was handed out. Nothing is computed.

The times are estimates for a 1.7B model in bfloat16 on an H100, counted from kernels and bytes, not measured.
The counts are those of test_fake_cuda.py. A kernel of few values takes SMALL_S in a graph.
A product takes 2 µs and what its weights take at 2.0 TB/s (below 18 MB) or 2.6 TB/s.
The model gives 15 % less than a published server measured.
"""

import random
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from gpu_worker.engines.base import Job, Pcm
from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.runtime.cuda_graphs import Key
from shared.pcm import seconds_of
from shared.protocol import Sampling
from tests.gpu_worker.engines.qwen.driving import job
from tests.gpu_worker.engines.qwen.virtual_cuda import VirtualCuda

ADMIT_S = 1.3e-3
PREFILL_HOST_S = 0.8e-3
STEP_HOST_S = 0.15e-3
SMALL_S = 2.1e-6
PRODUCTS_S = {"code_predictor_step": 1.8e-3, "talker_step": 1.4e-3}
"""302 products of a frame's first half, 113 of its second."""
SAMPLE_S = {"code_predictor_step": 9e-6, "talker_step": 18e-6}
"""A guess: some 30 and 80 sums over a row, one after another, at 0.2 µs each."""
PREFILL_S = 1.7e-3
"""2.5 ms with torch's 667 kernels, less 373 small ones."""

SECONDS: Mapping[float, float] = {1: 30, 5: 12, 10: 6, 20: 4}
"""For how long requests come, by their rate."""


def device_time(key: Key) -> float:
    """Seconds of a graph on the device."""
    name, batch, length = key
    match name:
        case "code_predictor_step":
            # 75 attentions over up to 16 keys, 15 samplers, 235 small kernels.
            return PRODUCTS_S[name] + 75 * 3.5e-6 + 15 * SAMPLE_S[name] + 235 * SMALL_S + 0.005e-3 * batch
        case "talker_step":
            # 28 attentions, a sampler, 124 small kernels.
            return PRODUCTS_S[name] + 0.2e-3 + SAMPLE_S[name] + 124 * SMALL_S + 0.017e-3 * batch
        case "decode":
            # 1.1 ms with torch's 435 kernels, less 195 small ones; and half of torch's bytes for each frame.
            return 0.7e-3 + 0.015e-3 * batch * length
        case _:
            return PREFILL_S


def frame_s(batch: int) -> float:
    """Seconds of a frame on the device."""
    return device_time(("code_predictor_step", batch, 0)) + device_time(("talker_step", batch, 256))


class Heard(msgspec.Struct):
    """A request: when it came, and when each piece of its audio was handed out, in seconds."""

    came: float
    times: list[float] = []
    audio_s: list[float] = []

    @property
    def first_audio_s(self) -> float:
        return self.times[0] - self.came


def arrivals(rate: float, seconds: float, seed: int = 0) -> list[tuple[float, Job]]:
    """Requests at random moments, `rate` a second, each with 1 to 5 seconds of speech."""
    random_numbers = random.Random(seed)  # noqa: S311 -- no secret
    found: list[tuple[float, Job]] = []
    now = random_numbers.expovariate(rate)
    while now < seconds:
        frames = random_numbers.randint(12, 62)
        found.append((now, job(len(found), sampling=Sampling(seed=len(found), max_new_tokens=frames))))
        now += random_numbers.expovariate(rate)
    return found


def serve(cuda: VirtualCuda, engine: QwenEngine, requests: Sequence[tuple[float, Job]]) -> dict[str, Heard]:
    """Admit requests when they come and a slot is free, as the synthesis loop does, until all have been spoken."""
    heard = {one.id: Heard(came) for came, one in requests}
    cuda.arrivals = [came for came, _ in requests]
    waiting = list(requests)
    while waiting or engine.runnable(()):
        while waiting and waiting[0][0] <= cuda.now and engine.capacity():
            engine.admit(waiting.pop(0)[1])
            del cuda.arrivals[0]
            cuda.work(ADMIT_S + PREFILL_HOST_S)
        if not engine.runnable(()):
            cuda.wait_until(waiting[0][0])
            continue
        cuda.work(STEP_HOST_S)
        for event in engine.step(()):
            if isinstance(event, Pcm):
                heard[event.job_id].times.append(cuda.now)
                heard[event.job_id].audio_s.append(seconds_of(event.data))
    return heard


def first_audio(cuda: VirtualCuda, engine: QwenEngine, rate: float) -> tuple[float, float]:
    """First audio in seconds at `rate` requests a second: the median, and the 95th percentile."""
    start = cuda.now
    requests = [(start + after, one) for after, one in arrivals(rate, SECONDS[rate])]
    times = [one.first_audio_s for one in serve(cuda, engine, requests).values()]
    return float(np.percentile(times, 50)), float(np.percentile(times, 95))
