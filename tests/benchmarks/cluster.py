"""A cluster of GPUs in virtual time, without Ray: `python -m tests.benchmarks.cluster`.

Requests for five models come to routers, which send each to a GPU. The table compares three ways to choose it:

- chosen: the functions of server/cluster/ranking.py and replica_estimates.py, the same that the cluster uses.
  The figures of the GPUs come once a second. Each of ROUTERS routers knows these, and its own requests since then.
- random: any GPU.
- least loaded: the GPU with the fewest running and queued requests, known exactly and at once.

Nothing was measured on a GPU: the times are estimates for 1.7B in bfloat16 on an H100 with 80 GB.

- A frame of 80 ms takes FRAME_S alone and FRAME_S + 63 * FRAME_PER_STREAM_S = 7.1 ms beside 63 others. Counted from the
  kernels of the engine and the bytes of its products, it is 4.6 ms and 6.0 ms; 64 streams of the vocoder take a fifth
  of the device besides.
- A slot holds 4,096 tokens of 28 layers, 8 heads of 128 keys and values in bfloat16: 112 KiB each, 448 MiB in all. So a
  model with 64 slots takes 28 GiB and its weights, and a GPU with 80 GB has room for two models of five.
- A restore takes RESTORE_S: 4.1 GB over PCIe at 25 GB/s, 0.16 s; 18,000 kernels captured at some 8 µs of the host
  each, 0.15 s; their graphs instantiated, and a first job, 0.2 s.
- A load takes LOAD_S: 4.1 GB read at 2 GB/s, and each captured function called once more, before what a restore takes.
- An eviction takes OFFLOAD_S, the same bytes over PCIe. Host RAM holds all models that have left a GPU.

The traffic:

- The models have shares by Zipf's law: 1, 1/2, 1/3, 1/4, 1/5.
- Each share rises and falls by WAVE in a day, and every model has its peak at another time of the day. The day is
  squeezed into DAY_S, so shares move as many times faster as the day is shorter: loads and evictions are upper bounds.
- A request is a text of MEAN_AUDIO_S of speech on average (exponential). STREAMS of them come together, from one client
  that sent its text in pieces; they are one request here. On average the requests take UTILIZATION of all slots.
- The queue of a GPU has 64 places. A model that is idle for 300 s leaves the GPU.
"""

import argparse
import heapq
import itertools
import math
import random
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import msgspec

from server.cluster.ranking import Replica, ReplicaModel, Residence, rank
from server.cluster.replica_estimates import ReplicaEstimates
from shared.settings import ReplicaBounds

Policy = Literal["chosen", "random", "least loaded"]
POLICIES: Final[tuple[Policy, ...]] = ("chosen", "random", "least loaded")
SECONDS: Final = {8: 3600.0, 64: 3600.0, 512: 300.0}
"""How long each size is simulated: a whole day, or a twelfth of it."""

FRAME_S: Final = 4.6e-3
FRAME_PER_STREAM_S: Final = 0.04e-3
FRAME_AUDIO_S: Final = 0.08
RESTORE_S: Final = 0.5
LOAD_S: Final = 2.8
OFFLOAD_S: Final = 0.2

STREAMS: Final = 8
SLOTS: Final = 64 // STREAMS
QUEUE: Final = 64 // STREAMS
MODEL_BYTES: Final = 33 * 2**30
ROOM_BYTES: Final = 2 * MODEL_BYTES
IDLE_TIMEOUT_S: Final = 300.0
SHORTAGE_WAIT_S: Final = 30.0

MODELS: Final = tuple(f"model-{number}" for number in range(1, 6))
WAVE: Final = 0.8
DAY_S: Final = 3600.0
MEAN_AUDIO_S: Final = 120.0
UTILIZATION: Final = 0.5

ROUTERS: Final = 4
TRIES: Final = 3
FIGURES_S: Final = 1.0
WARM_UP: Final = 0.25
"""The part of the time in front of which nothing counts: at first all GPUs are empty."""


class Request(msgspec.Struct):
    """One request of STREAMS streams."""

    id: str
    model: str
    router: int
    audio_s: float
    at: float


class Figures(msgspec.Struct):
    """The figures behind the warm-up."""

    requests: int = 0
    hits: int = 0
    refused: int = 0
    loads: int = 0
    evictions: int = 0
    waits_s: list[float] = []


class Model(msgspec.Struct):
    """One model on one GPU."""

    residence: Residence | None = None
    requests: int = 0
    last_used: float = 0.0
    short_since: float | None = None


class Gpu:
    """One GPU worker: a queue, slots, and models that come and go as gpu_worker/residency/policy.py has it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.running = 0
        self.queue: deque[Request] = deque()
        self.models = {model: Model() for model in MODELS}
        self.moving: tuple[str, Residence] | None = None
        """The model, and where it will be."""

    def free_bytes(self) -> int:
        """Those that no model takes; one that leaves takes them until it is gone."""
        held = sum(model.residence in {"resident", "loading"} for model in self.models.values())
        held += self.moving is not None and self.moving[1] == "offloaded"
        return ROOM_BYTES - held * MODEL_BYTES

    def figures(self) -> Replica:
        """The figures that this worker's replica sends its routers."""
        models = {
            name: ReplicaModel(
                residence="waiting" if model.requests and model.residence in {None, "offloaded"} else model.residence,
                device_bytes=MODEL_BYTES if model.residence in {"resident", "loading"} else 0,
                requests=model.requests,
                last_used=model.last_used,
            )
            for name, model in self.models.items()
            if model.residence is not None or model.requests
        }
        return Replica(
            id=self.name,
            slots=SLOTS,
            running=self.running,
            queued=len(self.queue),
            free_bytes=self.free_bytes(),
            models=models,
        )


class Cluster:
    """GPUs, routers and the clock."""

    def __init__(self, gpus: int, policy: Policy, *, seconds: float, seed: int = 1) -> None:
        self._policy = policy
        self._traffic = random.Random(seed)  # noqa: S311 -- not for cryptography
        self._choices = random.Random(seed)  # noqa: S311
        self._gpus = {f"gpu-{number}": Gpu(f"gpu-{number}") for number in range(gpus)}
        self._routers = [ReplicaEstimates(dict.fromkeys(MODELS, MODEL_BYTES)) for _ in range(ROUTERS)]
        self._seconds = seconds
        self._events: list[tuple[float, int, tuple[object, ...]]] = []
        self._number = itertools.count()
        self._changed = set(self._gpus)
        self._sent_figures: dict[str, Replica] = {}
        self.now = 0.0
        self.figures = Figures()

    def run(self) -> Figures:
        """All requests of the time, from arrival to end."""
        arrivals = self._arrivals()
        self._later(0.0, ("figures",))
        self._later(0.0, ("arrival", next(arrivals)))
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            match event:
                case ("arrival", Request() as request):
                    self._arrive(request)
                    if (following := next(arrivals, None)) is not None:
                        self._later(following.at, ("arrival", following))
                case ("finished", Gpu() as gpu, Request() as request):
                    self._finish(gpu, request)
                case ("moved", Gpu() as gpu):
                    self._moved(gpu)
                case _:
                    self._send_figures()
        return self.figures

    def _later(self, at: float, event: tuple[object, ...]) -> None:
        heapq.heappush(self._events, (at, next(self._number), event))

    def _arrivals(self) -> Iterator[Request]:
        """Poisson processes of changing rates, by thinning."""
        shares = [1 / place for place in range(1, len(MODELS) + 1)]
        service_s = MEAN_AUDIO_S / FRAME_AUDIO_S * (FRAME_S + 63 * FRAME_PER_STREAM_S)
        rate = len(self._gpus) * SLOTS / service_s * UTILIZATION
        at = 0.0
        for number in itertools.count():
            at += self._traffic.expovariate(rate * (1 + WAVE))
            if at >= self._seconds:
                return
            model = self._traffic.choices(range(len(MODELS)), shares)[0]
            wave = 1 + WAVE * math.sin(2 * math.pi * (at / DAY_S + model / len(MODELS)))
            if self._traffic.random() * (1 + WAVE) < wave:
                audio_s = self._traffic.expovariate(1 / MEAN_AUDIO_S)
                yield Request(str(number), MODELS[model], self._traffic.randrange(ROUTERS), audio_s, at)

    def _counts(self, request: Request) -> bool:
        return request.at >= WARM_UP * self._seconds

    # --- routers -----------------------------------------------------------------------------------------------------

    def _arrive(self, request: Request) -> None:
        """Send the request to a GPU; one that refuses it is tried no more."""
        avoid: list[str] = []
        for _ in range(TRIES):
            gpu = self._choose(request, avoid)
            if len(gpu.queue) < QUEUE + max(0, SLOTS - gpu.running):
                break
            avoid.append(gpu.name)
            self._routers[request.router].done(request.id)
        else:
            self._refuse(request)
            return
        if self._counts(request):
            self.figures.requests += 1
            self.figures.hits += gpu.models[request.model].residence == "resident"
        gpu.queue.append(request)
        gpu.models[request.model].requests += 1
        self._turn(gpu)

    def _choose(self, request: Request, avoid: Sequence[str]) -> Gpu:
        gpus = [gpu for gpu in self._gpus.values() if gpu.name not in avoid] or list(self._gpus.values())
        match self._policy:
            case "random":
                return self._choices.choice(gpus)
            case "least loaded":
                fewest = min(gpu.running + len(gpu.queue) for gpu in gpus)
                return self._choices.choice([gpu for gpu in gpus if gpu.running + len(gpu.queue) == fewest])
        estimates = self._routers[request.router]
        ranked = rank(
            request.model,
            estimates.replicas,
            needed_bytes=MODEL_BYTES,
            now=self.now,
            bounds=ReplicaBounds(),
            avoid=avoid,
        )
        estimates.sent(request.id, ranked[0].id, request.model, self.now, confirmed=True)
        return self._gpus[ranked[0].id]

    def _send_figures(self) -> None:
        for gpu in self._gpus.values():
            self._leave_if_idle(gpu)
        if self._policy == "chosen":
            self._sent_figures |= {name: self._gpus[name].figures() for name in self._changed}
            self._changed.clear()
            for estimates in self._routers:
                for replica in self._sent_figures.values():
                    estimates.update(replica, self.now)
        if self.now < self._seconds:
            self._later(self.now + FIGURES_S, ("figures",))

    # --- GPU workers -------------------------------------------------------------------------------------------------

    def _turn(self, gpu: Gpu) -> None:
        self._changed.add(gpu.name)
        self._give_slots(gpu)
        if gpu.moving is None:
            self._move(gpu)

    def _give_slots(self, gpu: Gpu) -> None:
        waiting: deque[Request] = deque()
        while gpu.queue:
            request = gpu.queue.popleft()
            if gpu.running >= SLOTS or gpu.models[request.model].residence != "resident":
                waiting.append(request)
                continue
            gpu.running += 1
            if self._counts(request):
                self.figures.waits_s.append(self.now - request.at)
            frame_s = FRAME_S + (gpu.running * STREAMS - 1) * FRAME_PER_STREAM_S
            self._later(self.now + request.audio_s / FRAME_AUDIO_S * frame_s, ("finished", gpu, request))
        gpu.queue = waiting

    def _move(self, gpu: Gpu) -> None:
        """Begin the next load, or the eviction that makes room for it; refuse what waits in vain."""
        for name in dict.fromkeys(request.model for request in gpu.queue):
            model = gpu.models[name]
            if model.residence == "resident":
                continue
            if gpu.free_bytes() >= MODEL_BYTES:
                load_s = RESTORE_S if model.residence == "offloaded" else LOAD_S
                self._begin(gpu, name, "resident", load_s)
                model.short_since = None
                self._count_move("loads")
                return
            idle = [other for other in gpu.models if self._is_idle(gpu.models[other])]
            if idle:
                victim = min(idle, key=lambda other: gpu.models[other].last_used)
                self._begin(gpu, victim, "offloaded", OFFLOAD_S)
                self._count_move("evictions")
                return
            model.short_since = self.now if model.short_since is None else model.short_since
            if self.now - model.short_since >= SHORTAGE_WAIT_S:
                model.short_since = None
                for request in [request for request in gpu.queue if request.model == name]:
                    gpu.queue.remove(request)
                    model.requests -= 1
                    self._refuse(request)
                    self._routers[request.router].done(request.id)

    def _count_move(self, name: Literal["loads", "evictions"]) -> None:
        if self.now >= WARM_UP * self._seconds:
            setattr(self.figures, name, getattr(self.figures, name) + 1)

    def _is_idle(self, model: Model) -> bool:
        return model.residence == "resident" and not model.requests

    def _begin(self, gpu: Gpu, name: str, then: Literal["resident", "offloaded"], seconds: float) -> None:
        gpu.models[name].residence = "loading" if then == "resident" else "offloaded"
        gpu.moving = name, then
        self._later(self.now + seconds, ("moved", gpu))

    def _moved(self, gpu: Gpu) -> None:
        assert gpu.moving is not None
        name, then = gpu.moving
        gpu.models[name].residence = then
        gpu.moving = None
        self._turn(gpu)

    def _finish(self, gpu: Gpu, request: Request) -> None:
        gpu.running -= 1
        model = gpu.models[request.model]
        model.requests -= 1
        model.last_used = self.now
        self._routers[request.router].done(request.id)
        self._turn(gpu)

    def _leave_if_idle(self, gpu: Gpu) -> None:
        for model in gpu.models.values():
            if self._is_idle(model) and self.now - model.last_used > IDLE_TIMEOUT_S:
                model.residence = "offloaded"
                self._changed.add(gpu.name)
        if gpu.queue:
            self._turn(gpu)

    def _refuse(self, request: Request) -> None:
        if self._counts(request):
            self.figures.refused += 1


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cluster", description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[*SECONDS])
    parser.add_argument("--seconds", type=float, help="how long each size is simulated; the default is by size")
    arguments = parser.parse_args()
    print(
        "| GPUs | policy | requests | model resident | wait s p50 / p95 | refused | evictions an hour | loads an hour |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for gpus in arguments.gpus:
        seconds = arguments.seconds or SECONDS.get(gpus, DAY_S)
        hours = seconds * (1 - WARM_UP) / 3600
        for policy in POLICIES:
            figures = Cluster(gpus, policy, seconds=seconds).run()
            waits = statistics.quantiles(figures.waits_s, n=100)
            print(
                f"| {gpus} | {policy} | {figures.requests:,} | {figures.hits / figures.requests:.2%} "
                f"| {waits[49]:.2f} / {waits[94]:.2f} | {figures.refused:,} "
                f"| {figures.evictions / hours:,.0f} | {figures.loads / hours:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
