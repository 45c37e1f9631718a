"""The bounds of a request that settings give. A reload brings others."""

import msgspec


class RequestBounds(msgspec.Struct, frozen=True, kw_only=True):
    """How long a reader may take nothing, how long an open request may wait for text, and how much text there may be.

    `max_input_chars` bounds the text of an open request in all its parts.
    """

    stall_timeout_s: float
    open_text_timeout_s: float
    max_input_chars: int
