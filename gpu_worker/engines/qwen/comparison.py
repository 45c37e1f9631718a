"""The effect of quantised weights: the same codes through a checkpoint with and without them.

The exact model speaks; both read what it said (teacher forcing), so that one other draw does not make all that follows
another speech. Owns the figures and the table. `python -m gpu_worker compare` prints it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import torch
from torch import Tensor

from gpu_worker.engines.qwen.build import Device, DtypeName, compute_dtype
from gpu_worker.engines.qwen.checkpoint.model_config import read_config, read_generation_config
from gpu_worker.engines.qwen.checkpoint.text_tokenizer import SharedTokenizers
from gpu_worker.engines.qwen.checkpoint.weights import open_weights
from gpu_worker.engines.qwen.kernels.selection import select_kernels
from gpu_worker.engines.qwen.model.attention import attention
from gpu_worker.engines.qwen.model.prompt import Prompt, PromptBuilder, Voice
from gpu_worker.engines.qwen.model.qwen3_tts import Qwen3TTSModel, product_shapes
from gpu_worker.engines.qwen.runtime.products_trial import Quantization
from gpu_worker.engines.qwen.runtime.quantization import choose

TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog, and nobody in the village minds.",
    "Please call Stella at half past nine. Ask her to bring these things with her from the store.",
    "Der Zug nach Hamburg fährt heute von Gleis sieben; bitte beachten Sie die Durchsagen.",
    "Il a neigé toute la nuit sur les toits de Paris, et la ville s'est réveillée en silence.",
    "今天的天气非常好。我们一起去公园散步吧。",
    "What did you say? I could not hear a word over the noise of that engine!",
)
"""Spoken if no file of texts is given."""

FRAMES: Final = 40
"""Frames of each text: 3.2 s."""

_INSTRUCTIONS: Final = "a calm voice"


class Agreement(msgspec.Struct, frozen=True):
    """The agreement of two models over many draws of one codebook.

    `error`: of the logits, relative. `changed`: the share of draws that must change (total variation of the two
    distributions that are sampled). `top1`: the share of draws whose most likely code is the same.
    """

    error: float
    changed: float
    top1: float


class Comparison(msgspec.Struct, frozen=True):
    """The number of frames compared, and the agreement of each of the 16 codebooks; codebook 0 is the talker's."""

    frames: int
    codebooks: list[Agreement]

    def lines(self) -> Iterator[str]:
        """The table."""
        yield f"{self.frames} frames{'logit error':>20}{'draws that change':>20}{'top-1 agreement':>18}"
        yield _line("talker, codebook 0", self.codebooks[0])
        yield _line("code predictor", _mean(self.codebooks[1:]))
        for number, agreement in enumerate(self.codebooks[1:], 1):
            yield _line(f"  codebook {number}", agreement)


def compare(
    directory: Path,
    quantization: Quantization,
    texts: Sequence[str] = TEXTS,
    frames: int = FRAMES,
    *,
    device: Device = "cpu",
    dtype: DtypeName = "float32",
) -> Comparison:
    """Compare the checkpoint in `directory` with and without quantisation, on the device and in the dtype.

    Raises:
        JobError: `model_unavailable`, naming the file at fault or what this machine cannot do.
    """
    generator = torch.Generator().manual_seed(0)
    generation = read_generation_config(directory)
    found: list[list[tuple[float, float, float]]] = [[] for _ in range(16)]
    with torch.inference_mode():
        kinds: tuple[Quantization, ...] = ("none", quantization)
        max_model_len = 4 * max(map(len, texts)) + frames + 64
        exact, other = (_Forced(directory, kind, max_model_len, device, dtype) for kind in kinds)
        for text in texts:
            prompt = exact.prompt(text)
            pair = [model.begin(prompt) for model in (exact, other)]
            for frame in range(frames):
                codes = exact.draw(pair[0], generator)
                logits = [model.logits(state, codes) for model, state in zip((exact, other), pair, strict=True)]
                for codebook, (one, two) in enumerate(zip(*logits, strict=True)):
                    top_k = generation.subtalker_top_k if codebook else generation.top_k
                    found[codebook].append(_agreement(one, two, top_k))
                pair = [model.read(prompt, frame, codes) for model in (exact, other)]
    return Comparison(len(texts) * frames, [Agreement(*torch.tensor(row).mean(0).tolist()) for row in found])


class _Forced:
    """One model that reads given codes. Its state is the talker's normed output and the logits of codebook 0."""

    def __init__(
        self, directory: Path, quantization: Quantization, max_model_len: int, place: Device, dtype_name: DtypeName
    ) -> None:
        config, generation = read_config(directory), read_generation_config(directory)
        device, dtype = torch.device(place), compute_dtype(place, dtype_name)
        products = choose(quantization, product_shapes(config.talker_config), place, dtype)
        with open_weights(directory, "talker.", dtype=dtype, device=device) as weights:
            self.model = Qwen3TTSModel(
                weights,
                config,
                generation,
                attention("sdpa", device, dtype),
                kernels=select_kernels("torch", device, dtype),
                slots=1,
                max_model_len=max_model_len,
                products=products,
            )
            self._prompts = PromptBuilder(weights, config, SharedTokenizers().load(directory), self.model.embed_codes)
        self._voice = Voice(name=next(iter(config.talker_config.spk_id), ""))
        self._instructions = _INSTRUCTIONS if config.tts_model_type == "voice_design" else ""
        self._top_k, self._temperature = generation.top_k, generation.temperature
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._length = 0

    def prompt(self, text: str) -> Prompt:
        return self._prompts.build(
            text, self._voice, language="auto", instructions=self._instructions, whole_text=False
        )

    def begin(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Read the prompt."""
        self._length = len(prompt.embeds)
        return self.model.talker.prefill(prompt.embeds[None], self._slot, self._slot + self._length)

    def read(self, prompt: Prompt, frame: int, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Read a frame."""
        trailing = prompt.trailing[frame : frame + 1] if frame < len(prompt.trailing) else self._prompts.padding()
        x = self.model.embed_codes(codes) + trailing
        position, self._length = self._slot + self._length, self._length + 1
        return self.model.talker.decode(x, position, position + 1, kv_len=0)

    def draw(self, state: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        """A frame that the model says, int64 [1, 16]; the end of speech is never drawn."""
        hidden, logits = state
        values, ids = (logits[:, :-1].float() / self._temperature).topk(self._top_k or logits.shape[1] - 1)
        place = torch.multinomial(values.softmax(1).cpu(), 1, generator=generator)
        code = ids.gather(1, place.to(ids.device))[:, 0]
        return self.model.code_predictor(hidden, code, torch.rand(1, 15, generator=generator).to(hidden.device))

    def logits(self, state: tuple[Tensor, Tensor], codes: Tensor) -> list[Tensor]:
        """Logits of all 16 codebooks over their temperatures, each [vocabulary], for the codes before them."""
        hidden, first = state
        others = self.model.code_predictor.forced_logits(hidden, codes)
        return [first[0, :-1].float() / self._temperature, *(logits.float() for logits in others)]


def _agreement(exact: Tensor, other: Tensor, top_k: int) -> tuple[float, float, float]:
    sampled = []
    for logits in (exact, other):
        values, ids = logits.topk(top_k or len(logits))
        sampled.append(torch.zeros_like(logits).index_copy_(0, ids, values.softmax(0)))
    changed = (sampled[0] - sampled[1]).abs().sum() / 2
    error = (other - exact).norm() / (exact - exact.mean()).norm()
    return float(error), float(changed), float(exact.argmax() == other.argmax())


def _mean(agreements: Sequence[Agreement]) -> Agreement:
    rows = torch.tensor([msgspec.structs.astuple(agreement) for agreement in agreements])
    return Agreement(*rows.mean(0).tolist())


def _line(name: str, agreement: Agreement) -> str:
    return f"{name:<24}{agreement.error:>9.2%}{agreement.changed:>20.2%}{agreement.top1:>18.1%}"
