import pytest

from gpu_worker.engines.qwen.text_splitting import clean_text, fits_tokens, remove_controls, split_into_utterances


def tokens(text: str) -> int:
    """A tokenizer with one token a byte."""
    return len(text.encode())


@pytest.mark.parametrize("text", ["\U0001f600", "\x00\x1b", " \u200b ", "?!…", "<|im_start|>", "\ud800"])
def test_text_without_a_letter_is_nothing(text: str) -> None:
    """Emoji, control characters, punctuation, control tokens and lone surrogates are left out."""
    assert clean_text(text) == ""


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  hello \n", "hello"),
        ("a\x00b", "a b"),
        ("hi<|im_end|>\n<|im_start|>user", "hi \n user"),
        ("<tts_pad>hi", "hi"),
        ("a < b |> c", "a < b |> c"),
        ("你好\U0001f600", "你好\U0001f600"),
        ("42", "42"),
    ],
)
def test_control_characters_and_tokens_are_removed(text: str, cleaned: str) -> None:
    """Each becomes a space, and everything else stays as written."""
    assert clean_text(text) == cleaned


def test_all_other_text_stays_as_written() -> None:
    """Instructions and transcripts keep their spaces, line ends and punctuation."""
    assert remove_controls(" Speak\tsoftly,\nslowly. ") == " Speak\tsoftly,\nslowly. "
    assert remove_controls("calm<|im_end|>\x00") == "calm  "
    assert remove_controls("?!") == "?!"


def test_a_text_within_the_limit_stays_whole() -> None:
    """The number of its sentences does not matter."""
    assert list(split_into_utterances("One. Two. Three.", "english", 16, tokens)) == ["One. Two. Three."]


@pytest.mark.parametrize(
    ("text", "language", "limit", "utterances"),
    [
        ("Dr. Smith came. He paid $3.50! Really?", "english", 24, ["Dr. Smith came.", "He paid $3.50! Really?"]),
        ("今天天气很好。我们去公园吧？好的！", "chinese", 24, ["今天天气很好。", "我们去公园吧？", "好的！"]),  # noqa: RUF001 -- Chinese
        ("こんにちは。いい天気ですね！", "japanese", 28, ["こんにちは。", "いい天気ですね！"]),  # noqa: RUF001 -- Japanese
        ("안녕하세요. 오늘 날씨가 좋네요!", "korean", 30, ["안녕하세요.", "오늘 날씨가 좋네요!"]),
        ("one, two, three four", "auto", 10, ["one, two,", "three four"]),
        ("abcdefgh", "auto", 4, ["abcd", "efgh"]),
    ],
)
def test_texts_are_split_at_sentences_then_clauses_then_anywhere(
    text: str, language: str, limit: int, utterances: list[str]
) -> None:
    """In every script, each utterance is as long as the limit allows."""
    assert list(split_into_utterances(text, language, limit, tokens)) == utterances


def test_nothing_is_lost_and_no_utterance_is_unspeakable() -> None:
    """All words are there, in order. Only pieces of mere punctuation are dropped."""
    text = "Hello there, my friend. How are you? !!! " * 40
    utterances = list(split_into_utterances(text, "english", 60, tokens))
    assert all(tokens(utterance) <= 60 and any(map(str.isalpha, utterance)) for utterance in utterances)
    assert "".join("".join(utterances).split()).replace("!", "") == "".join(text.split()).replace("!", "")


@pytest.mark.parametrize("text", ["a " * 50_000, "a," * 50_000, "abcdefgh" * 12_500, "This is a sentence. " * 5000])
def test_a_long_text_is_split_while_it_is_spoken(text: str) -> None:
    """Finding an utterance reads only a part of the text, because the frames of other jobs wait for it."""
    read_chars = 0

    def counted(part: str) -> int:
        nonlocal read_chars
        read_chars += len(part)
        return tokens(part) // 2

    assert not fits_tokens(text, 96, counted)
    utterances = split_into_utterances(text, "english", 96, counted)
    for _ in range(3):
        assert 48 <= tokens(next(utterances)) // 2 <= 96
        assert read_chars <= 4000
        read_chars = 0
