import importlib

import pytest
import torch

from gpu_worker.engines.qwen.kernels import selection
from gpu_worker.engines.qwen.kernels.quantized_linear import (
    QuantizedLinear,
    fp8_disagreement,
    int8_disagreement,
    quantize,
    quantized_linear,
)
from tests.gpu_worker.engines.qwen.kernels.comparison import assert_close
from tests.gpu_worker.engines.qwen.kernels.interpreter import interpreted

CPU = torch.device("cpu")
KINDS = [torch.int8, torch.float8_e4m3fn]
SIXTEEN_BITS = [torch.bfloat16, torch.float16]
ERRORS = {torch.int8: 0.012, torch.float8_e4m3fn: 0.04}
"""Relative errors of a product with random weights."""


def fused() -> QuantizedLinear:
    """The Triton kernel, in the interpreter."""
    found: QuantizedLinear = selection._fused("quantized_linear")
    return found


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random values of the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_product_is_right(kind: torch.dtype) -> None:
    """Outputs of different sizes keep their precision, an output of zeros stays zero. The bias is added as it is."""
    weight, x = random(64, 512) * torch.logspace(-6, 3, 64)[:, None], random(32, 512, seed=1)
    weight[5] = 0
    bias = random(64, seed=2)
    quantised, scale = quantize(weight, kind)
    assert (quantised.dtype, quantised.shape, scale.shape) == (kind, weight.shape, (64,))
    assert torch.isfinite(quantised.float()).all()
    wanted, product = x @ weight.t(), quantized_linear(x, quantised, scale, None)
    assert ((product - wanted).norm(dim=0) <= ERRORS[kind] * wanted.norm(dim=0)).all()
    torch.testing.assert_close(quantized_linear(x, quantised, scale, bias), product + bias)


def test_a_large_matrix_is_quantised_in_parts() -> None:
    """The parts are those of one."""
    weight = random(3000, 8)
    whole, scale = quantize(weight, torch.int8)
    for part in (slice(0, 1000), slice(2900, 3000)):
        some, some_scales = quantize(weight[part], torch.int8)
        assert torch.equal(some, whole[part])
        assert torch.equal(some_scales, scale[part])


@interpreted
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 256), (37, 100)])
def test_the_kernel_equals_the_reference(kind: torch.dtype, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    """For one block of rows and for several; for sizes that fill no block."""
    weight, scale = quantize(random(outputs, inputs), kind)
    bias = random(outputs, seed=1).to(dtype)
    for rows, added in ((1, bias), (16, None), (35, bias)):
        x = (random(rows, inputs, seed=rows) / inputs**0.5).to(dtype)
        wanted = quantized_linear(x, weight, scale, added)
        assert_close(fused()(x, weight, scale, added), wanted, scale=1.0, share=0.01)


@interpreted
def test_every_tile_gives_the_same_bits() -> None:
    """A tile may be chosen by the number of rows, because nothing depends on it."""
    module = importlib.import_module("gpu_worker.engines.qwen.kernels.fused.quantized_linear")
    weight, scale = quantize(random(100, 512), torch.int8)
    x = random(20, 512, seed=1).bfloat16()
    tiles = {module.tile(rows, outputs) for rows in (1, 16, 17, 2048) for outputs in (1024, 4096, 12288)}
    products = []
    for tile in tiles:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "tile", lambda *_, found=tile: found)
            products.append(fused()(x, weight, scale, None))
    assert len(tiles) == 4
    assert all(torch.equal(product, products[0]) for product in products)
    assert all(rows <= 32 for rows, _ in tiles), "Hopper adds in another order from 64 rows on"


@interpreted
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_a_row_is_the_same_in_any_company(dtype: torch.dtype) -> None:
    """Bit for bit, alone and among as many rows as a batch has, some of them a thousand times as large."""
    weight, scale = quantize(random(48, 1024), torch.int8)
    x = (random(64, 1024, seed=1) * torch.logspace(-2, 1, 64)[:, None]).to(dtype)
    together = fused()(x, weight, scale, None)
    for number in (0, 15, 16, 31, 63):
        assert torch.equal(fused()(x[number : number + 1], weight, scale, None), together[number : number + 1])
    for rows in (2, 16, 17, 33):
        assert torch.equal(fused()(x[:rows], weight, scale, None), together[:rows])


@interpreted
@pytest.mark.parametrize("kind", [torch.int8, pytest.param(torch.float8_e4m3fn, marks=pytest.mark.soak)], ids=str)
def test_the_check_at_start_passes_in_the_interpreter(kind: torch.dtype) -> None:
    """For both kinds of weights."""
    assert selection.quantized_linear_problem(kind, CPU, torch.bfloat16) is None


def test_the_check_at_start_finds_what_is_wrong() -> None:
    """Other sums, a rounding too many, and rows that depend on their company."""

    def other_scale(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return quantized_linear(x, weight, scale * 1.01, bias)

    def rounded_twice(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        product = quantized_linear(x, weight, scale, None)
        return product if bias is None else product + bias

    def with_company(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return quantized_linear(x, weight, scale * (1 + 2**-9 if len(x) == 1 else 1), bias)

    for check in (int8_disagreement, fp8_disagreement):
        assert check(quantized_linear, CPU, torch.bfloat16) is None
        assert "units in the last place" in str(check(other_scale, CPU, torch.bfloat16))
        assert "of all values" in str(check(rounded_twice, CPU, torch.bfloat16))
        assert "company" in str(check(with_company, CPU, torch.bfloat16))
