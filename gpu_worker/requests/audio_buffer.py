"""The host RAM of audio that waits for its reader and of parked jobs: counted to the byte, within a budget.

Room is set aside for every request with a slot: FLOOR_BYTES of audio, and `headroom_bytes` for what its engine may
still make after it was held back. So such a request can always speak on while its reader takes what is made.

Beyond that a request may keep as many bytes as stay free. So those with the most are held back first,
and n requests whose readers take nothing leave the (n + 1)th part of the budget free for others.

It decides nothing about slots (see `scheduling`) and holds no audio (see `sink`).
"""

from typing import Final

from shared.pcm import bytes_for

FLOOR_BYTES: Final = bytes_for(1.0)
"""Audio that every request with a slot may keep, however full the buffer is."""

IN_FLIGHT_S: Final = 2.5
"""Audio that one step makes for a job, and that its engine makes after the job was held back.

For Qwen3-TTS these are one chunk, and two decoder calls under way, of 0.64 s each.
The pauses between utterances come on top.
"""


class AudioBuffer:
    """Counts the bytes of all requests. `pause_s` is the silence that an engine puts between two utterances."""

    def __init__(self, budget_bytes: int, *, pause_s: float = 0.0) -> None:
        self.budget_bytes = budget_bytes
        self.headroom_bytes = bytes_for(IN_FLIGHT_S + 2 * pause_s)
        self.used_bytes = 0

    def add(self, n_bytes: int) -> None:
        """Keep `n_bytes` more; fewer if negative."""
        self.used_bytes += n_bytes

    def set_aside(self, waiting_bytes: int) -> int:
        """Bytes set aside for a request with a slot, besides the `waiting_bytes` of audio that it keeps."""
        return max(0, FLOOR_BYTES - waiting_bytes) + self.headroom_bytes


def may_grow(waiting_bytes: int, free_bytes: int, *, in_utterance: bool) -> bool:
    """True if a request with a slot may make more audio.

    Within an utterance it may keep twice as much: most requests so stop between two utterances, where to park one
    takes no memory.
    """
    return waiting_bytes <= max(FLOOR_BYTES, 2 * free_bytes if in_utterance else free_bytes)


def may_park(parked_bytes: int, free_bytes: int) -> bool:
    """True if there is room for a job that is parked in about `parked_bytes`: as much must stay free.

    An engine may keep more than it said, up to twice as much: host memory is allocated in powers of two.
    """
    return 2 * parked_bytes <= max(0, free_bytes)
