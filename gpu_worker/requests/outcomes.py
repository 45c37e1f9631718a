"""The outcomes of the latest requests, for clients whose stream broke. Owned by the synthesis thread.

A web worker amends an outcome if the response failed after the last message of the GPU worker.
"""

from typing import Final

import msgspec

from shared.protocol import SpeechError, SpeechOutcome, is_known_as

MAX_OUTCOMES: Final = 1024
"""About a kilobyte each."""

MAX_MESSAGE: Final = 500
"""Characters of an error's message that are kept: it may quote a list of voices, or an exception of a library."""


class Outcomes:
    """The last MAX_OUTCOMES requests that have ended."""

    def __init__(self) -> None:
        self._by_id: dict[str, SpeechOutcome] = {}  # the oldest first

    def record(self, outcome: SpeechOutcome) -> None:
        """Keep the outcome of a request that has ended, and forget the oldest one if there are too many."""
        self._by_id.pop(outcome.id, None)
        self._by_id[outcome.id] = _bounded(outcome)
        if len(self._by_id) > MAX_OUTCOMES:
            del self._by_id[next(iter(self._by_id))]

    def amend(self, speak_id: str, error: SpeechError | None) -> None:
        """The client has not received the whole response of a request that was done: it left, or by `error`."""
        outcome = self._by_id.get(speak_id)
        if outcome is not None and outcome.status == "done":
            status = "cancelled" if error is None else "failed"
            self._by_id[speak_id] = _bounded(msgspec.structs.replace(outcome, status=status, error=error))

    def find(self, name: str, client: str) -> SpeechOutcome | None:
        """The latest outcome that is known as `name`, of that client if there is a `client`."""
        for outcome in reversed(self._by_id.values()):
            if is_known_as(outcome.id, name) and client in ("", outcome.client):
                return outcome
        return None


def _bounded(outcome: SpeechOutcome) -> SpeechOutcome:
    if outcome.error is None or len(outcome.error.message) <= MAX_MESSAGE:
        return outcome
    error = msgspec.structs.replace(outcome.error, message=outcome.error.message[:MAX_MESSAGE] + "…")
    return msgspec.structs.replace(outcome, error=error)
