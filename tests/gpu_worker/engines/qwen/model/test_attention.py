import importlib.util

import pytest
import torch

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.model.attention import attention

CPU = torch.device("cpu")


def kernels() -> list[object]:
    """The backends that run on every device."""
    return [attention(backend, CPU, torch.float32) for backend in ("eager", "sdpa")]


def test_backends_agree_on_prompts() -> None:
    """Causal attention with grouped heads is the same in both."""
    query, key, value = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    eager, sdpa = (kernel.prefill(query, key, value) for kernel in kernels())
    assert eager.shape == query.shape
    torch.testing.assert_close(eager, sdpa)


def test_a_row_reads_its_own_length_and_no_further() -> None:
    """Under a mask, each row gives what it gives alone, without one, at its own length."""
    query, key, value = torch.randn(3, 4, 16), torch.randn(3, 2, 10, 16), torch.randn(3, 2, 10, 16)
    lengths = torch.tensor([1, 7, 10])
    for kernel in kernels():
        masked = kernel.decode(query, key, value, kernel.length_mask(lengths, 10))
        assert masked.shape == (3, 64)
        for row, length in enumerate(lengths.tolist()):
            one = slice(row, row + 1)
            alone = kernel.decode(query[one], key[one, :, :length], value[one, :, :length], None)
            torch.testing.assert_close(masked[one], alone)


def test_the_mask_has_the_form_that_the_kernels_add() -> None:
    """It has the dtype of the scores: no layer has to convert it."""
    mask = attention("sdpa", CPU, torch.bfloat16).length_mask(torch.tensor([1, 3]), 3)
    assert mask.dtype == torch.bfloat16
    assert mask.tolist() == [[[[0, -float("inf"), -float("inf")]]], [[[0, 0, 0]]]]


@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    [("flash_attention_2", "cpu", torch.bfloat16), ("flash_attention_2", "cuda", torch.float32)],
)
def test_a_backend_that_cannot_run_here_is_refused(backend: str, device: str, dtype: torch.dtype) -> None:
    """The message says why. No other backend is taken instead."""
    with pytest.raises(JobError, match=backend) as refusal:
        attention(backend, torch.device(device), dtype)
    assert refusal.value.code == "model_unavailable"


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed here")
def test_a_missing_package_is_named() -> None:
    """The error of flash_attention_2 names flash-attn."""
    with pytest.raises(JobError, match="flash-attn"):
        attention("flash_attention_2", torch.device("cuda"), torch.bfloat16)
