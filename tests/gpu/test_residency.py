"""Moving models beside those that speak, by the driver's own number. What needs no GPU runs on the CPU as well."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from gpu_worker.engines.base import Job, Pcm, Sampling
from gpu_worker.engines.qwen.build import QwenOptions, open_engine
from gpu_worker.engines.qwen.codec.shared_codecs import SharedCodecs
from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.runtime import cuda_graphs
from gpu_worker.residency import open_probe
from tests.checkpoints import tiny, write
from tests.gpu_worker.engines.qwen.driving import Outcome, engine, job, run, shared, take

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
pytestmark = pytest.mark.timeout(1800)

Device = Literal["cpu", "cuda"]
MIB = 2**20

MOST_SILENT_S = 0.25
"""A stream that speaks may wait for the next piece so long while another model moves."""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 1.7B, CustomVoice."""
    directory = tmp_path_factory.mktemp("full") / "checkpoint"
    write(directory, "custom_voice", "1b7", full=True)
    return directory


@pytest.fixture
def loader() -> Iterator[ThreadPoolExecutor]:
    """The one thread that opens and moves, as in the worker."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        yield thread


def used(device: Device) -> int:
    """Bytes in use as the driver says, or the kernel of this process, with nothing kept back for later."""
    probe = open_probe(device)
    probe.reclaim(collect=True)
    reading = probe.device()
    return reading.used_bytes if device == "cuda" else reading.ours_bytes


def cuda_options(checkpoint: Path) -> QwenOptions:
    """As the worker opens engines on a GPU, the checkpoint's codec being there and staying."""
    codecs = SharedCodecs(dtype=torch.bfloat16, device=torch.device("cuda"))
    codecs.acquire(checkpoint)
    return QwenOptions(codecs=codecs, device="cuda", slots=8)


def moves(speaker: QwenEngine) -> None:
    """There and back, as the worker's loader does it."""
    probe = open_probe("cuda")
    speaker.offload()
    probe.reclaim(collect=False)
    speaker.restore()
    probe.reclaim(collect=False)


@on_cuda
def test_offload_returns_the_bytes_and_restore_speaks(
    device: Device, full: Path, loader: ThreadPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what loading 1.7B took from the driver, graphs included, 95 % go back; the time until it speaks is printed."""
    options = loader.submit(cuda_options, full).result()
    # What the first load brings for good (kernels, handles, workspaces) is the process's, not the model's.
    loader.submit(lambda: open_engine(full, options).close()).result()
    before = used(device)
    made = loader.submit(open_engine, full, options).result()
    taken = used(device) - before
    counted = made.memory().device
    loader.submit(made.offload).result()
    left = used(device) - before
    host = sum(made.memory().host.values())

    began = time.monotonic()
    loader.submit(made.restore).result()
    sampling = Sampling(seed=1, max_new_tokens=4)
    made.admit(Job(id="a", task="CustomVoice", text="Good morning.", voice="ryan", sampling=sampling))
    while not any(isinstance(event, Pcm) for event in made.step(())):
        assert made.runnable(())
    first_frame_ms = (time.monotonic() - began) * 1000
    loader.submit(made.close).result()
    with capsys.disabled():
        purposes = ", ".join(f"{purpose} {size / MIB:.0f}" for purpose, size in counted.items())
        print(  # noqa: T201 -- the figures
            f"\n1.7B took {taken / MIB:.0f} MiB of the driver's (counted: {purposes}); "
            f"offloaded it keeps {left / MIB:.0f} MiB, and {host / MIB:.0f} MiB of the host; "
            f"restore to first frame: {first_frame_ms:.0f} ms"
        )
    assert left <= 0.05 * taken
    assert counted["graphs"] > 0
    assert sum(counted.values()) >= 0.8 * taken
    assert counted["weights"] <= host <= counted["weights"] + 32 * MIB
    assert used(device) - before <= 0.05 * taken


@on_cuda
def test_moving_a_model_makes_no_other_fall_silent(
    device: Device, full: Path, loader: ThreadPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    """While one of 1.7B goes and comes back, none of the streams of another waits longer than it may; printed."""
    assert device == "cuda"
    options = loader.submit(cuda_options, full).result()
    moved, speaker = (loader.submit(open_engine, full, options).result() for _ in range(2))
    numbers = itertools.count()
    heard: dict[str, float] = {}
    gaps: dict[str, float] = {"undisturbed": 0.0, "beside moves": 0.0}

    def speak_while(going_on: Callable[[], bool], when: str) -> None:
        while going_on():
            while speaker.capacity() > 4:
                speaker.admit(job(next(numbers), sampling=Sampling(seed=next(numbers), max_new_tokens=400)))
            for event in speaker.step(()):
                now = time.monotonic()
                if isinstance(event, Pcm) and event.job_id in heard:
                    gaps[when] = max(gaps[when], now - heard[event.job_id])
                heard[event.job_id] = now

    until = time.monotonic() + 5
    speak_while(lambda: time.monotonic() < until, "undisturbed")
    moving: Future[Any] = loader.submit(lambda: [moves(moved) for _ in range(3)])
    speak_while(lambda: not moving.done(), "beside moves")
    moving.result()
    for name in [f"job {number}" for number in range(next(numbers))]:
        speaker.cancel(name)
    for one in (moved, speaker):
        loader.submit(one.close).result()
    with capsys.disabled():
        print(f"\nlongest wait of 4 streams: {', '.join(f'{s * 1000:.0f} ms {w}' for w, s in gaps.items())}")  # noqa: T201 -- the figure
    assert gaps["beside moves"] <= MOST_SILENT_S


@on_both
def test_speech_beside_moves_is_the_same(device: Device, loader: ThreadPoolExecutor) -> None:
    """Not a sample changes while another engine is offloaded, restored, closed and opened: they share no scratch."""

    def opened() -> QwenEngine:
        return engine("custom_voice", device=device)

    def disturb() -> None:
        nonlocal other
        for _ in range(3 if device == "cuda" else 1):
            other.offload()
            other.restore()
            other.close()
            other = opened()

    speaker, other = (loader.submit(opened).result() for _ in range(2))
    jobs = [job(number, sampling=Sampling(seed=number, max_new_tokens=60)) for number in range(4)]
    alone = run(speaker, jobs)
    moving = loader.submit(disturb)
    beside = []
    while not beside or not moving.done():
        beside.append(run(speaker, jobs))
    moving.result()
    for outcomes in (*beside, run(other, jobs)):
        for name, outcome in outcomes.items():
            assert outcome.pcm == alone[name].pcm
    for one in (speaker, other):
        loader.submit(one.close).result()


@on_both
def test_cycles_do_not_grow(device: Device, loader: ThreadPoolExecutor) -> None:
    """Ten times to the host and back, and five engines opened and closed: the memory in use stays what it was."""
    made = loader.submit(engine, "custom_voice", device=device).result()
    offloaded, closed = [], []
    for _ in range(10):
        loader.submit(made.offload).result()
        offloaded.append(used(device))
        loader.submit(made.restore).result()
    loader.submit(made.close).result()
    for _ in range(5):
        loader.submit(lambda: engine("base", device=device).close()).result()
        closed.append(used(device))
    assert offloaded[-1] - offloaded[2] <= 16 * MIB
    assert closed[-1] - closed[1] <= 16 * MIB


@on_cuda
@pytest.mark.parametrize("trouble", ["out of memory", "not allowed"])
def test_a_failed_recording_leaves_all_as_before(
    device: Device, trouble: str, loader: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a restore: memory is back where it was, another engine speaks on, and the next restore succeeds.

    Where memory runs out the recording is sound; after a call that is not allowed in one CUDA has given it up.
    """
    made, other = (loader.submit(engine, "custom_voice", device=device).result() for _ in range(2))
    jobs = [job(number) for number in range(2)]
    before = {name: outcome.pcm for name, outcome in run(made, jobs).items()}
    loader.submit(moves, made).result()
    loader.submit(made.offload).result()
    offloaded = used(device)
    outcomes = {one.id: Outcome() for one in jobs}
    for one in jobs:
        other.admit(one)
    take(other, outcomes, 0)
    record = cuda_graphs._record
    recorded = itertools.count()

    def failing(function: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
        def fail() -> None:
            function()
            if trouble == "out of memory":
                raise torch.OutOfMemoryError("made up")
            torch.cuda.synchronize()

        return record(fail if next(recorded) == 3 else function, pool)

    monkeypatch.setattr(cuda_graphs, "_record", failing)
    with pytest.raises(RuntimeError):
        loader.submit(made.restore).result()
    monkeypatch.undo()
    loader.submit(made.offload).result()
    assert used(device) - offloaded <= 16 * MIB
    while not all(outcome.end for outcome in outcomes.values()):
        take(other, outcomes, 0)
    assert {name: outcome.pcm for name, outcome in outcomes.items()} == before
    loader.submit(made.restore).result()
    assert {name: outcome.pcm for name, outcome in run(made, jobs).items()} == before
    for one in (made, other):
        loader.submit(one.close).result()


@on_both
def test_the_codec_goes_with_the_last_engine(device: Device) -> None:
    """And is not counted with any of them."""
    codecs = SharedCodecs(dtype=torch.float32, device=torch.device(device))
    options = QwenOptions(codecs=codecs, device=device, slots=1, max_model_len=256, streams=shared(device).streams)
    engines = [open_engine(tiny(kind), options) for kind in ("custom_voice", "base")]
    assert codecs.bytes > 0
    allocated = torch.cuda.memory_allocated()
    held = codecs.bytes
    for made in engines:
        assert "codec" not in made.memory().device
        made.close()
    assert codecs.bytes == 0
    if device == "cuda":
        assert allocated - torch.cuda.memory_allocated() >= held
