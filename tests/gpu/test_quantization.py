"""Quantised weights on a CUDA device: the kernel beside its reference, a row in any company, and an engine's moves."""

import pytest
import torch

from gpu_worker.engines.qwen.kernels import selection
from gpu_worker.engines.qwen.kernels.quantized_linear import quantize
from gpu_worker.engines.qwen.runtime.cuda_products import FP8_CAPABILITY, KINDS, Quantization
from shared.protocol import Sampling
from tests.checkpoints import wide
from tests.gpu_worker.engines.qwen.driving import engine, job, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]

CUDA = torch.device("cuda")


def needed(quantization: str) -> torch.dtype:
    """The dtype of the weights; the test skips where the device has none such."""
    if quantization == "fp8" and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("float8 needs compute capability 8.9")
    return KINDS[quantization]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_the_kernel_agrees_with_torch(quantization: str, dtype: torch.dtype) -> None:
    """The check at start."""
    assert selection.quantized_linear_problem(needed(quantization), CUDA, dtype) is None


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize(("outputs", "inputs"), [(1024, 2048), (4096, 1024), (12288, 2048)])
def test_a_row_is_the_same_in_any_company(quantization: str, outputs: int, inputs: int) -> None:
    """Bit for bit at published sizes: alone, in every batch size, and in a prefill of four prompts."""
    weight, scale = quantize(torch.randn(outputs, inputs, device=CUDA), needed(quantization))
    x = torch.randn(256, inputs, device=CUDA, dtype=torch.bfloat16)
    product = selection.quantized_linear_on(CUDA)
    together = product(x, weight, scale, None)
    for rows in (1, 2, 8, 15, 16, 17, 32, 64, 128):
        assert torch.equal(product(x[:rows], weight, scale, None), together[:rows])
    for row in (7, 63, 255):
        assert torch.equal(product(x[row : row + 1], weight, scale, None), together[row : row + 1])


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantised_engines_move_and_say_the_same(quantization: Quantization) -> None:
    """At published width: from captured graphs, after an offload and a restore, a seed gives the same speech.

    The weights take what the estimate says, and less than those of 16 bits.
    """
    needed(quantization)
    sizes = {}
    jobs = [job(number, sampling=Sampling(seed=number, max_new_tokens=12)) for number in range(4)]
    for name in (quantization, "none"):
        made = engine(
            "custom_voice", device="cuda", directory=wide(), dtype="bfloat16", quantization=name, max_model_len=256
        )
        spoken = {name: outcome.pcm for name, outcome in run(made, jobs).items()}
        sizes[name] = made.memory().device["weights"]
        made.offload()
        made.restore()
        assert {name: outcome.pcm for name, outcome in run(made, jobs).items()} == spoken
        made.close()
    assert sizes[quantization] < sizes["none"]
