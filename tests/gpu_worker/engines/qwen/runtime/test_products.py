"""The kernels of products: their errors, and that a row's bits depend on the row alone."""

import gc

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from gpu_worker.engines.qwen.runtime import products
from gpu_worker.engines.qwen.runtime.cpu_traces import CpuTraces
from gpu_worker.engines.qwen.runtime.products import KERNELS, available

OUT, IN = 256, 1024
QUANTISED = [name for name in KERNELS if name.startswith(("fp16", "int8"))]
INT8 = [name for name in KERNELS if name.startswith("int8")]
ERRORS = dict.fromkeys(KERNELS, 1e-6) | dict.fromkeys(INT8, 0.02) | {"int8": 0.025}
"""Relative errors of a product with random weights. With 7-bit activations int8 has 0.019."""


def weights(outputs: int = OUT, inputs: int = IN) -> Tensor:
    """Random weights that came from bfloat16, with rows of different sizes."""
    sizes = torch.logspace(-1, 1, outputs)[:, None]
    return (torch.randn(outputs, inputs, generator=generator()) * sizes / 32).bfloat16().float()


def rows(count: int = 8) -> Tensor:
    """Rows whose sizes differ a thousandfold, and one of zeros."""
    x = torch.randn(count, IN, generator=generator(1)) * torch.logspace(-2, 1, count)[:, None]
    x[-1] = 0
    return x


def generator(seed: int = 0) -> torch.Generator:
    """A new source of the same numbers."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=list(KERNELS))
def name(request: pytest.FixtureRequest) -> str:
    """Each kernel that this machine has."""
    found: str = request.param
    if found in QUANTISED and not available(found):
        pytest.skip(f"no {found} products here")
    return found


def test_a_product_is_right(name: str) -> None:
    """With and without a bias, and added to something. Each row has its own error: small rows lose nothing."""
    weight, x, bias = weights(), rows(), torch.randn(OUT, generator=generator(2))
    wanted = x.double() @ weight.double().t()
    kernel = KERNELS[name](weight)
    for product, rest in (
        (kernel(x), 0.0),
        (kernel.add_to(torch.ones(len(x), OUT), x), 1.0),
        (KERNELS[name](weight, bias)(x), bias.double()),
    ):
        error = (product - rest - wanted).norm(dim=1)
        assert (error <= ERRORS[name] * wanted.norm(dim=1) + 1e-4).all()
    assert not kernel(x)[-1].any()


@pytest.mark.parametrize("name", QUANTISED)
def test_a_row_is_the_same_in_any_company(name: str) -> None:
    """Bit for bit, alone and among rows a thousand times as large, in any place of a group that a kernel multiplies."""
    if not available(name):
        pytest.skip(f"no {name} products here")
    kernel, x = KERNELS[name](weights()), rows(64)
    whole = kernel(x)
    for count in range(1, len(x)):
        assert torch.equal(kernel(x[:count]), whole[:count])


@pytest.mark.skipif(not available("int8"), reason="no int8 products here")
def test_sums_of_int8_do_not_overflow() -> None:
    """The largest weights times the largest activations: without VNNI, pairs of them would not fit into 16 bits."""
    kernel = KERNELS["int8"](torch.ones(32, IN))
    product = kernel(torch.ones(2, IN))
    torch.testing.assert_close(product, torch.full((2, 32), float(IN)), rtol=0.01, atol=0)


def test_int8_without_vnni_uses_seven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then an activation has half as many integers. Wide activations know that."""
    if not available("int8"):
        pytest.skip("no int8 products here")
    monkeypatch.setattr(products, "_levels", lambda: 63)
    weight, x = weights(), rows()
    wanted = x.double() @ weight.double().t()
    for name, error in (("int8", 0.025), ("int8_wide", 0.011)):
        kernel = KERNELS[name](weight)
        assert ((kernel(x) - wanted).norm(dim=1) <= error * wanted.norm(dim=1) + 1e-4).all()
        assert torch.equal(kernel(x)[:1], kernel(x[:1]))


@pytest.mark.parametrize("name", [name for name in INT8 if name.endswith("_wide")])
def test_one_large_activation_does_not_spoil_the_others_if_they_are_wide(name: str) -> None:
    """A channel sixty times as large as the others: 8 bits leave two of them to the rest."""
    if not available(name):
        pytest.skip(f"no {name} products here")
    weight, x = weights(), rows()
    x[:, 7] *= 60
    wanted = x.double() @ weight.double().t()
    errors = [
        float((KERNELS[kernel](weight)(x)[:-1] - wanted[:-1]).norm(dim=1).div(wanted[:-1].norm(dim=1)).max())
        for kernel in (name, name.removesuffix("_wide"))
    ]
    assert errors[0] < 0.012
    assert errors[1] > 0.04


def test_products_are_traced(name: str) -> None:
    """A trace calls them with other values, and no warning says that it was not made."""
    kernel, x, y = KERNELS[name](weights()), rows(4), torch.zeros(4, OUT)
    traced = CpuTraces(lambda: [*kernel.tensors, x, y])
    with torch.inference_mode(), capture_logs() as events:
        traced.run((1, "product"), lambda: y.copy_(kernel(x)))  # type: ignore[arg-type, return-value]
        x.copy_(rows(4).flip(0))
        traced.run((1, "product"), lambda: pytest.fail("not traced"))
    assert not events
    assert torch.equal(y, kernel(rows(4).flip(0)))


@pytest.mark.parametrize("name", INT8, indirect=True)
def test_a_matrix_read_in_parts_is_the_matrix(name: str) -> None:
    """As bfloat16, in pieces, each column multiplied: to the last bit the product of the whole matrix in float32."""
    weight = weights()
    assert torch.equal(KERNELS[name](weight.bfloat16())(rows()), KERNELS[name](weight)(rows()))
    assert products.reads_in_parts(name)
    if name.endswith("_wide"):
        return  # no such matrix is behind a norm
    columns = torch.rand(IN, generator=generator(3)) + 0.5
    wanted = KERNELS[name](weight * columns)(rows())
    for given in (weight.bfloat16(), weight.split((OUT // 3, OUT - OUT // 3))):
        product = KERNELS[name](given, None, columns)(rows())  # type: ignore[arg-type, call-arg]
        assert torch.equal(product, wanted)


def test_a_trace_of_products_serves_other_weights(name: str) -> None:
    """All that differs from matrix to matrix is in tensors: the heads of all codebooks share a trace."""
    first, second = (KERNELS[name](sign * weights()) for sign in (1, -1))
    traced = CpuTraces(list)
    with torch.inference_mode():
        for kernel in (first, second):
            (product,) = traced.run(
                (1, "product"), lambda x, kernel=kernel: (kernel(x),), rows(4), varied=kernel.tensors
            )
            assert torch.equal(product, kernel(rows(4)))
    assert traced.untraced_runs == 1


def test_quantised_weights_take_what_they_say() -> None:
    """2 bytes a weight, or 1. torch's figures do not have them: they are in memory of the kernel."""
    for found in filter(available, QUANTISED):
        kernel = KERNELS[found](weights())
        visible = sum(tensor.untyped_storage().nbytes() for tensor in kernel.tensors)
        width = 1 if found.startswith("int8") else 2
        assert width * OUT * IN <= kernel.hidden_bytes + visible <= width * OUT * IN + 16 * (OUT + IN)


def test_weights_of_a_kernel_that_is_gone_are_freed() -> None:
    """Those that traces know by number, too."""
    if not available("fp16_threaded"):
        pytest.skip("no fp16 products here")
    before = len(products._objects)
    kernel = KERNELS["fp16_threaded"](weights())
    assert len(products._objects) == before + 1
    del kernel
    gc.collect()
    assert len(products._objects) == before


def test_a_kernel_that_torch_has_no_more_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of fbgemm are deprecated."""
    monkeypatch.delattr(torch, "fbgemm_pack_quantized_matrix", raising=False)
    assert not available.__wrapped__("int8")


def test_a_kernel_with_wrong_results_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that changed its meaning counts as missing."""
    monkeypatch.setattr(products.Half, "__call__", lambda _, x: x.new_zeros(len(x), 32))
    assert not available.__wrapped__("fp16")
