"""Prompts: the embeddings that an utterance begins with, and the text embeddings that follow, one for each frame.

Owns the official layouts of all tasks, equal to the last bit, and a cache of their constant parts.
It knows nothing of slots, sampling or audio: references come as codes and a speaker embedding.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import msgspec
import torch
from torch import Tensor

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.model_config import ModelConfig
from gpu_worker.engines.qwen.model.text_projection import TextProjection
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN, Products
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
    """`embeds` [tokens, hidden] are read at once, `trailing` [frames, hidden] one a frame, padding after them.

    The first `constant` of `embeds` depend on voice, language and instructions, and not on the text.
    """

    embeds: Tensor
    trailing: Tensor
    constant: int = 0


class Voice(msgspec.Struct, frozen=True, kw_only=True):
    """The voice to speak with: a preset's name, or a recording's speaker `embedding` [hidden], or neither.

    In-context cloning (ICL) also takes the recording's `codes`, int64 [frames, groups], and its `transcript`.
    """

    name: str = ""
    embedding: Tensor | None = None
    codes: Tensor | None = None
    transcript: str = ""


class TextRows(Protocol):
    """The rows of the text embedding, wherever they are."""

    def __getitem__(self, numbers: Sequence[int]) -> Tensor:
        """The rows of these tokens, [tokens, hidden]."""


class PromptBuilder(TensorHolder):
    """Builds prompts from text; holds the text embedding and its projection."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: ModelConfig,
        tokenize: Callable[[str], Sequence[int]],
        embed_codes: Callable[[Tensor], Tensor],
        *,
        text_embedding: Tensor | TextRows | None = None,
        codec_embedding: Tensor | None = None,
        products: Products = PLAIN,
        settled: Callable[[str], Sequence[int]] = lambda _text: (),
    ) -> None:
        """`weights`: the checkpoint's, on the device. `tokenize`: the checkpoint's processor.

        `text_embedding`: that of `weights` in the dtype of the file, or what reads its rows there. It is the largest
        tensor of a checkpoint, 620 MB in bfloat16, and a prompt needs one row of 4 KiB for each token.
        `codec_embedding`: that of `weights`, perhaps in fewer bits that hold all of its values.
        `products`: of the text projection.
        `settled`: the first tokens of every text that begins with a text.
        `embed_codes`: int64 [frames, groups] -> [frames, hidden], the sum of each frame's code embeddings.
        """
        self._config = config
        self._tokenize = functools.lru_cache(maxsize=LAST_TEXTS)(tokenize)
        self.settled = settled
        self._embed_codes = embed_codes
        self.text_embedding = weights[TEXT_EMBEDDING] if text_embedding is None else text_embedding
        if codec_embedding is None:
            codec_embedding = weights["talker.model.codec_embedding.weight"]
        self.codec_embedding = codec_embedding
        self._projection = TextProjection(weights, products)
        self._dtype = self._projection.dtype
        self._prefixes: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._prefix_hits = self._prefix_misses = 0
        self._control_embeddings: tuple[Tensor, Tensor, Tensor] | None = None

    def count(self, text: str) -> int:
        """Tokens of `text`, without those of the chat template."""
        return len(self.ids(text))

    def build(self, text: str, voice: Voice, *, language: str, instructions: str, whole_text: bool) -> Prompt:
        """The prompt of one utterance.

        `language`: "auto" or a name that the model knows.
        `whole_text`: the layout in which all text comes before the first frame (`non_streaming_mode`).

        Raises:
            JobError: `invalid_value` where `text` has no tokens.
        """
        if not whole_text:
            return self.begin(
                self.ids(text),
                voice,
                language=language,
                instructions=instructions,
                complete=True,
                row_by_row=False,
            )
        parts = self._before_text(voice, language, instructions)
        constant = sum(map(len, parts))
        _, eos, pad = self._controls()
        if voice.codes is not None:
            texts = torch.cat((self._project([*self._transcript_ids(voice), *self.ids(text)]), eos))
            frames = self._reference_frames(voice.codes)
            parts += [texts + self._codec(self._config.talker_config.codec_pad_id), frames + pad]
        else:
            shape = self._config.talker_config
            texts = torch.cat((self._project(self.ids(text)), eos))
            parts += [texts + self._codec(shape.codec_pad_id), pad + self._codec(shape.codec_bos_id)]
        return Prompt(torch.cat(parts), pad, constant)

    def begin(
        self,
        ids: Sequence[int],
        voice: Voice,
        *,
        language: str,
        instructions: str,
        complete: bool,
        row_by_row: bool = True,
    ) -> Prompt:
        """The prompt of one utterance that reads its text frame by frame.

        `ids`: the tokens of its text, or the first of them if it is not `complete`: at least `least_ids(voice)`.
        `row_by_row`: see `text_rows`.
        """
        parts = self._before_text(voice, language, instructions)
        constant = sum(map(len, parts))
        if voice.codes is not None:
            _, _, pad = self._controls()
            transcript = self._transcript_ids(voice)
            texts = self.text_rows([*transcript, *ids], complete=complete, row_by_row=row_by_row)
            frames = self._reference_frames(voice.codes)
            if row_by_row:  # otherwise the number of text tokens may change the bits of the transcript's
                constant += min(len(transcript), len(frames) - 1)  # the last position is always read
            padding = pad.expand(max(0, len(frames) - len(texts)), -1)
            parts.append(torch.cat((texts[: len(frames)], padding)) + frames)
            trailing = texts[len(frames) :] if len(texts) > len(frames) or not complete else pad
        else:
            parts.append(self._project(ids[:1]) + self._codec(self._config.talker_config.codec_bos_id))
            trailing = self.text_rows(ids[1:], complete=complete, row_by_row=row_by_row)
        return Prompt(torch.cat(parts), trailing, constant)

    def least_ids(self, voice: Voice) -> int:
        """How many tokens of its text the prompt of an utterance has if it reads its text frame by frame."""
        if voice.codes is None:
            return 1
        return max(1, len(voice.codes) + 1 - len(self._transcript_ids(voice)))

    def text_rows(self, ids: Sequence[int], *, complete: bool, row_by_row: bool = True) -> Tensor:
        """The embeddings of text tokens [tokens, hidden]; if the text is `complete`, with its end.

        `row_by_row`: a row does not depend on the others, so a text in pieces has the same rows as the whole one.
        Otherwise they are projected at once as in the official package, which may round the last bit differently.
        """
        rows = self.codec_embedding[:0].to(self._dtype)
        if ids and row_by_row:
            rows = self._projection.row_by_row(self._embed(ids))
        elif ids:
            rows = self._project(ids)
        return torch.cat((rows, self._controls()[1])) if complete else rows

    def _before_text(self, voice: Voice, language: str, instructions: str) -> list[Tensor]:
        parts = []
        if instructions:
            parts.append(self._project(self._tokenize(f"<|im_start|>user\n{instructions}<|im_end|>\n")))
        parts.append(self._prefix(voice, language))
        return parts

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

    def clear_tokens(self) -> None:
        """Drop the tokens of the last texts."""
        self._tokenize.cache_clear()

    def clear_cache(self) -> None:
        """Free the cached prefixes and control embeddings; the next `build` makes them again."""
        self._prefixes.clear()
        self._control_embeddings = None

    def _transcript_ids(self, voice: Voice) -> Sequence[int]:
        ids = self._tokenize(f"<|im_start|>assistant\n{voice.transcript}<|im_end|>\n")
        return ids[_ROLE_TOKENS:-_REFERENCE_TAIL_TOKENS]

    def _reference_frames(self, codes: Tensor) -> Tensor:
        """The codec track of a recording to continue (`generate_icl_prompt`)."""
        return torch.cat((self._codec(self._config.talker_config.codec_bos_id), self._embed_codes(codes)))

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

    def ids(self, text: str) -> Sequence[int]:
        """Tokens of `text`; JobError (`invalid_value`) if it has none."""
        ids = self._tokenize(f"<|im_start|>assistant\n{text}<|im_end|>\n<|im_start|>assistant\n")[
            _ROLE_TOKENS:-_TAIL_TOKENS
        ]
        if not ids:
            raise JobError("invalid_value", "there is nothing to say in this text", param="input")
        return ids

    def _codec(self, *ids: int) -> Tensor:
        """Rows of the codec embedding, [ids, hidden]."""
        return self.codec_embedding[to_device(ids, self.codec_embedding.device)].to(self._dtype)

    def _project(self, ids: Sequence[int]) -> Tensor:
        """Text tokens -> embeddings [tokens, hidden].

        It is called for the same runs of tokens as in the official package:
        a matrix product with another number of rows may round differently.
        """
        return self._projection.at_once(self._embed(ids))

    def _embed(self, ids: Sequence[int]) -> Tensor:
        """Rows of the text embedding, [ids, text hidden]."""
        table = self.text_embedding
        rows = table[to_device(ids, table.device)] if isinstance(table, Tensor) else table[ids]
        return rows.to(self._dtype)
