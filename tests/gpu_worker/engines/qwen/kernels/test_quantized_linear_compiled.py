"""The product with quantised weights compiled for every kind of GPU, on none: what becomes of its sums."""

import functools
import re
from typing import Any

import pytest

from tests.checkpoints import CACHE
from tests.gpu_worker.engines.qwen.kernels.interpreter import needs_triton

TENSOR_CORES = "mma.sync.aligned.m16n8k16.row.col.f32"
INT8, FP8 = "i8", "fp8e4nv"

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def _kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep compiled kernels between runs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE.parent / "triton"))


@functools.cache
def compiled(architecture: int, weights: str, tile: tuple[int, int], dtype: str = "bf16") -> Any:
    """The kernel for 2048 inputs."""
    import triton  # noqa: PLC0415 -- not everywhere
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from gpu_worker.engines.qwen.kernels.fused import quantized_linear as module  # noqa: PLC0415

    pointers = {"x": f"*{dtype}", "weight": f"*{weights}", "scale": "*fp32", "out": f"*{dtype}"}
    constants = {
        "bias": None,
        "inputs": 2048,
        "row_block": tile[0],
        "output_block": tile[1],
        "input_block": module.INPUT_BLOCK,
    }
    names = [parameter.name for parameter in module._kernel.params]
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "outputs")}
    source = ASTSource(
        module._kernel, signature, {(names.index(name),): constants[name] for name in constants}, aligned
    )
    options = {"enable_fp_fusion": False, "num_stages": module.STAGES, "num_warps": module.warps(tile[1])}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize(
    ("architecture", "weights", "tile", "dtype"),
    [
        (75, INT8, (16, 32), "fp16"),
        (80, INT8, (32, 64), "bf16"),
        (89, FP8, (16, 32), "bf16"),
        (120, FP8, (32, 32), "bf16"),
    ],
)
def test_it_compiles(architecture: int, weights: str, tile: tuple[int, int], dtype: str) -> None:
    """From Turing, whose tensor cores Triton does not know, to Blackwell. Tiles fit into the smallest shared memory."""
    made = compiled(architecture, weights, tile, dtype)
    assert len(made.asm["cubin"]) > 0
    assert made.metadata.shared <= 48 << 10
    assert (TENSOR_CORES in made.asm["ptx"]) == (architecture > 75)


def test_small_and_large_tiles_add_in_the_same_order() -> None:
    """By instructions of one shape. From 64 rows on Hopper's own (wgmma) would be taken, which add in another order."""
    for tile in ((16, 16), (32, 64)):
        ptx = compiled(90, INT8, tile).asm["ptx"]
        instructions = set(re.findall(r"\b(?:mma\.sync|wgmma|tcgen05)\.\S+", ptx))
        assert instructions == {f"{TENSOR_CORES}.bf16.bf16.f32"}
        assert not re.search(r"\b(atom|red)\.", ptx), "sums that come in any order"


def test_float8_does_not_compile_for_ampere() -> None:
    """So its load would fail there, if it were not refused before."""
    with pytest.raises(Exception, match="fp8e4nv not supported in this architecture"):
        compiled(86, FP8, (16, 16))
