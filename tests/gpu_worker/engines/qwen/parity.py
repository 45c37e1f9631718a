"""The official package as the reference: the input of its talker and its codes, in float32.

Its sampled runs use our uniforms of the same seed. This module also runs the same requests on our own model.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.model_config import read_config, read_generation_config
from gpu_worker.engines.qwen.checkpoint.weights import load_weights
from gpu_worker.engines.qwen.kernels.selection import Kernels
from gpu_worker.engines.qwen.model.attention import Backend, attention
from gpu_worker.engines.qwen.model.prompt import Prompt, PromptBuilder, Voice
from gpu_worker.engines.qwen.model.qwen3_tts import Qwen3TTSModel
from gpu_worker.engines.qwen.model.sampling import SamplingParams, uniforms
from gpu_worker.engines.qwen.model.slot_state import RING_FRAMES
from gpu_worker.engines.qwen.runner import CpuModelRunner, ModelRunner, PrefillInput
from tests.checkpoints import Generation, Kind, Size, tiny
from tests.official_package import official_package, quick_masks

FRAMES = 15
"""Frames of the long greedy comparisons: enough for the text to end and padding to follow."""

FEW_FRAMES = 4
"""Frames of the others: the prompt, and the first rows of the text."""

GREEDY = SamplingParams(greedy=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.05)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt layout of a checkpoint. `recording`: frames of reference codes; 0: an x-vector, None: no reference."""

    kind: Kind
    size: Size | None = None
    generation: Generation = "published"
    text: str
    voice: str = ""
    language: str = "auto"
    instructions: str = ""
    recording: int | None = None
    whole_text: bool = False


CASES = [
    Case(kind="custom_voice", text="Hello world, good morning today!", voice="vivian", whole_text=True),
    Case(kind="custom_voice", text="Hello world, good morning today!", voice="ryan", language="english"),
    Case(kind="custom_voice", text="voice", voice="eric", whole_text=True),
    Case(kind="custom_voice", text="hello", voice="dylan", language="chinese"),
    Case(kind="custom_voice", text="the voice", voice="eric", language="english"),
    Case(
        kind="custom_voice", size="1b7", text="今天 good", voice="serena", instructions="speak softly", whole_text=True
    ),
    Case(kind="custom_voice", size="1b7", text="good morning", voice="aiden", instructions="speak softly"),
    Case(kind="voice_design", text="Hello world", instructions="a deep voice", language="german", whole_text=True),
    Case(kind="voice_design", text="Hello world", instructions="a deep voice"),
    Case(kind="voice_design", text="Hello", whole_text=True),
    Case(kind="base", text="Hello world today", recording=0),
    Case(kind="base", text="Hello world today", recording=0, language="french", whole_text=True),
    Case(kind="base", text="Hello world today, good morning", recording=4),
    Case(kind="base", text="Hello", recording=40, language="english"),
    Case(kind="base", text="Hello world today", recording=9, whole_text=True),
    Case(kind="base", size="1b7", text="Hello world today", recording=7),
]
TRANSCRIPT = "the speech of today"

LONG_RUNS = (0, 1, 6, 8, 12)
"""Indices of CASES whose greedy runs are long: each kind, text as a whole and row by row, with a projection."""


class Expected(msgspec.Struct, frozen=True):
    """A run of the official package: the input of the talker, the trailing text, the codes [frames, groups]."""

    embeds: Tensor
    trailing: Tensor
    codes: Tensor


@functools.cache
def official(
    kind: Kind, size: Size | None, dtype: torch.dtype = torch.float32, generation: Generation = "published"
) -> Any:
    """The official model, with eager attention."""
    directory = tiny(kind, size, generation=generation)
    return official_package().Model.from_pretrained(str(directory), dtype=dtype, attn_implementation="eager")


def recording(case: Case) -> tuple[Tensor, Tensor | None]:
    """A made-up reference: speaker embedding [hidden], and codes where there are any."""
    generator = torch.Generator().manual_seed(case.recording or 1)
    hidden = 96 if case.size == "1b7" else 64
    codes = torch.randint(0, 2048, (case.recording, 16), generator=generator) if case.recording else None
    return torch.randn(hidden, generator=generator), codes


def expected(index: int) -> Expected:
    """The official package's greedy run of CASES[index], long or not."""
    return greedy_run(index, FRAMES if index in LONG_RUNS else FEW_FRAMES)


@functools.cache
def greedy_run(index: int, frames: int) -> Expected:
    """The official package's greedy run of CASES[index] over so many frames."""
    case = CASES[index]
    return official_run(case, frames=frames, do_sample=False, subtalker_dosample=False, repetition_penalty=1.05)


def official_run(case: Case, *, seed: int = 0, frames: int = FRAMES, **parameters: float) -> Expected:
    """The official package's run of a case. `parameters` replace those of the checkpoint."""
    model = official(case.kind, case.size, generation=case.generation)
    common: dict[str, Any] = {
        "text": case.text,
        "language": case.language,
        "non_streaming_mode": case.whole_text,
        # The official package makes one frame less than its max_new_tokens.
        "max_new_tokens": frames + 1,
        **parameters,
    }
    with quick_masks(), _sampling_at(randomness(seed)), _spied(model.model) as seen:
        if case.kind == "custom_voice":
            model.generate_custom_voice(speaker=case.voice, instruct=case.instructions, **common)
        elif case.kind == "voice_design":
            model.generate_voice_design(instruct=case.instructions, **common)
        else:
            embedding, codes = recording(case)
            item = {
                "ref_code": [codes],
                "ref_spk_embedding": [embedding],
                "x_vector_only_mode": [codes is None],
                "icl_mode": [codes is not None],
            }
            # The wrapper drops ref_text from a prompt that is a dictionary; the class of its items keeps it.
            made = _prompt_item(model, item)
            model.generate_voice_clone(voice_clone_prompt=[made], **common)
    return Expected(seen["inputs_embeds"][0], seen["trailing_text_hidden"][0], seen["codes"][0])


class Ours:
    """Our model of one checkpoint, with its prompt builder."""

    def __init__(
        self,
        kind: Kind,
        size: Size | None,
        *,
        generation: Generation = "published",
        slots: int = 8,
        backend: Backend = "sdpa",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        kernels: Kernels | None = None,
    ) -> None:
        directory = tiny(kind, size, generation=generation)
        weights = load_weights(directory, "talker.", dtype=dtype, device=device)
        self.config = read_config(directory)
        self.generation = read_generation_config(directory)
        attend = attention(backend, torch.device(device), dtype)
        self.model = Qwen3TTSModel(
            weights, self.config, self.generation, attend, kernels=kernels or Kernels(), slots=slots, max_model_len=256
        )
        tokenizer = official(kind, size).processor.tokenizer
        self.prompts = PromptBuilder(
            weights, self.config, lambda text: tokenizer(text)["input_ids"], self.model.embed_codes
        )
        self.runner = CpuModelRunner(self.model)

    def prompt(self, case: Case) -> Prompt:
        """The prompt of a case."""
        voice = Voice(name=case.voice)
        if case.recording is not None:
            device = self.model.codec_table.device
            embedding, codes = (None if x is None else x.to(device) for x in recording(case))
            voice = Voice(embedding=embedding, codes=codes, transcript=TRANSCRIPT)
        return self.prompts.build(
            case.text,
            voice,
            language=case.language,
            instructions=case.instructions,
            whole_text=case.whole_text,
        )


@functools.cache
def our_model(kind: Kind, size: Size | None = None, generation: Generation = "published") -> Ours:
    """Ours, loaded and traced once for all tests that only call `generate`."""
    return Ours(kind, size, generation=generation)


def randomness(seed: int) -> np.ndarray:
    """The uniforms of a request's only utterance."""
    return uniforms(seed, 0, 99, 16)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request to `generate`: it joins at frame `join` and ends after at most `frames` frames."""

    prompt: Prompt
    join: int = 0
    frames: int = FRAMES
    params: SamplingParams = GREEDY
    seed: int = 0


def generate(ours: Ours, requests: Sequence[Request], runner: ModelRunner | None = None) -> list[Tensor]:
    """The codes of requests that share the slots, [frames, groups] each. A request takes the lowest free slot."""
    model = ours.model
    state = model.state
    runner = runner or ours.runner
    codes: list[list[Tensor]] = [[] for _ in requests]
    slots: dict[int, int] = {}
    free = list(range(8))
    waiting = list(range(len(requests)))
    moment = 0
    while waiting or slots:
        for number in [n for n in waiting if requests[n].join <= moment][: len(free)]:
            request = requests[number]
            slot = slots[number] = min(free)
            free.remove(slot)
            waiting.remove(number)
            state.write(slot, request.prompt, ours.prompts.padding(), request.params, randomness(request.seed))
            runner.prefill([PrefillInput(slot, request.prompt, request.params.full_vocab)])
        if slots:
            state.active.zero_()
            state.active[list(slots.values())] = True
            rows = [(slot, len(requests[n].prompt.embeds) + len(codes[n]) + 1) for n, slot in slots.items()]
            runner.decode_step(rows, full_vocab=any(requests[n].params.full_vocab for n in slots))
            for number, slot in list(slots.items()):
                codes[number].append(state.ring_buffer[slot, len(codes[number]) % RING_FRAMES].clone().cpu())
                ended = state.next_codebook0[slot].item() == state.eos_code
                if ended or len(codes[number]) == requests[number].frames:
                    free.append(slots.pop(number))
        moment += 1
    return [torch.stack(frames) for frames in codes]


@contextmanager
def _sampling_at(numbers: np.ndarray) -> Iterator[None]:
    """Replace `torch.multinomial`: invert the distribution, best first, at the uniform of its codebook and frame.

    The probabilities of codebook 0 have the 3072 ids of the talker, those of the other codebooks 2048.
    """
    first, frames = float(numbers[0]), numbers[1:].reshape(-1, 16)
    zero = iter([first, *map(float, frames[:, -1])])
    others = map(float, frames[:, :-1].ravel())

    def invert(probabilities: Tensor, num_samples: int) -> Tensor:
        assert probabilities.shape[0] == num_samples == 1
        values, ids = probabilities.sort(descending=True, stable=True)
        shares = values.double().cumsum(-1)
        level = shares[:, -1:] * next(zero if probabilities.shape[1] > 2048 else others)
        return ids.gather(1, torch.searchsorted(shares, level, right=True))

    draw = torch.multinomial
    torch.multinomial = invert
    try:
        yield
    finally:
        torch.multinomial = draw


@contextmanager
def _spied(model: Any) -> Iterator[dict[str, Any]]:
    """Record the calls within the official model. Its speech tokenizer is not called."""
    seen: dict[str, Any] = {}
    generate, talk, tokenizer = model.generate, model.talker.generate, model.speech_tokenizer

    def spy_generate(**kwargs: Any) -> Any:
        result = generate(**kwargs)
        seen["codes"] = result[0]
        return result

    def spy_talk(**kwargs: Any) -> Any:
        seen.update(kwargs)
        return talk(**kwargs)

    model.generate, model.talker.generate = spy_generate, spy_talk
    model.speech_tokenizer = _NoTokenizer()
    try:
        yield seen
    finally:
        model.generate, model.talker.generate, model.speech_tokenizer = generate, talk, tokenizer


class _NoTokenizer:
    """A speech tokenizer that decodes nothing."""

    def decode(self, items: list[Any]) -> tuple[list[Tensor], int]:
        """One sample for each item."""
        return [torch.zeros(1) for _ in items], 24_000


def _prompt_item(model: Any, item: dict[str, list[Any]]) -> Any:
    import sys  # noqa: PLC0415 -- the class is where the wrapper was defined

    made = sys.modules[type(model).__module__].VoiceClonePromptItem
    return made(
        **{name: values[0] for name, values in item.items()}, ref_text=TRANSCRIPT if item["icl_mode"][0] else None
    )
