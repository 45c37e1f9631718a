"""Recordings that voices are cloned from: checked, encoded beside the steps, kept within a byte budget.

It owns one background thread and the cache of encoded prompts.
It knows neither slots nor prompts; the encoders are handed in.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import msgspec
import numpy as np
from torch import Tensor

from gpu_worker.engines.base import JobError, Reference
from gpu_worker.engines.qwen.codec.state import Snapshot
from shared.pcm import SAMPLE_RATE

SHORTEST_S: Final = 0.5
LONGEST_S: Final = 60.0
"""A minute is 750 positions of the slot's cache."""

SILENCE_RMS: Final = 1e-3
"""-60 dB of full scale: nothing in such a recording is a voice."""


class EncodedReference(msgspec.Struct, frozen=True):
    """What a recording becomes: `embedding` [hidden]; for ICL also `codes` int64 [frames, groups]

    and `primed`, the codec's state once it has heard them.
    """

    embedding: Tensor
    codes: Tensor | None = None
    primed: Snapshot | None = None

    @property
    def bytes(self) -> int:
        """Bytes it holds."""
        codes = 0 if self.codes is None else self.codes.nbytes
        return self.embedding.nbytes + codes + (0 if self.primed is None else self.primed.bytes)


MOST_WAITING: Final = 32
"""Recordings that wait to be encoded, at 6 MB each; a job that is given up leaves its own behind."""


class References:
    """Encodes references in one background thread and remembers them by their keys."""

    def __init__(self, encode: Callable[[np.ndarray, bool], EncodedReference], max_bytes: int) -> None:
        """encode(waveform float32 [samples] at 24 kHz, whether codes are wanted), called from the thread."""
        self._encode = encode
        self._max_bytes = max_bytes
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="references")
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, EncodedReference] = OrderedDict()
        self._running: dict[str, Future[EncodedReference]] = {}
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes that the kept references hold."""
        return self._bytes

    def request(self, reference: Reference) -> Future[EncodedReference]:
        """The encoded reference, now or later; its future raises what encoding raised.

        Raises:
            JobError: `invalid_audio` where the recording is too short, too long or silent;
                `queue_full` where MOST_WAITING others wait, of jobs that may be gone by now.
        """
        with self._lock:
            if reference.key in self._kept:
                self._kept.move_to_end(reference.key)
                done: Future[EncodedReference] = Future()
                done.set_result(self._kept[reference.key])
                return done
            if reference.key not in self._running:
                waveform = check(reference)
                if len(self._running) >= MOST_WAITING:
                    message = f"{MOST_WAITING} recordings are waiting to be encoded"
                    raise JobError("queue_full", message, param="ref_audio", retry_after_s=5)
                future = self._thread.submit(self._work, reference.key, waveform, not reference.x_vector_only)
                self._running[reference.key] = future
            return self._running[reference.key]

    def clear(self) -> None:
        """Forget every kept reference, and those that are still to be encoded; nobody waits for one any more.

        Nothing is encoded when this returns, so the encoders' weights may be moved.
        """
        with self._lock:
            self._running = {key: future for key, future in self._running.items() if not future.cancel()}
            running = list(self._running.values())
        wait(running)
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def close(self) -> None:
        """End the thread, after what it is encoding."""
        self.clear()
        self._thread.shutdown()

    def _work(self, key: str, waveform: np.ndarray, wants_codes: bool) -> EncodedReference:  # noqa: FBT001 -- called by the thread pool alone
        try:
            encoded = self._encode(waveform, wants_codes)
        except BaseException:
            with self._lock:
                self._running.pop(key, None)
            raise
        with self._lock:
            self._running.pop(key, None)
            if encoded.bytes <= self._max_bytes:
                self._kept[key] = encoded
                self._bytes += encoded.bytes
            while self._bytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.bytes
        return encoded


def check(reference: Reference) -> np.ndarray:
    """The recording as float32 [samples] in -1..1.

    Raises:
        JobError: `invalid_audio`, saying what is wrong with it.
    """
    if len(reference.pcm) % 2:
        raise JobError("invalid_audio", "the reference ends inside a sample", param="ref_audio")
    waveform = np.frombuffer(reference.pcm, dtype="<i2").astype(np.float32) / 32768
    seconds = len(waveform) / SAMPLE_RATE
    if not SHORTEST_S <= seconds <= LONGEST_S:
        raise JobError(
            "invalid_audio",
            f"the reference is {seconds:.2f} s long; {SHORTEST_S:g} to {LONGEST_S:g} s are taken",
            param="ref_audio",
        )
    if float(np.sqrt(np.mean(waveform**2))) < SILENCE_RMS:
        raise JobError("invalid_audio", "the reference is silent", param="ref_audio")
    return waveform
