"""Encoded references of cloned voices: encoded on a background thread, and kept within a byte budget.

ReferenceCache owns that thread and the encoded references. The encoder is passed in.
It knows neither slots nor prompts.
"""

import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Final

import msgspec
import numpy as np
from torch import Tensor

from gpu_worker.engines.base import JobError, Reference
from gpu_worker.engines.qwen.codec import StreamSnapshot
from gpu_worker.serial_thread import SerialThread
from gpu_worker.voices import check_recording
from shared.protocol import CacheStats

MAX_WAITING: Final = 32
"""References that may wait for their encoding, up to 3 MB each."""


class EncodedReference(msgspec.Struct, frozen=True):
    """An encoded recording.

    `embedding` [hidden] is the speaker embedding. A reference for in-context clones also has `codes` int64
    [frames, groups], and `primed`, the state of a codec stream that has decoded these codes.
    """

    embedding: Tensor
    codes: Tensor | None = None
    primed: StreamSnapshot | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """All tensors."""
        yield self.embedding
        if self.codes is not None:
            yield self.codes
        if self.primed is not None:
            yield from self.primed.tensors()


class _Encoding(msgspec.Struct):
    """A reference that waits for its encoding or is being encoded. `jobs`: how many wait for it."""

    reference: Reference
    future: Future[EncodedReference]
    jobs: int = 1


class ReferenceCache:
    """Encodes references one after the other, and keeps the most recently used ones by key."""

    def __init__(
        self,
        encode: Callable[[np.ndarray, bool], EncodedReference],
        max_bytes: int,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`encode(waveform, wants_codes)` runs on the background thread; waveform: float32 [samples] at 24 kHz.

        `wake` is called from any thread when a future that `request` returned is done.
        """
        self._encode = encode
        self._max_bytes = max_bytes
        self._wake = wake
        self._thread = SerialThread("reference-encoder", self._handle)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, EncodedReference] = OrderedDict()
        self._encodings: dict[str, _Encoding] = {}
        self.bytes = 0
        """Bytes of the kept references."""

        self._hits = self._misses = 0

    def request(self, reference: Reference) -> Future[EncodedReference]:
        """The future of the encoded reference. It raises what the encoder raised.

        A reference with a known key is neither checked nor encoded again.

        Raises:
            JobError: `invalid_audio`: the recording is too short, too long or silent;
                `queue_full`: MAX_WAITING other references wait.
        """
        with self._lock:
            if reference.key in self._kept:
                self._hits += 1
                self._kept.move_to_end(reference.key)
                done: Future[EncodedReference] = Future()
                done.set_result(self._kept[reference.key])
                return done
            encoding = self._encodings.get(reference.key)
            if encoding is not None:
                self._hits += 1
                encoding.jobs += 1
                return encoding.future
            check_recording(reference.pcm, "ref_audio")
            if len(self._encodings) >= MAX_WAITING:
                message = f"{MAX_WAITING} recordings are waiting to be encoded"
                raise JobError("queue_full", message, param="ref_audio", retry_after_s=5)
            self._misses += 1
            future: Future[EncodedReference] = Future()
            self._encodings[reference.key] = _Encoding(reference, future)
            # The queue holds keys only, so the recording of a cancelled reference is freed at once.
            self._thread.submit(reference.key)
        future.add_done_callback(lambda _: self._wake())
        return future

    def abandon(self, key: str, future: Future[EncodedReference]) -> None:
        """One job less waits for `future`. Without jobs, an encoding that has not begun is cancelled."""
        with self._lock:
            encoding = self._encodings.get(key)
            if encoding is None or encoding.future is not future:
                return
            encoding.jobs -= 1
            if encoding.jobs == 0 and future.cancel():
                del self._encodings[key]

    def stats(self) -> CacheStats:
        """The kept references. One that is being encoded for another job counts as a hit."""
        with self._lock:
            return CacheStats(
                name="references", entries=len(self._kept), bytes=self.bytes, hits=self._hits, misses=self._misses
            )

    def empty(self) -> None:
        """Drop all kept references; jobs keep theirs."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0

    def clear(self) -> None:
        """Drop all kept references, and cancel the waiting ones. No job may wait for a reference.

        No encoding runs when `clear` returns, so the weights of the encoders may be moved.
        """
        with self._lock:
            self._encodings = {key: each for key, each in self._encodings.items() if not each.future.cancel()}
            running = [each.future for each in self._encodings.values()]
        wait(running)
        self.empty()

    def close(self) -> None:
        """Clear, and end the thread."""
        self.clear()
        self._thread.close()

    def _handle(self, key: str) -> None:
        with self._lock:
            encoding = self._encodings.get(key)
            if encoding is None:  # cancelled
                return
            encoding.future.set_running_or_notify_cancel()
        try:
            waveform = np.frombuffer(encoding.reference.pcm, dtype="<i2").astype(np.float32) / 2**15
            encoded = self._encode(waveform, not encoding.reference.x_vector_only)
        except BaseException as error:  # noqa: BLE001 -- the future raises it
            with self._lock:
                self._encodings.pop(key, None)
            # A job keeps the error until its second attempt. The tensors of the first attempt must be freed before.
            traceback.clear_frames(error.__traceback__)
            encoding.future.set_exception(error)
            del encoding  # the error's traceback refers to this frame, so its locals would stay alive
            return
        self._keep(key, encoded)
        encoding.future.set_result(encoded)

    def _keep(self, key: str, encoded: EncodedReference) -> None:
        with self._lock:
            self._encodings.pop(key, None)
            if encoded.bytes <= self._max_bytes:
                self._kept[key] = encoded
                self.bytes += encoded.bytes
            while self.bytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.bytes -= oldest.bytes
