import threading
import weakref
from concurrent.futures import wait

import numpy as np
import pytest
import torch

from gpu_worker.engines.base import JobError, Reference
from gpu_worker.engines.qwen.reference_cache import MAX_WAITING, EncodedReference, ReferenceCache
from shared.protocol import CacheStats
from tests.gpu_worker.engines.qwen.driving import recording


class Encoder:
    """Counts its calls. `go` blocks it, and `error` makes it fail."""

    def __init__(self) -> None:
        self.calls = 0
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None

    def __call__(self, waveform: np.ndarray, wants_codes: bool) -> EncodedReference:  # noqa: FBT001 -- ReferenceCache calls it so
        """A reference of 100 bytes."""
        self.go.wait()
        self.calls += 1
        if self.error:
            raise self.error
        assert -1 <= waveform.min() <= waveform.max() <= 1
        return EncodedReference(torch.zeros(25), torch.zeros(0) if wants_codes else None)


def reference(seed: int) -> Reference:
    """A reference to the recording of this seed."""
    return Reference.of(recording(1.0, seed), text="a", x_vector_only=False)


def test_a_reference_is_encoded_once_and_kept() -> None:
    """Requests during the encoding share it. Later requests are done at once."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 1000)
    encoder.go.clear()
    futures = [references.request(reference(1)) for _ in range(3)]
    encoder.go.set()
    wait(futures)
    assert references.request(reference(1)).done()
    assert encoder.calls == 1
    assert references.bytes == 100
    assert references.stats() == CacheStats(name="references", entries=1, bytes=100, hits=3, misses=1)
    references.empty()
    assert references.bytes == 0
    assert references.request(reference(1)).result().bytes == 100
    assert (encoder.calls, references.stats().misses) == (2, 2)
    references.close()
    assert references.bytes == 0


def test_the_least_recently_used_reference_is_dropped() -> None:
    """The kept bytes never exceed the budget, and each request renews its reference."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 250)
    for seed in (1, 2, 1, 3):
        references.request(reference(seed)).result()
    assert references.bytes == 200
    assert references.request(reference(1)).done()
    references.request(reference(2)).result()
    assert encoder.calls == 4
    references.close()


def test_an_abandoned_reference_is_not_encoded() -> None:
    """A waiting reference is cancelled when its last job abandons it. One that has begun or is shared is encoded."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 1000)
    encoder.go.clear()
    begun, shared, again, alone = (references.request(reference(seed)) for seed in (1, 2, 2, 3))
    while not begun.running():
        pass
    for seed, future in ((1, begun), (2, shared), (3, alone)):
        references.abandon(reference(seed).key, future)
    assert alone.cancelled()
    late = references.request(reference(3))
    encoder.go.set()
    assert [each.result().bytes for each in (begun, again, late)] == [100, 100, 100]
    assert encoder.calls == 3
    references.close()


def test_one_recording_in_two_modes_is_two_references() -> None:
    """With and without codes are two references. The transcript makes no difference."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 1000)
    pcm = recording(1.0)
    for text, x_vector_only in (("x", False), (None, True), ("something else", False)):
        wanted = Reference.of(pcm, text=text, x_vector_only=x_vector_only)
        assert (references.request(wanted).result().codes is None) == x_vector_only
    assert encoder.calls == 2
    references.close()


def test_the_number_of_waiting_references_is_limited() -> None:
    """Beyond the limit a request is refused with `queue_full` until another reference is done."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 1_000_000)
    encoder.go.clear()
    futures = [references.request(reference(seed)) for seed in range(MAX_WAITING)]
    with pytest.raises(JobError) as refused:
        references.request(reference(MAX_WAITING))
    assert (refused.value.code, refused.value.retry_after_s) == ("queue_full", 5)
    assert references.request(reference(0)) is futures[0]
    encoder.go.set()
    wait(futures)
    assert references.request(reference(MAX_WAITING)).result().bytes == 100
    references.close()


def test_a_failure_is_not_kept() -> None:
    """The future raises the error, and the next request tries again."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 1000)
    encoder.error = RuntimeError("made up")
    with pytest.raises(RuntimeError, match="made up"):
        references.request(reference(1)).result()
    encoder.error = None
    assert references.request(reference(1)).result().bytes == 100
    references.close()


def test_a_failure_holds_no_memory() -> None:
    """A kept error keeps no tensor alive: the next attempt needs the memory."""
    made: list[weakref.ref[torch.Tensor]] = []

    def failing(_waveform: np.ndarray, _wants_codes: bool) -> EncodedReference:  # noqa: FBT001 -- ReferenceCache calls it so
        half = torch.zeros(25)
        made.append(weakref.ref(half))
        raise torch.OutOfMemoryError("made up")

    references = ReferenceCache(failing, 1000)
    error = references.request(reference(1)).exception()
    assert isinstance(error, torch.OutOfMemoryError)
    assert made[0]() is None
    references.close()


def test_clear_waits_for_the_running_encoding() -> None:
    """The running encoding finishes, a waiting one is cancelled, and none is kept: then the weights may be moved."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 1000)
    encoder.go.clear()
    first, second = (references.request(reference(seed)) for seed in (1, 2))
    while not first.running():
        pass
    cleared = threading.Thread(target=references.clear)
    cleared.start()
    while not second.cancelled():
        pass
    assert cleared.is_alive()
    encoder.go.set()
    cleared.join(10)
    assert first.done()
    assert (encoder.calls, references.bytes) == (1, 0)
    assert references.request(reference(2)).result().bytes == 100
    references.close()


@pytest.mark.parametrize(
    "pcm", [b"", b"\x00", recording(0.3), recording(1.0)[:-1], recording(60.1), bytes(48_000), b"\x01\x00" * 24_000]
)
def test_a_recording_without_a_voice_is_refused_at_once(pcm: bytes) -> None:
    """Empty, odd, short, long, silent and nearly silent recordings never reach the encoder."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 1000)
    with pytest.raises(JobError) as refusal:
        references.request(Reference(key="k", pcm=pcm, text="a"))
    assert (refusal.value.code, refusal.value.param) == ("invalid_audio", "ref_audio")
    assert encoder.calls == 0
    references.close()
