"""The frames that the vocoder decodes at once: the first chunk alone, later ones together."""

from typing import Final

CHUNK_SCHEDULE: Final = (1, 1, 2, 4, 8)
"""Frames of an utterance's first, second ... chunk; the last number holds for all further chunks.

The first audio comes at once, then there are fewer and cheaper decoder calls. The second frame is a chunk of its own:
of the first 80 ms an MP3 encoder emits only 48 ms, which must last until the second chunk.
"""

CHUNK_LENGTHS: Final = sorted(set(CHUNK_SCHEDULE))
"""The only lengths that are decoded: of these there are CUDA graphs, and their products round the same in any batch.

The rest of an utterance is decoded in several of them: any split gives the same audio.
"""

MAX_CHUNK_FRAMES: Final = max(CHUNK_SCHEDULE)


def chunk_frames(chunks: int) -> int:
    """Frames of the next chunk of an utterance, `chunks` of which have been decoded."""
    return CHUNK_SCHEDULE[min(chunks, len(CHUNK_SCHEDULE) - 1)]
