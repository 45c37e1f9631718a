import pytest
import torch
from torch.nn import functional

from gpu_worker.engines.qwen.checkpoint.model_config import Shape
from gpu_worker.engines.qwen.model.layers import Linear, RopeTables, pad_rows
from gpu_worker.engines.qwen.runtime import products, products_trial
from gpu_worker.engines.qwen.runtime.products import BATCH_MULTIPLE, PACK_ELEMENTS, plain_is_batch_invariant
from tests.gpu_worker.engines.qwen.parity import official


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_is_the_official_rotation(dtype: torch.dtype) -> None:
    """The tables and the product with a rolled vector equal those of the official module, far positions included."""
    module = official("custom_voice", None).model.talker.code_predictor.model.rotary_emb
    shape = Shape(
        hidden_size=64,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=1,
        num_code_groups=16,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )
    positions = torch.tensor([0, 1, 17, 2000])
    x = torch.randn(4, 3, 32).to(dtype)
    cos, sin = (table.transpose(0, 1) for table in module(x, positions[None]))
    rotated = torch.cat((-x[..., 16:], x[..., :16]), -1)
    our_cos, our_sin = RopeTables(shape, 2048, dtype, torch.device("cpu")).at(positions)
    assert torch.equal(x * our_cos + x.roll(16, -1) * our_sin, x * cos + rotated * sin)


@pytest.mark.parametrize(("inner", "outer"), [(64, 192), (128, 64), (512, 512), (1024, 512)])
def test_products_are_batch_invariant(inner: int, outer: int) -> None:
    """Padded to full groups, a row's product is the same to the last bit at any batch size and place."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outer, inner, generator=generator)
    linear = Linear(weight)
    assert linear.packed == (inner * outer >= PACK_ELEMENTS or not plain_is_batch_invariant(torch.float32))
    x = torch.randn(24, inner, generator=generator)
    alone = torch.cat([linear(pad_rows(row[None]))[:1] for row in x])
    for batch in (2, 3, 4, 7, 12, 24):
        together = linear(pad_rows(x[:batch]))[:batch]
        assert torch.equal(together, alone[:batch])
    assert torch.allclose(alone, functional.linear(x, weight), rtol=1e-3, atol=1e-3)


def test_small_products_are_packed_where_mkl_depends_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an Intel with AVX2 alone. No trial takes plain products there."""
    monkeypatch.setattr(products, "_is_batch_invariant", lambda _: False)
    products._invariant_layout.cache_clear()
    weight, x = torch.randn(64, 32), torch.randn(4, 32)
    try:
        linear = Linear(weight)
        assert not Linear(weight.bfloat16()).packed
        assert not products_trial._possible("plain", torch.float32)
    finally:
        monkeypatch.undo()
        products._invariant_layout.cache_clear()
    assert linear.packed
    assert torch.allclose(linear(x), functional.linear(x, weight), rtol=1e-3, atol=1e-3)


def test_bfloat16_is_not_packed_where_onednn_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor without AVX-512, packing raises. The product is the same to rounding."""
    weight, x = torch.randn(512, 512).bfloat16(), torch.randn(3, 512).bfloat16()

    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx512bw")

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    linear = Linear(weight)
    assert not linear.packed
    torch.testing.assert_close(linear(x), functional.linear(x, weight), rtol=0.02, atol=0.02)


def test_padding_fills_the_last_group() -> None:
    """Rows of zeros stand behind the rows, up to a multiple of BATCH_MULTIPLE; a full group gets none."""
    assert pad_rows(torch.ones(BATCH_MULTIPLE, 3)).shape == (BATCH_MULTIPLE, 3)
    padded = pad_rows(torch.ones(BATCH_MULTIPLE + 1, 3))
    assert padded.shape == (2 * BATCH_MULTIPLE, 3)
    assert padded.sum() == 3 * (BATCH_MULTIPLE + 1)
