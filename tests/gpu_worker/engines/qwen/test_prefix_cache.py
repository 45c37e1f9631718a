"""Constant beginnings of prompts are computed once, and no bit depends on whether one was."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gpu_worker.engines.qwen import build
from gpu_worker.engines.qwen.engine import Parts
from gpu_worker.engines.qwen.model.prompt import Prompt, Voice
from gpu_worker.engines.qwen.prefix_cache import PrefixCache
from gpu_worker.engines.qwen.runner import PrefillInput
from gpu_worker.engines.qwen.runtime.products_trial import Products
from shared.protocol import Sampling
from tests.gpu_worker.engines.qwen.driving import assemble, job, parts, run

INDEPENDENT = Products("int8_portable", "int8_portable_wide", row_multiple=1)
TEXTS = ["Hello world, good morning.", "the speech of today and the voice of the world today", "a"]
SLOTS = 3


@pytest.fixture(scope="module")
def made() -> Iterator[Parts]:
    """The parts of an engine with products as those of a large model, whose rows need no others for their bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "choose_products", lambda *_, **__: INDEPENDENT)
        made = parts("custom_voice", slots=SLOTS)
    yield made
    assemble(made).close()
    assert made.runner.memory()["prefixes"] == 0


@pytest.fixture
def prefixes(made: Parts) -> PrefixCache:
    """Those of `made`, without entries."""
    assert made.runner.prefixes is not None
    made.runner.prefixes.clear()
    return made.runner.prefixes


def read(made: Parts, slot: int, prompt: Prompt) -> list[Tensor]:
    """All that a prefill leaves: keys, values, the talker's output, and the first code."""
    with torch.inference_mode():
        made.runner.prefill([PrefillInput(slot, prompt, full_vocab=False)])
    state = made.state
    rows = [*made.cache.rows(slot, len(prompt.embeds)), state.hidden[slot], state.next_codebook0[slot]]
    return [row.clone() for row in rows]


def voice(kind: str, made: Parts) -> Voice:
    """A preset voice, one that only instructions describe, or a recording's."""
    if not kind.startswith("clone"):
        return Voice(name="vivian" if kind == "preset" else "")
    embedding = torch.sin(torch.arange(made.prompts.padding().shape[1]).float())
    codes = torch.arange(9 * 16).view(9, 16) % 7
    return {
        "clone": Voice(embedding=embedding),
        "clone in context": Voice(embedding=embedding, codes=codes, transcript="hello"),
        "clone of a long transcript": Voice(
            embedding=embedding, codes=codes[:2], transcript="hello world and the voice"
        ),
    }[kind]


LAYOUTS = {
    "whole": lambda made, text, one, said: made.prompts.build(text, one, **said, whole_text=True),
    "frame by frame": lambda made, text, one, said: made.prompts.build(text, one, **said, whole_text=False),
    "live": lambda made, text, one, said: made.prompts.begin(made.prompts.ids(text), one, **said, complete=True),
}


@pytest.mark.parametrize("instructions", ["", "Slowly."])
@pytest.mark.parametrize("kind", ["preset", "described", "clone", "clone in context", "clone of a long transcript"])
def test_a_prompt_behind_a_kept_beginning_is_read_to_the_same_bits(
    made: Parts, prefixes: PrefixCache, kind: str, instructions: str
) -> None:
    """In every layout. The beginning was kept of another text's prompt, in another slot."""
    said = {"language": "english", "instructions": instructions}
    for layout in LAYOUTS.values():
        with torch.inference_mode():
            prompts = [layout(made, text, voice(kind, made), said) for text in TEXTS]
        fresh = []
        for slot, prompt in enumerate(prompts):
            prefixes.clear()
            fresh.append(read(made, slot, prompt))
        prefixes.clear()
        read(made, 0, prompts[0])
        hits = prefixes.stats().hits
        for slot, prompt in enumerate(prompts):
            again = read(made, (slot + 1) % SLOTS, prompt)
            assert all(torch.equal(*pair) for pair in zip(again, fresh[slot], strict=True))
        assert prefixes.stats().hits == hits + len(prompts)


def test_only_equal_beginnings_hit(made: Parts, prefixes: PrefixCache) -> None:
    """Another voice, language or instruction is another beginning; another text is not."""
    asked = [
        ("vivian", "english", ""),
        ("ryan", "english", ""),
        ("vivian", "german", ""),
        ("vivian", "english", "Slowly."),
    ]
    before = prefixes.stats()
    for text in TEXTS[:2]:
        for name, language, instructions in asked:
            with torch.inference_mode():
                prompt = made.prompts.build(
                    text, Voice(name=name), language=language, instructions=instructions, whole_text=True
                )
            read(made, 0, prompt)
    after = prefixes.stats()
    assert (after.entries, after.hits - before.hits, after.misses - before.misses) == (4, 4, 4)


@torch.inference_mode()
def test_the_least_recently_used_goes_first(made: Parts) -> None:
    """Within the bound. A beginning above it is not kept."""
    token = made.cache.token_bytes
    cache = PrefixCache(made.cache, max_bytes=9 * token)
    keys = [cache.key(torch.full((4, 2), float(number))) for number in range(3)]
    for key in keys[:2]:
        assert not cache.load(0, key)
        cache.keep(0, key, 4)
    assert cache.load(1, keys[0])
    cache.keep(0, keys[2], 4)
    assert cache.bytes == cache.stats().bytes == 8 * token
    assert [cache.load(1, key) for key in keys] == [True, False, True]
    cache.keep(0, b"another", 10)
    assert cache.stats().entries == 2


def test_no_sample_depends_on_the_cache(made: Parts, prefixes: PrefixCache) -> None:
    """Alone, in company, without room, and after an offload, which frees the cache; its memory is counted."""
    speaker = assemble(made)
    jobs = [job(number, text, sampling=Sampling(seed=5, max_new_tokens=5)) for number, text in enumerate(TEXTS)]

    def say() -> list[bytes]:
        return [outcome.pcm for outcome in run(speaker, jobs).values()]

    wanted = []
    for one in jobs:
        speaker.empty_cache("prefixes")
        wanted.append(run(speaker, [one])[one.id].pcm)
    hits = prefixes.stats().hits
    assert say() == wanted
    assert prefixes.stats().hits == hits + len(jobs)
    assert speaker.memory().device["prefixes"] == prefixes.bytes > 0
    assert [cache.name for cache in speaker.stats().caches][-1] == "prefixes"
    speaker.offload()
    assert "prefixes" not in speaker.memory().host
    assert prefixes.bytes == 0
    speaker.restore()
    assert say() == wanted
