import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.model import attention as attention_module
from gpu_worker.engines.qwen.model.attention import Flash, Sdpa, attention, by_group, difference_from_sdpa

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


def test_the_last_tokens_of_a_prompt_attend_as_in_the_whole() -> None:
    """The tokens before them were computed earlier, and their keys and values come from the cache."""
    query, key, value = torch.randn(1, 9, 4, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
    for kernel in kernels():
        whole = kernel.prefill(query, key, value)
        for last in (1, 4):
            torch.testing.assert_close(kernel.prefill(query[:, -last:], key, value), whole[:, -last:])


def test_a_row_reads_its_own_length_and_no_further() -> None:
    """Under a mask, each row gives what it gives alone, without one, at its own length."""
    query, key, value = torch.randn(3, 2, 2, 16), torch.randn(3, 2, 10, 16), torch.randn(3, 2, 10, 16)
    lengths = torch.tensor([1, 7, 10])
    for kernel in kernels():
        masked = kernel.decode(query, key, value, kernel.length_mask(lengths, 10, 2))
        assert masked.shape == (3, 64)
        for row, length in enumerate(lengths.tolist()):
            one = slice(row, row + 1)
            alone = kernel.decode(query[one], key[one, :, :length], value[one, :, :length], None)
            torch.testing.assert_close(masked[one], alone)


def test_the_mask_has_the_form_that_the_kernels_add() -> None:
    """It has the dtype of the scores: no layer has to convert it."""
    mask = attention("sdpa", CPU, torch.bfloat16).length_mask(torch.tensor([1, 3]), 3, 2)
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


def plain_flash(
    tensors: tuple[Tensor, Tensor, Tensor], mask: tuple[Tensor, Tensor, Tensor], queries: int, keys: int
) -> Tensor:
    """A `flash_kernel` in plain torch: the kernel itself needs a GPU."""
    query, key, value = tensors
    out = torch.empty_like(query)
    lengths, queries_begin, keys_begin = (numbers.tolist() for numbers in mask)
    for length, first, last, begin in zip(lengths, queries_begin, queries_begin[1:], keys_begin, strict=False):
        assert (last - first, length <= keys) == (queries, True)
        scores = torch.einsum("qhd,khd->hqk", query[first:last], key[begin : begin + length]) * query.shape[-1] ** -0.5
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[begin : begin + length])
    return out


def test_flash_attention_gives_each_row_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments that the kernel gets make it what SDPA is under a mask."""
    monkeypatch.setattr(attention_module, "flash_kernel", plain_flash)
    for heads_by_group in (False, True):
        flash = Flash(torch.float32, heads_by_group=heads_by_group)
        assert difference_from_sdpa(flash, CPU, torch.float32) < 1e-5


def test_heads_may_come_by_group() -> None:
    """The same heads in another order, which `by_group` makes of the usual one."""
    usual, grouped = Sdpa(torch.float32), Sdpa(torch.float32, heads_by_group=True)
    query, key, value = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    wanted = usual.prefill(query, key, value)[:, :, [0, 2, 1, 3]]
    assert torch.equal(grouped.prefill(query, key, value), wanted)
    arguments = query[:, 0].view(2, 2, 2, 16), key.transpose(1, 2), value.transpose(1, 2), None
    wanted = usual.decode(*arguments).view(2, 4, 16)[:, [0, 2, 1, 3]]
    assert torch.equal(grouped.decode(*arguments).view(2, 4, 16), wanted)
    assert torch.equal(by_group(usual.decode(*arguments).view(2, 4, 16), 2), wanted)


class Device:
    """A CUDA device in a test of the choice between backends."""

    type = "cuda"


@pytest.mark.parametrize(
    ("capability", "difference", "chosen"),
    [
        ((8, 0), 0.01, Flash),
        ((9, 0), 0.0, Flash),
        ((7, 5), 0.0, Sdpa),
        ((8, 0), 0.5, Sdpa),
        ((8, 0), math.nan, Sdpa),
        ((8, 0), RuntimeError("no kernel image"), Sdpa),
    ],
)
def test_flash_attention_is_chosen_where_it_works(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], difference: float | Exception, chosen: type
) -> None:
    """It is left out on older devices, and where its trial fails or gives something else than SDPA."""

    def measure(*_: object) -> float:
        if isinstance(difference, Exception):
            raise difference
        return difference

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(attention_module, "difference_from_sdpa", measure)
    device: Any = Device()
    assert type(attention("auto", device, torch.bfloat16)) is chosen
    assert type(attention("auto", device, torch.float32)) is Sdpa
    assert type(attention("auto", CPU, torch.bfloat16)) is Sdpa
    assert type(attention("flash_attention_2", device, torch.bfloat16)) is Flash


@pytest.mark.parametrize("threads", [2, 3])
def test_a_row_of_a_frame_has_the_bits_that_it_has_alone(threads: int) -> None:
    """In the published shape and for any position of a frame, whichever thread has its heads."""
    kernel = attention("sdpa", CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 8, 2, 128, generator=generator)
    cache = torch.randn(2, 5, 16, 8, 128, generator=generator).transpose(2, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for keys in range(1, 17):
            key, value = cache[..., :keys, :].unbind()
            together = kernel.decode(query, key, value, None)
            alone = [kernel.decode(query[i : i + 1], key[i : i + 1], value[i : i + 1], None) for i in range(5)]
            assert torch.equal(together, torch.cat(alone)), keys
    finally:
        torch.set_num_threads(before)
