"""The text tokenizer of a checkpoint, with the ids of the official package.

It is built with the `tokenizers` library alone. The official processor builds the same tokenizer, but through
transformers, whose import costs seconds of CPU time at each start of the process.

Building one of the published size (151,643 entries) holds the GIL for 0.5 to 0.7 s, in which no stream gets audio:
0.2 s of it for the sorted vocabulary, which tells what of an unfinished word is sure.
SharedTokenizers therefore builds one for all checkpoints with equal files, before the first request.
"""

import bisect
import hashlib
import itertools
import json
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from packaging.version import Version
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.json_files import read_json, unavailable

_QWEN2_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 tokenizers split a text into words (`Qwen2Converter` of transformers 4.57.3)."""

_UPPER: Final = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER: Final = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_MISTRAL_WORDS: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How transformers splits a text if it is called with `fix_mistral_regex`, as the official package calls it."""

_MISTRAL_VOCABULARY: Final = 100_000
"""transformers applies `fix_mistral_regex` only to a larger vocabulary; the published ones have 151,643 entries."""

_KINDS: Final = {"L": "letter", "M": "letter", "N": "digit"}


class TextTokenizer:
    """The tokenizer of a checkpoint: called with a text, it gives the ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        state = json.loads(tokenizer.pre_tokenizer.__getstate__())
        patterns = [part.get("pattern", {}).get("Regex") for part in state.get("pretokenizers", [state])]
        self._knows_words = bool({_QWEN2_WORDS, _MISTRAL_WORDS} & set(patterns))
        self._vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=False))
        self._longest = max(map(len, self._vocabulary))
        self._added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]

    def __call__(self, text: str) -> Sequence[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def settled(self, text: str) -> Sequence[int]:
        """The first ids of every text that begins with `text`: as many as are sure whatever follows.

        A word of the pre-tokenizer is sure if the next character is of another kind. A pattern looks no further than
        that character, and no normal form joins the two. Letters and marks count as one kind, since patterns differ in
        where they put marks. A digit is always a word of its own.
        Of an unfinished word of letters, those tokens are sure that no token across its end could replace.
        Nothing is sure behind an added token, nor with a pattern that this module does not know.
        """
        if not self._knows_words:
            return ()
        text = self._tokenizer.normalizer.normalize_str(text[: self._start_of_added_token(text)])
        words = self._tokenizer.pre_tokenizer.pre_tokenize_str(text)
        sure = max((start for _, (start, _) in words if _kinds_differ(text, start)), default=0)
        ids = [*self(text[:sure])]
        stem = text[sure : _last_letter(text)]
        words = self._tokenizer.pre_tokenizer.pre_tokenize_str(text[sure:])
        if stem and len(words) == 1 and all(_is_lower(character) for character in text[sure + 1 :]):
            ids += self._settled_in_word(words[0][0][: len(stem.encode())])
        return ids

    def _settled_in_word(self, stem: str) -> list[int]:
        """Ids at the beginning of each word with this `stem`, which is in the byte alphabet of the vocabulary.

        If a token of the word begins at `start`, the tokens before it are those of stem[:start]: merges on one side of
        a place that no merge crosses do not depend on the other side.
        """
        sure: list[int] | None = None
        for start in range(max(0, len(stem) - self._longest), len(stem) + 1):
            if start == len(stem) or self._begins_longer_token(stem[start:]):
                ids = [token.id for token in self._tokenizer.model.tokenize(stem[:start])] if start else []
                sure = ids if sure is None else _common_prefix(sure, ids)
        return sure or []

    def _begins_longer_token(self, text: str) -> bool:
        place = bisect.bisect_right(self._vocabulary, text)
        return place < len(self._vocabulary) and self._vocabulary[place].startswith(text)

    def _start_of_added_token(self, text: str) -> int:
        """Where the first added token begins, or its first part at the text's end."""
        start = len(text)
        for content in self._added:
            found = text.find(content, 0, start)
            start = found if found >= 0 else start
            part = next((size for size in range(len(content) - 1, 0, -1) if text.endswith(content[:size])), 0)
            start = min(start, len(text) - part)
        return start


class SharedTokenizers:
    """The tokenizers of this process by the contents of their files. They stay for good. Any thread may call `load`."""

    def __init__(self) -> None:
        self._tokenizers: dict[bytes, TextTokenizer] = {}
        self._lock = threading.Lock()

    def load(self, directory: Path) -> TextTokenizer:
        """The tokenizer of the checkpoint in `directory`. Raises as load_text_tokenizer does."""
        key = _fingerprint(directory)
        with self._lock:
            if key not in self._tokenizers:
                self._tokenizers[key] = load_text_tokenizer(directory)
            return self._tokenizers[key]


class _AddedToken(msgspec.Struct, frozen=True):
    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True
    special: bool = False


class _TokenizerConfig(msgspec.Struct, frozen=True):
    """tokenizer_config.json: the tokens beyond the vocabulary, by id."""

    added_tokens_decoder: dict[int, _AddedToken] = {}


class _Origin(msgspec.Struct, frozen=True):
    """config.json: the version of transformers that wrote the checkpoint."""

    transformers_version: str | None = None


def load_text_tokenizer(directory: Path) -> TextTokenizer:
    """The tokenizer of the checkpoint in `directory`.

    Raises:
        JobError: `model_unavailable`, naming the file at fault.
    """
    added = read_json(directory / "tokenizer_config.json", _TokenizerConfig).added_tokens_decoder
    whole = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(whole)) if whole.is_file() else _from_vocabulary(directory)
        if tokenizer.get_vocab_size(with_added_tokens=False) > _MISTRAL_VOCABULARY and _takes_mistral_words(directory):
            tokenizer.pre_tokenizer[0] = pre_tokenizers.Split(Regex(_MISTRAL_WORDS), behavior="isolated")
    except JobError:
        raise
    except Exception as error:  # the library raises Exception itself where a file is damaged
        raise unavailable(directory, f"the text tokenizer cannot be loaded: {error}") from error
    for number, token in sorted(added.items()):
        tokenizer.add_tokens([AddedToken(**msgspec.structs.asdict(token))])
        if tokenizer.token_to_id(token.content) != number:
            raise unavailable(directory / "tokenizer_config.json", f"gives {token.content!r} another id than its place")
    return TextTokenizer(tokenizer)


def _kinds_differ(text: str, place: int) -> bool:
    """True if the characters before and at `place` are never of one word, whatever follows."""
    if not place:
        return False
    before, at = _kind(text[place - 1]), _kind(text[place])
    return unicodedata.category(text[place])[0] != "M" and (before != at or at == "digit")


def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    return _KINDS.get(unicodedata.category(character)[0], "other")


def _is_lower(character: str) -> bool:
    """True for letters and marks that no pattern separates from those before them."""
    return unicodedata.category(character) in {"Ll", "Lm", "Lo", "Mn", "Mc", "Me"}


def _last_letter(text: str) -> int:
    """Where the last character begins that a following one may be composed with. Marks belong to the one before."""
    place = len(text) - 1
    while place > 0 and unicodedata.category(text[place])[0] == "M":
        place -= 1
    return max(0, place)


def _common_prefix(one: list[int], other: list[int]) -> list[int]:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [number for number, _ in pairs]


def _fingerprint(directory: Path) -> bytes:
    """A digest of all that `load_text_tokenizer` reads; a missing file counts as an empty one."""
    digest = hashlib.sha256(b"%d" % _takes_mistral_words(directory))
    for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"):
        path = directory / name
        digest.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
    return digest.digest()


def _from_vocabulary(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer(BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _takes_mistral_words(directory: Path) -> bool:
    """The rule of transformers 4.57.3 for a local model of another type than Mistral's: by the version that wrote it.

    It spares a model that 4.57.2 or an older version wrote, or 5.0.0 or a newer one.
    """
    written_by = read_json(directory / "config.json", _Origin).transformers_version
    return not written_by or Version("4.57.2") < Version(written_by) < Version("5.0.0")
