import pytest

from shared.names import is_printable


@pytest.mark.parametrize(
    ("name", "printable"),
    [
        ("Ada", True),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", True),
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467", True),
        ("", False),
        (" \u200d ", False),
        ("two\nlines", False),
        ("\u202eright to left", False),
    ],
)
def test_what_can_be_seen_is_printable(name: str, printable: bool) -> None:  # noqa: FBT001 -- a parameter
    """Joiners within words and emoji are no reason to refuse a name; what steers a terminal is."""
    assert is_printable(name) == printable
