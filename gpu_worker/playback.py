"""What a listener makes of a stream: how long a player would have had nothing to play, through our fault.

The player is the strictest there is: it begins with the first piece and keeps nothing back.
It knows neither requests nor credits; who calls it says when the reader, not the engine, held the stream up.
"""


class Playback:
    """One stream as it is heard; `now` is the worker's monotonic seconds throughout.

    `audio_s` is what was given to the player, `dry_s` how long it had run out of that,
    `held_s` how long the reader took nothing: the player stands still meanwhile, as it cannot play what nobody reads.
    """

    def __init__(self) -> None:
        self.audio_s = 0.0
        self.dry_s = 0.0
        self.held_s = 0.0
        self._ends_at: float | None = None
        self._held_since: float | None = None

    def add(self, seconds: float, now: float) -> None:
        """The next piece is on its way to the player."""
        if self._held_since is not None:
            now = self._held_since
        if self._ends_at is None:
            self._ends_at = now
        elif now > self._ends_at:
            self.dry_s += now - self._ends_at
            self._ends_at = now
        self._ends_at += seconds
        self.audio_s += seconds

    def hold(self, now: float) -> None:
        """The reader takes no more for now."""
        if self._held_since is None:
            self._held_since = now

    def go_on(self, now: float) -> None:
        """The reader takes more again; without effect where it never stopped."""
        if self._held_since is None:
            return
        held_s = now - self._held_since
        self._held_since = None
        self.held_s += held_s
        if self._ends_at is not None:
            self._ends_at += held_s
