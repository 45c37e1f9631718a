import threading
import weakref
from concurrent.futures import wait

import numpy as np
import pytest
import torch

from gpu_worker.engines.base import JobError, Reference
from gpu_worker.engines.qwen.reference_cache import MAX_WAITING, EncodedReference, ReferenceCache
from tests.gpu_worker.engines.qwen.driving import recording


class Encoder:
    """Counts recordings; may be held back or made to fail."""

    def __init__(self) -> None:
        self.calls = 0
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None

    def __call__(self, waveform: np.ndarray, wants_codes: bool) -> EncodedReference:  # noqa: FBT001 -- References calls it so
        """100 bytes a reference."""
        self.go.wait()
        self.calls += 1
        if self.error:
            raise self.error
        assert -1 <= waveform.min() <= waveform.max() <= 1
        return EncodedReference(torch.zeros(25), torch.zeros(0) if wants_codes else None)


def reference(seed: int) -> Reference:
    """A recording of its own."""
    return Reference.of(recording(1.0, seed), text="a", x_vector_only=False)


def test_a_reference_is_encoded_once_and_remembered() -> None:
    """Requests that come meanwhile share the work; later ones find it done."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 1000)
    encoder.go.clear()
    futures = [references.request(reference(1)) for _ in range(3)]
    encoder.go.set()
    wait(futures)
    assert references.request(reference(1)).done()
    assert encoder.calls == 1
    assert references.bytes == 100
    references.close()
    assert references.bytes == 0


def test_the_oldest_goes_when_the_budget_is_spent() -> None:
    """Bytes kept never exceed the budget, and use keeps a reference young."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 250)
    for seed in (1, 2, 1, 3):
        references.request(reference(seed)).result()
    assert references.bytes == 200
    assert references.request(reference(1)).done()
    references.request(reference(2)).result()
    assert encoder.calls == 4
    references.close()


def test_what_nobody_waits_for_is_not_encoded() -> None:
    """The last job that gives up takes a queued recording along; one that is begun, or shared, goes on."""
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
    """With and without codes are kept apart; the transcript makes no difference."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 1000)
    pcm = recording(1.0)
    for text, x_vector_only in (("x", False), (None, True), ("something else", False)):
        wanted = Reference.of(pcm, text=text, x_vector_only=x_vector_only)
        assert (references.request(wanted).result().codes is None) == x_vector_only
    assert encoder.calls == 2
    references.close()


def test_no_more_than_so_many_wait() -> None:
    """Recordings cannot pile up: the next one is refused until there is room."""
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


def test_a_failure_is_the_requests_own_and_not_remembered() -> None:
    """The future raises it, and the next request tries again."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 1000)
    encoder.error = RuntimeError("made up")
    with pytest.raises(RuntimeError, match="made up"):
        references.request(reference(1)).result()
    encoder.error = None
    assert references.request(reference(1)).result().bytes == 100
    references.close()


def test_a_failure_holds_no_memory() -> None:
    """Who keeps the error keeps nothing of what was half encoded: it ran out of that memory."""
    made: list[weakref.ref[torch.Tensor]] = []

    def failing(_waveform: np.ndarray, _wants_codes: bool) -> EncodedReference:  # noqa: FBT001 -- References calls it so
        half = torch.zeros(25)
        made.append(weakref.ref(half))
        raise torch.OutOfMemoryError("made up")

    references = ReferenceCache(failing, 1000)
    error = references.request(reference(1)).exception()
    assert isinstance(error, torch.OutOfMemoryError)
    assert made[0]() is None
    references.close()


def test_clearing_waits_for_what_is_being_encoded() -> None:
    """Weights may be moved behind it: one recording is finished, the next is never begun, and none is kept."""
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
def test_what_holds_no_voice_is_refused_at_once(pcm: bytes) -> None:
    """Empty, torn, short, long, silent and nearly silent recordings never reach the encoder."""
    encoder = Encoder()
    references = ReferenceCache(encoder, 1000)
    with pytest.raises(JobError) as refusal:
        references.request(Reference(key="k", pcm=pcm, text="a"))
    assert (refusal.value.code, refusal.value.param) == ("invalid_audio", "ref_audio")
    assert encoder.calls == 0
    references.close()
