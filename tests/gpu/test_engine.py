"""The engine on a CUDA device, with graphs: what the CPU tests assert holds there, too."""

from collections.abc import Iterator

import pytest
import torch

from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.kernels.norm import Norm
from gpu_worker.engines.qwen.model.sampling import SamplingParams
from gpu_worker.engines.qwen.runner import CudaGraphModelRunner, rows_needed
from gpu_worker.engines.qwen.runtime.cuda_streams import CudaStreams
from shared.protocol import Sampling
from tests.checkpoints import Kind
from tests.gpu_worker.engines.qwen.driving import Outcome, assemble, clone, engine, job, parts, run, take, take_turns
from tests.gpu_worker.engines.qwen.parity import CASES, FRAMES, GREEDY, Ours, Request, generate, greedy_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]


@pytest.fixture(autouse=True, scope="module")
def _exact_products() -> Iterator[None]:
    """Products in float32 are computed in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def speaker() -> Iterator[QwenEngine]:
    """One engine on CUDA, for tests that leave it idle."""
    made = engine("custom_voice", device="cuda")
    yield made
    assert made.capacity() == 4
    made.close()


@pytest.mark.parametrize("kind", ["custom_voice", "voice_design", "base"])
@pytest.mark.parametrize("graphs", [True, False])
def test_codes_equal_the_official_ones(kind: Kind, *, graphs: bool) -> None:
    """Requests of every layout join and leave a batch; with graphs and without, the codes are the official ones."""
    numbers = [i for i, case in enumerate(CASES) if case.kind == kind and case.size is None]
    with torch.inference_mode():
        ours = Ours(kind, None, slots=rows_needed(8, torch.device("cuda")), device="cuda")
        runner = CudaGraphModelRunner(ours.model, CudaStreams())
        if graphs:
            runner.prepare()
        requests = [
            Request(prompt=ours.prompt(CASES[number]), join=2 * place, frames=FRAMES)
            for place, number in enumerate([*numbers, *numbers])
        ]
        spoken = generate(ours, requests, runner)
    for codes, number in zip(spoken, [*numbers, *numbers], strict=True):
        assert torch.equal(codes, greedy_run(number, FRAMES).codes)


def test_captured_and_uncaptured_bfloat16_agree() -> None:
    """The kernels and sizes are the same, so graphs change nothing, sampled or greedy."""
    sampled = SamplingParams(greedy=False, temperature=0.9, top_k=50, top_p=1.0, repetition_penalty=1.05)
    spoken = []
    with torch.inference_mode():
        for graphs in (False, True):
            ours = Ours("custom_voice", None, slots=9, dtype=torch.bfloat16, device="cuda")
            runner = CudaGraphModelRunner(ours.model, CudaStreams())
            if graphs:
                runner.prepare()
            requests = [
                Request(prompt=ours.prompt(CASES[place % 5]), seed=place, params=(sampled, GREEDY)[place % 2])
                for place in range(8)
            ]
            spoken.append(generate(ours, requests, runner))
    for one, other in zip(*spoken, strict=True):
        assert torch.equal(one, other)


def test_norms_round_where_the_official_ones_do() -> None:
    """They round to bfloat16 before the weight, as on a CPU.

    A kernel that rounds once, after the weight, would differ in a fifth of all values.
    A kernel that sums in another order may differ in the few values that lie between two.
    """
    x, weight = 3 * torch.randn(4096, 1024, device="cuda"), 1 + 0.2 * torch.randn(1024, device="cuda")
    x, weight = x.bfloat16(), weight.bfloat16()
    variance = x.float().square().mean(-1, keepdim=True)
    wanted = weight * (x.float() * torch.rsqrt(variance + 1e-6)).bfloat16()
    assert (Norm(weight, 1e-6)(x) != wanted).float().mean() < 0.01


def test_audio_is_the_same_alone_and_in_a_batch(speaker: QwenEngine) -> None:
    """In float32, twelve jobs that share four slots and join at odd moments give the same frames as each alone."""
    jobs = [job(number, "Hello world. " * (1 + number % 3)) for number in range(12)]
    together = run(speaker, jobs, every=3)
    for one in jobs:
        alone = run(speaker, [one])[one.id]
        assert len(together[one.id].pcm) == len(alone.pcm)
        ours, theirs = (
            torch.frombuffer(bytearray(pcm), dtype=torch.int16).int() for pcm in (together[one.id].pcm, alone.pcm)
        )
        # The decoder's kernels depend on its batch size: a sample may round the other way.
        assert (ours - theirs).abs().max() <= 1


def test_parked_jobs_lose_nothing() -> None:
    """Jobs that take turns in one slot, parked with a frame on the device and chunks being decoded."""
    speaker = engine("custom_voice", device="cuda", slots=1)
    jobs = [job(number, sampling=Sampling(seed=number, max_new_tokens=30)) for number in (3, 4, 17)]
    for steps in (1, 2, 5):
        for name, outcome in take_turns(speaker, jobs, steps).items():
            (wanted,) = run(speaker, [one for one in jobs if one.id == name]).values()
            assert outcome.pcm == wanted.pcm
    speaker.close()


def test_frame_counts_are_those_of_the_cpu(speaker: QwenEngine) -> None:
    """Running one frame ahead neither loses nor adds a frame, at a cap and at the model's own end."""
    on_cpu = engine("custom_voice")
    for number, frames in ((3, 30), (4, 1), (4, 2), (17, 9), (31, 30)):
        one = job(number, sampling=Sampling(seed=number, max_new_tokens=frames))
        assert len(run(speaker, [one])[one.id].pcm) == len(run(on_cpu, [one])[one.id].pcm)
    on_cpu.close()


def test_cancelling_and_stalling_harm_no_neighbour(speaker: QwenEngine) -> None:
    """A slot is free while its last frame is still on the device, and its next job gets nothing of that frame."""
    jobs = [job(number, sampling=Sampling(seed=17, max_new_tokens=20)) for number in range(4)]
    outcomes = {one.id: Outcome() for one in jobs}
    for one in jobs:
        speaker.admit(one)
    for number in range(4):
        take(speaker, outcomes, number, held_back=["job 3"])
    speaker.cancel("job 1")
    late = job(9)
    outcomes[late.id] = Outcome()
    speaker.admit(late)
    while not all(outcome.end for name, outcome in outcomes.items() if name != "job 1"):
        take(speaker, outcomes, 0)
    lengths = {name: len(outcome.pcm) for name, outcome in outcomes.items()}
    assert lengths["job 0"] == lengths["job 2"] == lengths["job 3"]
    assert lengths[late.id] == len(run(speaker, [late])[late.id].pcm)


def test_a_job_that_joins_never_waits_for_the_device() -> None:
    """Its prompt, prefill, frames and decodes beside a running job contain no synchronisation. Nothing is cached."""
    made = parts("custom_voice", device="cuda")
    speaker = assemble(made)
    run(speaker, [job(0)])  # libraries allocate at their first call
    outcomes = {name: Outcome() for name in ("job 1", "job 2")}
    speaker.admit(job(1))
    take(speaker, outcomes, 0)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.prompts.clear_cache()
        speaker.admit(job(2))
        while not all(outcome.end for outcome in outcomes.values()):
            take(speaker, outcomes, 0)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    speaker.close()


@pytest.mark.parametrize("kind", ["custom_voice", "base"])
def test_offloading_returns_the_memory_and_changes_no_sample(kind: Kind) -> None:
    """At least 95 % of the measured bytes are freed, and after the restore the same graphs give the same audio."""
    made = engine(kind, device="cuda")
    one = job(17) if kind == "custom_voice" else clone(17)
    before = run(made, [one])[one.id].pcm
    # The graphs' pool is counted as a whole, and its use changes; test_residency compares it with the driver's number.
    held = sum(size for purpose, size in made.memory().device.items() if purpose != "graphs")
    torch.cuda.synchronize()
    used = torch.cuda.memory_allocated()
    made.offload()
    assert used - torch.cuda.memory_allocated() >= 0.95 * held
    made.restore()
    assert run(made, [one])[one.id].pcm == before
    made.close()
