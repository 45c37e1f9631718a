from collections import defaultdict
from typing import Any

import torch

from gpu_worker.engines.qwen.model.prompt import PromptBuilder


def test_a_text_is_tokenized_once() -> None:
    """Planner and prompt ask for the tokens of the same text; a few hundred microseconds each time."""
    tokenized: list[str] = []

    def tokenize(text: str) -> list[int]:
        tokenized.append(text)
        return list(range(20))

    weights: Any = defaultdict(lambda: torch.zeros(1))
    config: Any = None
    prompts = PromptBuilder(weights, config, tokenize, lambda codes: codes)
    assert [prompts.count("hello"), prompts.count("hello"), prompts.count("world")] == [12, 12, 12]
    assert len(tokenized) == 2
