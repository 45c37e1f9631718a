"""TTS_QUANTIZATION on each device: the kernels, and refusals of one sentence, with advice."""

import importlib.util
import re
from typing import Any

import pytest
import torch

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.runtime import cuda_products, products
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN
from gpu_worker.engines.qwen.runtime.quantization import choose, unsupported, widths

LARGE = [(1024, 512), (512, 1024)]
BF16 = torch.bfloat16


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package triton is installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "triton" else find_spec(name, *rest)
    )


@pytest.mark.parametrize(
    ("quantization", "device", "dtype", "more", "advice"),
    [
        ("int8", "cpu", BF16, {}, "int8 computes in float32; leave TTS_DTYPE at auto"),
        ("fp8", "cpu", torch.float32, {}, "fp8 needs a GPU of .* 8.9; on a CPU set TTS_QUANTIZATION=int8"),
        ("fp16", "cuda", BF16, {}, "fp16 is for a CPU; .* set TTS_QUANTIZATION=none or int8"),
        ("int8", "cuda", torch.float32, {}, "computes in 16 bits on a GPU; leave TTS_DTYPE at auto"),
        ("int8", "cuda", BF16, {"kernels": "torch"}, "needs a Triton kernel on a GPU; set TTS_KERNELS=auto"),
        ("fp8", "cuda", BF16, {"capability": (8, 6)}, "fp8 needs .* 8.9 .*, not 8.6; set TTS_QUANTIZATION=int8"),
    ],
)
@pytest.mark.usefixtures("triton")
def test_what_a_device_cannot_is_refused(
    quantization: Any, device: str, dtype: torch.dtype, more: dict[str, Any], advice: str
) -> None:
    """At the start, before the device is used."""
    problem = unsupported(quantization, device, dtype, **more)
    assert problem is not None
    assert re.search(advice, problem)


@pytest.mark.usefixtures("triton")
def test_what_a_device_can_is_not_refused() -> None:
    """A capability that is not known is no reason: the load will fail with the reason."""
    for quantization in ("auto", "none"):
        assert unsupported(quantization, "cuda", torch.float32, kernels="torch", capability=(7, 5)) is None
        assert unsupported(quantization, "cpu", BF16) is None
    assert unsupported("int8", "cuda", torch.float16, capability=(7, 5)) is None
    assert unsupported("fp8", "cuda", BF16, kernels="triton", capability=(8, 9)) is None
    assert unsupported("fp8", "cuda", BF16) is None


def test_a_gpu_without_triton_has_no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the package."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(JobError, match=r"the package triton .* not installed; install it, or set") as refusal:
        choose("int8", LARGE, "cuda", BF16)
    assert refusal.value.code == "model_unavailable"


def test_a_cpu_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are deprecated."""
    monkeypatch.setattr(products, "available", lambda name: not name.startswith("int8"))
    with pytest.raises(JobError, match="has no such products for this processor; set TTS_QUANTIZATION=none"):
        choose("int8", LARGE, "cpu", torch.float32)


@pytest.mark.usefixtures("triton")
def test_a_gpu_quantises_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8: all matrices but heads and `down`. fp8: gate and up. A kernel that disagrees makes the load fail."""
    problems: dict[torch.dtype, str] = {torch.float8_e4m3fn: "RuntimeError: no C compiler"}
    monkeypatch.setattr(cuda_products, "quantized_linear_problem", lambda kind, *_: problems.get(kind))
    assert choose("auto", LARGE, "cuda", BF16) == choose("none", LARGE, "cuda", BF16) == PLAIN
    int8 = choose("int8", LARGE, "cuda", BF16)
    assert [int8.of(part) for part in ("weights", "gate_up", "sensitive")] == ["int8_cuda", "int8_cuda", "plain"]
    with pytest.raises(JobError, match=r"fp8 is impossible here, set TTS_QUANTIZATION=none: .* no C compiler"):
        choose("fp8", LARGE, "cuda", BF16)
    problems.clear()
    fp8 = choose("fp8", LARGE, "cuda", BF16)
    assert [fp8.of(part) for part in ("weights", "gate_up", "sensitive")] == ["", "fp8_cuda", ""]
    assert [made.quantization for made in (PLAIN, int8, fp8)] == ["none", "int8", "fp8"]


def test_widths() -> None:
    """Small matrices stay as they are on a CPU. A GPU reads a third less of them, too, and leaves 16 bits to some."""
    assert widths("int8", "cpu", [(64, 64), *LARGE]) == {}
    assert widths("int8", "cpu", LARGE) == {"": 1}
    assert widths("int8", "cuda", [(64, 64)]) == {"": 1, "down_proj": 2, "head": 2}
    assert widths("auto", "cpu", LARGE) == widths("none", "cuda", LARGE) == {}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_product_holds_its_weights_in_one_byte(kind: str) -> None:
    """All that it holds is in its tensors, so it moves to the host and back with them."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0), dtype=BF16)
    bias, x = torch.ones(64, dtype=BF16), torch.ones(2, 128, dtype=BF16)
    kernel = cuda_products.CUDA_KERNELS[f"{kind}_cuda"](weight, bias)
    assert sum(tensor.nbytes for tensor in kernel.tensors) == 64 * 128 + 4 * 64 + 2 * 64
    product = kernel(x)
    assert product.dtype == BF16
    torch.testing.assert_close(product, x @ weight.t() + bias, rtol=0, atol=1.0)
    assert torch.equal(kernel.add_to(x[:, :64], x), x[:, :64] + product)
    for tensor in kernel.tensors:
        tensor.zero_()
    assert not kernel(x).any()
