import pytest
import torch

from gpu_worker.engines.qwen.executor import BATCHES, Entry, GraphExecutor, at_least, slots_needed
from tests.gpu_worker.engines.qwen.parity import CASES, Ours


def test_sizes_are_rounded_up_to_what_was_captured() -> None:
    """The smallest that holds it; more than the largest is a mistake of the caller."""
    assert [at_least(number, BATCHES) for number in (1, 3, 17, 128)] == [1, 4, 24, 128]
    with pytest.raises(ValueError, match="129"):
        at_least(129, BATCHES)


def test_the_state_has_rows_for_padding_where_batches_are_fixed() -> None:
    """On CUDA the largest batch and a spare row; on CPU what is used."""
    assert slots_needed(6, torch.device("cpu")) == 6
    assert slots_needed(6, torch.device("cuda")) == 9


def test_prompts_of_one_length_bucket_are_read_together() -> None:
    """In groups of the captured sizes, float32 alone, spare rows pointing at the spare slot."""
    ours = Ours("custom_voice", None, slots=9, dtype=torch.bfloat16)
    executor = GraphExecutor(ours.generator, slots=8, positions=256)
    calls: list[tuple[int, int, list[int]]] = []
    prefill = ours.generator.prefill

    def seen(embeds: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, *, wide: bool) -> None:
        calls.append((embeds.shape[0], embeds.shape[1], slots.tolist()))
        prefill(embeds, slots, lengths, wide=wide)

    ours.generator.prefill = seen
    with torch.inference_mode():
        prompts = [ours.prompt(case) for case in CASES[:2]]
        executor.prefill([Entry(slot, prompts[slot % 2], wide=False) for slot in range(7)])
    short, long = sorted({at_least(len(prompt.embeds), (16, 32, 64, 128)) for prompt in prompts})
    even = at_least(len(prompts[0].embeds), (16, 32, 64, 128))
    odd = short if even == long else long
    assert calls == [(4, even, [0, 2, 4, 6]), (4, odd, [1, 3, 5, 8])]
