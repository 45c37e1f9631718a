"""The text tokenizer of a checkpoint, with the ids of the official package.

It is built with the `tokenizers` library alone. The official processor builds the same tokenizer, but through
transformers, whose import costs seconds of CPU time at each start of the process.

Building one of the published size (151,643 entries) holds the GIL for 0.3 to 0.5 s, in which no stream gets audio.
SharedTokenizers therefore builds one for all checkpoints with equal files, before anybody speaks.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
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


Tokenize = Callable[[str], Sequence[int]]
"""Text -> token ids."""


class SharedTokenizers:
    """The tokenizers of this process by the contents of their files. They stay for good. Any thread may call `load`."""

    def __init__(self) -> None:
        self._tokenizers: dict[bytes, Tokenize] = {}
        self._lock = threading.Lock()

    def load(self, directory: Path) -> Tokenize:
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


def load_text_tokenizer(directory: Path) -> Tokenize:
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

    def tokenize(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    return tokenize


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
