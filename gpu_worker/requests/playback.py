"""The clock of a listener: how much of the audio that was sent has been heard, and how long it ran dry."""


class Playback:
    """The clock of a player that starts with the first piece and keeps nothing back: the strictest there is.

    `now` is the worker's monotonic seconds.
    `underrun_s` is how long the player had played everything that was sent, while its reader could take more.
    """

    def __init__(self) -> None:
        self.underrun_s = 0.0
        self._ends_at: float | None = None

    def add(self, seconds: float, now: float) -> None:
        """The next `seconds` of audio are sent."""
        if self._ends_at is None:
            self._ends_at = now
        elif now > self._ends_at:
            self.underrun_s += now - self._ends_at
            self._ends_at = now
        self._ends_at += seconds

    def resume(self, unread_s: float, now: float) -> None:
        """The reader, which could take no more, takes more again. It still had `unread_s` of audio to read."""
        if self._ends_at is not None:
            self._ends_at = max(self._ends_at, now + unread_s)

    def ahead_s(self, now: float) -> float:
        """How much of the audio that was sent the player has not played yet."""
        return 0.0 if self._ends_at is None else max(0.0, self._ends_at - now)
