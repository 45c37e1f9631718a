# ruff: noqa: RUF001 -- texts of many scripts
"""The text tokenizer: the ids of the official package, without its imports."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.trainers import BpeTrainer

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.text_tokenizer import (
    _MISTRAL_WORDS,
    SharedTokenizers,
    TextTokenizer,
    load_text_tokenizer,
)
from tests.checkpoints import tiny
from tests.official_package import official_package

Tokenize = Callable[[str], Sequence[int]]
"""Text -> token ids."""

TEXTS = (
    "",
    "hello'today, hello'voice and/or HELLOvoice",
    "<|im_start|>assistant\nGood morning, world.<|im_end|>\n<|im_start|>assistant\n",
    "<tts_pad>in the middle<tts_text_eod> <|im_end|>",
    "  two  spaces\r\n\r\n\tand\u00a0others\u3000 ",
    "12,345.67 € \u2013 it's WE'LL I'D \u0131 \u0130 \u017f",
    "e\u0301 is é, Å is Å, ﬁ stays",
    "今天天气很好。안녕하세요 おはよう मैं हूँ อรุณสวัสดิ์",
    "\U0001f469\u200d\U0001f52c\U0001f1e9\U0001f1ea \ufffd \x00 \x7f",
)


@pytest.fixture(scope="module")
def directory() -> Path:
    """A small checkpoint."""
    return tiny("custom_voice")


@pytest.fixture(scope="module")
def official(directory: Path) -> Tokenize:
    """Its tokenizer by the official package."""
    return official_tokenizer(directory)


@pytest.fixture(scope="module")
def ours(directory: Path) -> Tokenize:
    """Its tokenizer by ours."""
    return load_text_tokenizer(directory)


def official_tokenizer(directory: Path) -> Tokenize:
    """The tokenizer as the official wrapper loads it."""
    processor = official_package().Processor.from_pretrained(str(directory), fix_mistral_regex=True)
    return lambda text: processor.tokenizer(text)["input_ids"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_official_ones(official: Tokenize, ours: Tokenize, text: str) -> None:
    """Control tokens, white space, digits, normal forms and many scripts."""
    assert ours(text) == official(text)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_has_the_official_ids(text: str) -> None:
    """Every text that UTF-8 can carry."""
    directory = tiny("custom_voice")
    assert load_text_tokenizer(directory)(text) == official_tokenizer(directory)(text)


@pytest.mark.parametrize(
    ("version", "like"),
    [
        ("4.57.3", None),
        ("4.57.2", "5.0.0"),
        pytest.param(None, "4.57.4", marks=pytest.mark.soak),
        pytest.param("5.0.0", "5.1.0", marks=pytest.mark.soak),
        pytest.param("4.56.0.dev0", "4.57.2", marks=pytest.mark.soak),
    ],
)
def test_large_vocabularies_are_split_as_officially(
    directory: Path, tmp_path: Path, version: str | None, like: str | None
) -> None:
    """Transformers splits words in a second way if the vocabulary is large and a version near its own wrote it.

    A vocabulary that version `like` wrote is split in the same way.
    """
    large = copied(directory, tmp_path)
    config = json.loads((large / "config.json").read_text()) | {"transformers_version": version}
    (large / "config.json").write_text(json.dumps(config))
    added = json.loads((large / "tokenizer_config.json").read_text())
    tokens = added["added_tokens_decoder"]
    vocabulary = json.loads((large / "vocab.json").read_text())
    for number in tokens:  # as in published checkpoints, their ids lie behind the vocabulary
        del vocabulary[tokens[number]["content"]]
    fillers = {f"filler {number}": len(vocabulary) + number for number in range(100_000)}
    (large / "vocab.json").write_text(json.dumps(vocabulary | fillers))
    added["added_tokens_decoder"] = {str(int(number) + 100_000): token for number, token in tokens.items()}
    (large / "tokenizer_config.json").write_text(json.dumps(added))
    official, ours, small = official_tokenizer(large), load_text_tokenizer(large), load_text_tokenizer(directory)
    assert [ours(text) for text in TEXTS] == [official(text) for text in TEXTS]
    splits_anew = version in ("4.57.3", None)
    assert (len(ours(TEXTS[1])) != len(small(TEXTS[1]))) == splits_anew
    (large / "config.json").write_text(json.dumps(config | {"transformers_version": like}))
    assert load_text_tokenizer(large)(TEXTS[1]) == ours(TEXTS[1])


def test_tokenizer_json_is_read_where_it_lies(directory: Path, tmp_path: Path, official: Tokenize) -> None:
    """Newer versions of transformers write the whole tokenizer into that file."""
    converted = copied(directory, tmp_path)
    official_package().Processor.from_pretrained(str(directory)).tokenizer.save_pretrained(str(converted))
    for name in ("vocab.json", "merges.txt"):
        (converted / name).unlink()
    assert (converted / "tokenizer.json").is_file()
    ours = load_text_tokenizer(converted)
    assert [ours(text) for text in TEXTS] == [official(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("merges.txt", "spoilt"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": "<new>"}}}'),
    ],
)
def test_a_damaged_file_is_named(directory: Path, tmp_path: Path, name: str, content: str) -> None:
    """The error names the file, or the directory where the library does not say which file is at fault."""
    damaged = copied(directory, tmp_path)
    (damaged / name).write_text(content)
    with pytest.raises(JobError, match=str(damaged)) as refusal:
        load_text_tokenizer(damaged)
    assert refusal.value.code == "model_unavailable"


def test_equal_files_share_a_tokenizer(directory: Path, tmp_path: Path) -> None:
    """A copy gets the same one, a checkpoint with another file its own."""
    shared = SharedTokenizers()
    copy = copied(directory, tmp_path)
    assert shared.load(copy) is shared.load(directory)
    (copy / "merges.txt").write_text("#version: 0.2\n")
    assert shared.load(copy) is not shared.load(directory)
    assert len(shared.load(copy)("morning")) > len(shared.load(directory)("morning"))


def copied(directory: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint's small files, which a test may change."""
    return shutil.copytree(directory, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))


SCRIPTS = (
    "Hello world, don't say it's THE End. naïve café Å e\u0301e\u0301\u0323 ﬁn 3.50€ a\u0338=\u0338 ",
    "今天天气很好，我们去公园吧。",
    "おはようございます。カタカナー",
    "안녕하세요 \u1112\u1161\u11ab ",
    "Größe Straße, ǅungla ʼn ",
    "Привет, как дела? ",
    "मैं हूँ क्या ",
    "อรุณสวัสดิ์ครับ",
    "שלום עולם \u05e9\u05c1 ",
    "\U0001f469\u200d\U0001f52c\U0001f1e9\U0001f1ea \ufe0f\u20e3 --- ...",
    "\n\n \t\r\n/ 12,345 <tts_pad> <|im_end|> < |",
    "hello'today HELLOvoice and/or worldmorning",
)
WRITTEN = st.lists(
    st.sampled_from(sorted(set("".join(SCRIPTS))))
    | st.sampled_from([word for text in SCRIPTS for word in text.split()]),
    max_size=12,
).map("".join)
"""Text of many scripts, in characters and words."""


@pytest.fixture(scope="module")
def tokenizers(directory: Path) -> list[TextTokenizer]:
    """A small vocabulary split in the two ways, and one with merges within and across letters of many scripts."""
    plain = load_text_tokenizer(directory)
    made = Tokenizer(BPE())
    made.normalizer, made.pre_tokenizer = plain._tokenizer.normalizer, plain._tokenizer.pre_tokenizer
    made.train_from_iterator(
        [text * 2 for text in SCRIPTS],
        BpeTrainer(vocab_size=700, show_progress=False, initial_alphabet=ByteLevel.alphabet()),
    )
    mistral = Tokenizer.from_str(made.to_str())
    mistral.pre_tokenizer = plain._tokenizer.pre_tokenizer
    mistral.pre_tokenizer[0] = Split(Regex(_MISTRAL_WORDS), behavior="isolated")
    for tokenizer in (made, mistral):
        tokenizer.add_tokens(["<tts_pad>", "<|im_end|>"])
    return [plain, TextTokenizer(made), TextTokenizer(mistral)]


@given(text=WRITTEN, more=WRITTEN)
def test_settled_ids_do_not_depend_on_what_follows(tokenizers: list[TextTokenizer], text: str, more: str) -> None:
    """They are the first ids of the text alone, and of the text with anything behind it."""
    for tokenizer in tokenizers:
        settled = list(tokenizer.settled(text))
        assert list(tokenizer(text + more))[: len(settled)] == settled


@pytest.mark.parametrize(
    ("text", "held_back"),
    [
        ("Hello", "Hello"),
        ("Hello ", " "),
        ("Hello wor", " wor"),
        ("Hello world,", ","),
        ("It costs 3", "3"),
        ("It costs 35", "5"),
        ("a\u0301", "a\u0301"),
        ("x=", "="),
        ("今天天气很好，", "，"),
        ("hi \U0001f469", " \U0001f469"),
    ],
)
def test_only_an_unfinished_word_is_held_back(text: str, held_back: str) -> None:
    """In a vocabulary of bytes, of such a word its last letter alone."""
    tokenizer = load_text_tokenizer(tiny("custom_voice"))
    sure = text.removesuffix(held_back)
    assert list(tokenizer.settled(text))[: len(tokenizer(sure))] == list(tokenizer(sure))
    assert len(tokenizer.settled(text)) < len(tokenizer(text))


def test_words_without_spaces_are_settled_letter_by_letter() -> None:
    """Chinese needs no punctuation: only the last character, and what may be in a token with it, is held back."""
    tokenizer = load_text_tokenizer(tiny("custom_voice"))
    text = "今天天气很好"
    assert tokenizer.settled(text) == tokenizer(text[:-1])
    assert tokenizer.settled("おはよう") == tokenizer("おはよ")
    assert tokenizer.settled("hellox") == tokenizer("hello")
