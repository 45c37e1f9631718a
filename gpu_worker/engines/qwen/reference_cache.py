"""Recordings that voices are cloned from: encoded beside the steps, kept within a byte budget.

It owns one background thread and the cache of encoded prompts.
It knows neither slots nor prompts; the encoders are handed in.
"""

import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import msgspec
import numpy as np
from torch import Tensor

from gpu_worker.engines.base import JobError, Reference
from gpu_worker.engines.qwen.codec.decoder_state import Snapshot
from gpu_worker.voices import check_recording


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
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of it."""
        yield self.embedding
        if self.codes is not None:
            yield self.codes
        if self.primed is not None:
            yield from (self.primed.rings, self.primed.history, self.primed.positions)


MOST_WAITING: Final = 32
"""Recordings that wait to be encoded, at 3 MB each."""


class _Waiting(msgspec.Struct):
    """A recording that is to be encoded, or is; `jobs` wait for it."""

    reference: Reference
    future: Future[EncodedReference]
    jobs: int = 1


class ReferenceCache:
    """Encodes references in one background thread and remembers them by their keys."""

    def __init__(
        self,
        encode: Callable[[np.ndarray, bool], EncodedReference],
        max_bytes: int,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """encode(waveform float32 [samples] at 24 kHz, whether codes are wanted), called from the thread.

        `wake` is called, from any thread, once a future that was not yet done is.
        """
        self._encode = encode
        self._max_bytes = max_bytes
        self._wake = wake
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="references")
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, EncodedReference] = OrderedDict()
        self._waiting: dict[str, _Waiting] = {}
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes that the kept references hold."""
        return self._bytes

    def request(self, reference: Reference) -> Future[EncodedReference]:
        """The encoded reference, now or later; its future raises what encoding raised.

        A recording that is known is not looked at again.

        Raises:
            JobError: `invalid_audio` where the recording is too short, too long or silent;
                `queue_full` where MOST_WAITING others wait.
        """
        with self._lock:
            if reference.key in self._kept:
                self._kept.move_to_end(reference.key)
                done: Future[EncodedReference] = Future()
                done.set_result(self._kept[reference.key])
                return done
            waiting = self._waiting.get(reference.key)
            if waiting is not None:
                waiting.jobs += 1
                return waiting.future
            check_recording(reference.pcm, "ref_audio")
            if len(self._waiting) >= MOST_WAITING:
                message = f"{MOST_WAITING} recordings are waiting to be encoded"
                raise JobError("queue_full", message, param="ref_audio", retry_after_s=5)
            # The thread is given the key alone: what is cancelled stays in its queue until its turn comes.
            future = self._thread.submit(self._work, reference.key)
            self._waiting[reference.key] = _Waiting(reference, future)
        future.add_done_callback(lambda _: self._wake())
        return future

    def give_up(self, key: str, future: Future[EncodedReference]) -> None:
        """A job does not wait for what it requested any more; with the last one goes what has not been begun."""
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting is None or waiting.future is not future:
                return
            waiting.jobs -= 1
            if waiting.jobs == 0 and future.cancel():
                del self._waiting[key]

    def clear(self) -> None:
        """Forget every kept reference, and those that are still to be encoded; nobody waits for one any more.

        Nothing is encoded when this returns, so the encoders' weights may be moved.
        """
        with self._lock:
            self._waiting = {key: each for key, each in self._waiting.items() if not each.future.cancel()}
            running = [each.future for each in self._waiting.values()]
        wait(running)
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def close(self) -> None:
        """End the thread, after what it is encoding."""
        self.clear()
        self._thread.shutdown()

    def _work(self, key: str) -> EncodedReference:
        with self._lock:
            reference = self._waiting[key].reference
        waveform = np.frombuffer(reference.pcm, dtype="<i2").astype(np.float32) / 2**15
        try:
            encoded = self._encode(waveform, not reference.x_vector_only)
        except BaseException as error:
            with self._lock:
                self._waiting.pop(key, None)
            # A job keeps the error while room is made for a second attempt: not what the first one held as well.
            traceback.clear_frames(error.__traceback__)
            raise
        with self._lock:
            self._waiting.pop(key, None)
            if encoded.bytes <= self._max_bytes:
                self._kept[key] = encoded
                self._bytes += encoded.bytes
            while self._bytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.bytes
        return encoded
