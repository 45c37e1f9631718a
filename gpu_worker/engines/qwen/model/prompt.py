"""Prompts: the embeddings that an utterance begins with, and the text embeddings that follow, one for each frame.

Owns the official layouts of all tasks, equal to the last bit, and a cache of their constant parts.
It knows nothing of slots, sampling or audio: references come as codes and a speaker embedding.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.model_config import ModelConfig
from gpu_worker.engines.qwen.runtime.transfers import to_device
from gpu_worker.engines.qwen.tensor_holder import TensorHolder
from shared.protocol import CacheStats

TEXT_EMBEDDING: Final = "talker.model.text_embedding.weight"

MAX_CACHED_PREFIXES: Final = 256
"""Constant prefixes kept: the speakers times the languages of every published model fit."""

LAST_TEXTS: Final = 8
"""Texts whose tokens are kept: an admission counts the same text up to three times, 0.2 ms each."""

_ROLE_TOKENS: Final = 3
"""Tokens of "<|im_start|>assistant\\n"."""
_TAIL_TOKENS: Final = 5
"""Tokens of "<|im_end|>\\n<|im_start|>assistant\\n"."""
_REFERENCE_TAIL_TOKENS: Final = 2
"""Tokens of "<|im_end|>\\n"."""


class Prompt(msgspec.Struct, frozen=True):
    """`embeds` [tokens, hidden] are read at once, `trailing` [frames, hidden] one a frame, padding after them."""

    embeds: Tensor
    trailing: Tensor


class Voice(msgspec.Struct, frozen=True, kw_only=True):
    """The voice to speak with: a preset's name, or a recording's speaker `embedding` [hidden], or neither.

    In-context cloning (ICL) also takes the recording's `codes`, int64 [frames, groups], and its `transcript`.
    """

    name: str = ""
    embedding: Tensor | None = None
    codes: Tensor | None = None
    transcript: str = ""


class PromptBuilder(TensorHolder):
    """Builds prompts from text; holds the text embedding and its projection."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: ModelConfig,
        tokenize: Callable[[str], Sequence[int]],
        embed_codes: Callable[[Tensor], Tensor],
        *,
        text_embedding: Tensor | None = None,
    ) -> None:
        """`weights`: the checkpoint's, on the device. `tokenize`: the checkpoint's processor.

        `text_embedding`: that of `weights` in the dtype of the file, which is half as large as float32: 620 MB less.

        `embed_codes`: int64 [frames, groups] -> [frames, hidden], the sum of each frame's code embeddings.
        """
        projection = "talker.text_projection.linear_fc"
        self._config = config
        self._tokenize = functools.lru_cache(maxsize=LAST_TEXTS)(tokenize)
        self._embed_codes = embed_codes
        self.text_embedding = weights[TEXT_EMBEDDING] if text_embedding is None else text_embedding
        self.codec_embedding = weights["talker.model.codec_embedding.weight"]
        self.fc1 = [weights[f"{projection}1.weight"], weights[f"{projection}1.bias"]]
        self.fc2 = [weights[f"{projection}2.weight"], weights[f"{projection}2.bias"]]
        self._prefixes: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._prefix_hits = self._prefix_misses = 0
        self._control_embeddings: tuple[Tensor, Tensor, Tensor] | None = None

    def count(self, text: str) -> int:
        """Tokens of `text`, without those of the chat template."""
        return len(self._text_ids(text))

    def build(self, text: str, voice: Voice, *, language: str, instructions: str, whole_text: bool) -> Prompt:
        """The prompt of one utterance.

        `language`: "auto" or a name that the model knows.
        `whole_text`: the layout in which all text comes before the first frame (`non_streaming_mode`).

        Raises:
            JobError: `invalid_value` where `text` has no tokens.
        """
        _, eos, pad = self._controls()
        ids = self._text_ids(text)
        parts = []
        if instructions:
            parts.append(self._project(self._tokenize(f"<|im_start|>user\n{instructions}<|im_end|>\n")))
        parts.append(self._prefix(voice, language))
        if voice.codes is not None:
            reference = self._tokenize(f"<|im_start|>assistant\n{voice.transcript}<|im_end|>\n")
            texts = torch.cat((self._project([*reference[_ROLE_TOKENS:-_REFERENCE_TAIL_TOKENS], *ids]), eos))
            context, trailing = self._in_context(texts, voice.codes, pad, whole_text=whole_text)
            parts.append(context)
        elif whole_text:
            shape = self._config.talker_config
            texts = torch.cat((self._project(ids), eos))
            parts += [texts + self._codec(shape.codec_pad_id), pad + self._codec(shape.codec_bos_id)]
            trailing = pad
        else:
            parts.append(self._project(ids[:1]) + self._codec(self._config.talker_config.codec_bos_id))
            trailing = torch.cat((self._project(ids[1:]), eos)) if len(ids) > 1 else eos
        return Prompt(torch.cat(parts), trailing)

    def padding(self) -> Tensor:
        """The text embedding of frames behind the text's end, [1, hidden]."""
        return self._controls()[2]

    def cache_stats(self) -> list[CacheStats]:
        """The cached prefixes, and the tokens of the last texts."""
        tokens = self._tokenize.cache_info()
        return [
            CacheStats(
                name="prompts",
                entries=len(self._prefixes),
                bytes=sum(prefix.nbytes for prefix in self._prefixes.values()),
                hits=self._prefix_hits,
                misses=self._prefix_misses,
            ),
            CacheStats(name="tokens", entries=tokens.currsize, bytes=None, hits=tokens.hits, misses=tokens.misses),
        ]

    def forget_tokens(self) -> None:
        """Drop the tokens of the last texts."""
        self._tokenize.cache_clear()

    def clear_cache(self) -> None:
        """Free the cached prefixes and control embeddings; the next `build` makes them again."""
        self._prefixes.clear()
        self._control_embeddings = None

    def _in_context(self, texts: Tensor, codes: Tensor, pad: Tensor, *, whole_text: bool) -> tuple[Tensor, Tensor]:
        """The reference's text and codes, and the text to speak, as one track (`generate_icl_prompt`)."""
        shape = self._config.talker_config
        frames = torch.cat((self._codec(shape.codec_bos_id), self._embed_codes(codes)))
        if whole_text:
            return torch.cat((texts + self._codec(shape.codec_pad_id), frames + pad)), pad
        if len(texts) > len(frames):
            return texts[: len(frames)] + frames, texts[len(frames) :]
        return torch.cat((texts, pad.expand(len(frames) - len(texts), -1))) + frames, pad

    def _prefix(self, voice: Voice, language: str) -> Tensor:
        """Embeddings of role, language, speaker and text begin: constant for a preset voice and a language."""
        if voice.embedding is not None:
            return self._make_prefix(voice.embedding[None], language)
        key = (voice.name, language)
        if key in self._prefixes:
            self._prefix_hits += 1
        else:
            self._prefix_misses += 1
            speaker = self._codec(self._config.talker_config.spk_id[voice.name]) if voice.name else None
            self._prefixes[key] = self._make_prefix(speaker, self._dialect(voice.name, language))
            if len(self._prefixes) > MAX_CACHED_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return self._prefixes[key]

    def _make_prefix(self, speaker: Tensor | None, language: str) -> Tensor:
        shape = self._config.talker_config
        if language == "auto":
            think = [shape.codec_nothink_id, shape.codec_think_bos_id, shape.codec_think_eos_id]
        else:
            identity = shape.codec_language_id[language]
            think = [shape.codec_think_id, shape.codec_think_bos_id, identity, shape.codec_think_eos_id]
        codec = [self._codec(*think), *([] if speaker is None else [speaker]), self._codec(shape.codec_pad_id)]
        track = torch.cat(codec)
        bos, _, pad = self._controls()
        role = self._project(self._tokenize("<|im_start|>assistant\n")[:_ROLE_TOKENS])
        return torch.cat((role, torch.cat((pad.expand(len(track) - 1, -1), bos)) + track))

    def _dialect(self, name: str, language: str) -> str:
        """The language to prompt with: a dialect's speaker uses the dialect where "chinese" or "auto" is requested."""
        dialect = self._config.talker_config.spk_is_dialect.get(name, False)
        return dialect if isinstance(dialect, str) and language in ("auto", "chinese") else language

    def _controls(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of the text's begin, end and padding tokens, each [1, hidden]."""
        if self._control_embeddings is None:
            config = self._config
            bos, eos, pad = self._project(
                [config.tts_bos_token_id, config.tts_eos_token_id, config.tts_pad_token_id]
            ).chunk(3)
            self._control_embeddings = (bos, eos, pad)
        return self._control_embeddings

    def _text_ids(self, text: str) -> Sequence[int]:
        ids = self._tokenize(f"<|im_start|>assistant\n{text}<|im_end|>\n<|im_start|>assistant\n")[
            _ROLE_TOKENS:-_TAIL_TOKENS
        ]
        if not ids:
            raise JobError("invalid_value", "there is nothing to say in this text", param="input")
        return ids

    def _codec(self, *ids: int) -> Tensor:
        """Rows of the codec embedding, [ids, hidden]."""
        return self.codec_embedding[to_device(ids, self.codec_embedding.device)]

    def _project(self, ids: Sequence[int]) -> Tensor:
        """Text tokens -> embeddings [tokens, hidden].

        It is called for the same runs of tokens as in the official package:
        a matrix product with another number of rows may round differently.
        """
        rows = self.text_embedding[to_device(ids, self.text_embedding.device)][None].to(self.codec_embedding.dtype)
        return functional.linear(functional.silu(functional.linear(rows, *self.fc1)), *self.fc2)[0]
