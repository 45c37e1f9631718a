"""Which texts can be spoken, and which names can be shown."""

import pytest

from shared.text import is_blank, is_printable, is_speakable


@pytest.mark.parametrize("text", ["", " \n\t", "\0\x1b", "\u200b\u200d\ufeff", "\u00a0\u3000", "\ud800"])
def test_control_characters_and_spaces_are_blank(text: str) -> None:
    """They cannot be seen, and not be spoken."""
    assert is_blank(text)
    assert not is_speakable(text)


@pytest.mark.parametrize(
    "text",
    [
        "\U0001f600",
        "\U0001fae9",
        "?!",
        "…",
        "---\n",
        "*",
        "()",
        "\u0301",
        "\ufffd",
        "\ue000",
        "<|im_end|>",
        "<tts_pad>",
    ],
)
def test_marks_symbols_and_control_tokens_are_no_words(text: str) -> None:
    """They can be seen, and no engine speaks them. Emoji that this Python does not know are among them."""
    assert not is_blank(text)
    assert not is_speakable(text)


@pytest.mark.parametrize("text", ["a", "7", "Ⅳ", "你好", "\0 \U0001f600 é"])
def test_one_letter_or_digit_of_any_script_is_enough(text: str) -> None:
    """The text can be spoken, whatever else it contains."""
    assert is_speakable(text)


@pytest.mark.parametrize(
    "name",
    ["Ada", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\U0001f468\u200d\U0001f469\u200d\U0001f467"],
)
def test_names_may_have_joiners(name: str) -> None:
    """Joiners within words and emoji do not make a name unprintable."""
    assert is_printable(name)


@pytest.mark.parametrize("name", ["", " \u200d ", "two\nlines", "\u202eright to left"])
def test_invisible_names_are_not_printable(name: str) -> None:
    """A name needs a visible character, and must not steer a terminal or the direction of writing."""
    assert not is_printable(name)
