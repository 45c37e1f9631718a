import pytest

from shared.speakable import is_speakable


@pytest.mark.parametrize("text", ["", " \n\t", "\0\x1b", "\u200b\u200d\ufeff", "\u00a0\u3000", "\ud800"])
def test_control_characters_and_spaces_are_not_speakable(text: str) -> None:
    """Neither engine can speak them."""
    assert not is_speakable(text)
    assert not is_speakable(text, needs_word=True)


@pytest.mark.parametrize("text", ["\U0001f600", "?!", "…", "\u0301"])
def test_marks_and_symbols_are_speakable_but_no_words(text: str) -> None:
    """Only the stricter rule refuses them."""
    assert is_speakable(text)
    assert not is_speakable(text, needs_word=True)


@pytest.mark.parametrize("text", ["a", "7", "Ⅳ", "你好", "\0 \U0001f600 é"])
def test_one_letter_or_digit_of_any_script_is_enough(text: str) -> None:
    """Both rules accept the text, whatever else it contains."""
    assert is_speakable(text)
    assert is_speakable(text, needs_word=True)
