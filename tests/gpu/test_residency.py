"""Models move beside running jobs; memory is the driver's own number. Tests that need no GPU run on the CPU as well."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from gpu_worker.engines.base import Job, Pcm
from gpu_worker.engines.qwen.build import QwenOptions, open_engine
from gpu_worker.engines.qwen.codec.shared_codecs import SharedCodecs
from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.model.qwen3_tts import Qwen3TTSModel
from gpu_worker.residency import open_probe
from shared.protocol import Sampling, Segment
from tests.checkpoints import tiny, write
from tests.gpu_worker.engines.qwen.driving import Outcome, engine, job, run, shared, take, untraced

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
pytestmark = pytest.mark.timeout(1800)

Device = Literal["cpu", "cuda"]
MIB = 2**20

MOST_SILENT_S = 0.25
"""The longest that a stream may wait for its next PCM while another model moves."""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CustomVoice checkpoint of 1.7B parameters."""
    directory = tmp_path_factory.mktemp("full") / "checkpoint"
    write(directory, "custom_voice", "1b7", full=True)
    return directory


@pytest.fixture
def loader() -> Iterator[ThreadPoolExecutor]:
    """The one thread that opens and moves engines, as in the worker."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        yield thread


def used(device: Device) -> int:
    """Bytes in use, with all caches returned: on CUDA the driver's number, on CPU the kernel's for this process."""
    probe = open_probe(device)
    probe.reclaim(collect=True)
    reading = probe.device()
    return reading.used_bytes if device == "cuda" else reading.ours_bytes


def cuda_options(checkpoint: Path) -> QwenOptions:
    """The worker's options on a GPU. The checkpoint's codec is loaded and stays."""
    codecs = SharedCodecs(dtype=torch.bfloat16, device=torch.device("cuda"))
    codecs.acquire(checkpoint)
    return QwenOptions(codecs=codecs, device="cuda", slots=8)


def moves(speaker: QwenEngine) -> None:
    """To the host and back, as the worker's mover does it."""
    probe = open_probe("cuda")
    speaker.offload()
    probe.reclaim(collect=False)
    speaker.restore()
    probe.reclaim(collect=False)


@on_cuda
def test_offload_returns_the_bytes_and_restore_speaks(
    device: Device, full: Path, loader: ThreadPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the driver's bytes that loading 1.7B took, graphs included, 95 % go back. Prints the time to a frame."""
    options = loader.submit(cuda_options, full).result()
    # Kernels, handles and workspaces of the first load stay for good: they belong to the process, not to the model.
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
    made.admit(
        Job(id="a", task="CustomVoice", segments=[Segment(text="Good morning.")], voice="ryan", sampling=sampling)
    )
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
    """While a model of 1.7B moves there and back, no stream waits longer than MOST_SILENT_S. Prints the waits."""
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
    """No sample changes while another engine is offloaded, restored, closed and opened: they share no memory."""

    def opened() -> QwenEngine:
        return engine("custom_voice", device=device, slots=slots)

    def disturb() -> None:
        nonlocal other
        for _ in range(3 if device == "cuda" else 1):
            other.offload()
            other.restore()
            other.close()
            other = opened()

    frames, slots = (60, 4) if device == "cuda" else (20, 1)
    speaker, other = (loader.submit(opened).result() for _ in range(2))
    jobs = [job(number, sampling=Sampling(seed=number, max_new_tokens=frames)) for number in range(slots + 1)]
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
    """An engine moves to the host and back, and others are opened and closed: the memory in use does not grow."""
    cycles, engines, slots = (10, 5, 4) if device == "cuda" else (3, 2, 1)
    made = loader.submit(engine, "custom_voice", device=device, slots=slots).result()
    offloaded, closed = [], []
    for _ in range(cycles):
        loader.submit(made.offload).result()
        offloaded.append(used(device))
        loader.submit(made.restore).result()
    loader.submit(made.close).result()
    for _ in range(engines):
        loader.submit(lambda: engine("base", device=device, slots=slots).close()).result()
        closed.append(used(device))
    # The first ones on a GPU bring in kernels and workspaces, which stay.
    assert offloaded[-1] - offloaded[min(2, cycles - 2)] <= 16 * MIB
    assert closed[-1] - closed[min(1, engines - 2)] <= 16 * MIB


@on_cuda
@pytest.mark.parametrize("error", ["out of memory", "not allowed"])
def test_a_failed_capture_leaves_everything_as_before(
    device: Device, error: str, loader: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a restore fails at a capture, its memory is freed, another engine speaks on, and the next restore succeeds.

    A capture stays valid if memory runs out. CUDA invalidates it after a call that is not allowed in a capture.
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
    talker_step = Qwen3TTSModel.talker_step

    def failing(self: Qwen3TTSModel, *args: Any, **kwargs: Any) -> None:
        talker_step(self, *args, **kwargs)
        if torch.cuda.is_current_stream_capturing():
            if error == "out of memory":
                raise torch.OutOfMemoryError("made up")
            torch.cuda.synchronize()

    monkeypatch.setattr(Qwen3TTSModel, "talker_step", failing)
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
@untraced()
def test_the_codec_goes_with_the_last_engine(device: Device) -> None:
    """Its bytes are counted with none of the engines."""
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
