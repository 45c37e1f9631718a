"""The Triton kernels on a CUDA device: each agrees with torch, and together they change no code."""

import pytest
import structlog
import torch

from gpu_worker.engines.qwen.kernels.selection import OPERATIONS, fused_kernels, select_kernels
from gpu_worker.engines.qwen.model.sampling import SamplingParams
from gpu_worker.engines.qwen.runner import CudaGraphModelRunner, rows_needed
from gpu_worker.engines.qwen.runtime.cuda_streams import CudaStreams
from tests.checkpoints import Kind
from tests.gpu_worker.engines.qwen.parity import CASES, FRAMES, GREEDY, Ours, Request, generate, greedy_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]

CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_kernel_compiles_and_agrees_with_torch(dtype: torch.dtype) -> None:
    """The check at start leaves none out. The reasons are printed."""
    with structlog.testing.capture_logs() as logs:
        kernels = select_kernels("auto", CUDA, dtype)
    assert [(one["kernel"], one["reason"]) for one in logs if one["event"] == "kernel_left_out"] == []
    assert all(getattr(kernels, name) is getattr(fused_kernels(), name) for name in OPERATIONS)


@pytest.mark.parametrize("kind", ["custom_voice", "base"])
@pytest.mark.parametrize("graphs", [True, False])
def test_codes_equal_the_official_ones(kind: Kind, *, graphs: bool) -> None:
    """In float32, requests that join and leave a batch get the official package's codes from the kernels, too."""
    numbers = [i for i, case in enumerate(CASES) if case.kind == kind and case.size is None]
    with torch.inference_mode():
        kernels = select_kernels("triton", CUDA, torch.float32)
        ours = Ours(kind, None, slots=rows_needed(8, CUDA), device="cuda", kernels=kernels)
        runner = CudaGraphModelRunner(ours.model, CudaStreams())
        if graphs:
            runner.prepare()
        requests = [
            Request(prompt=ours.prompt(CASES[number]), join=2 * place, frames=FRAMES)
            for place, number in enumerate(numbers)
        ]
        spoken = generate(ours, requests, runner)
    for codes, number in zip(spoken, numbers, strict=True):
        assert torch.equal(codes, greedy_run(number, FRAMES).codes)


def test_most_codes_of_first_frames_in_bfloat16_are_those_of_torch() -> None:
    """Rounding points are kept, so only a score within a rounding error of another changes a code, and those after it.

    In the interpreter, with the small model's flat distributions, four in five are equal. By chance none would be.
    """
    sampled = SamplingParams(greedy=False, temperature=0.9, top_k=50, top_p=1.0, repetition_penalty=1.05)
    frames = []
    with torch.inference_mode():
        for setting in ("torch", "triton"):
            kernels = select_kernels(setting, CUDA, torch.bfloat16)  # type: ignore[arg-type]
            ours = Ours("custom_voice", None, slots=9, dtype=torch.bfloat16, device="cuda", kernels=kernels)
            requests = [
                Request(prompt=ours.prompt(CASES[place % 5]), seed=place, params=(sampled, GREEDY)[place % 2], frames=1)
                for place in range(8)
            ]
            frames.append(torch.cat(generate(ours, requests, CudaGraphModelRunner(ours.model, CudaStreams()))))
    assert frames[0].shape == (8, 16)
    assert (frames[0] == frames[1]).float().mean() >= 0.5, frames
