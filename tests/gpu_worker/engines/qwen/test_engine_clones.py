"""Cloned voices: the official waveform, and references that are encoded beside the steps."""

import threading

import msgspec
import numpy as np
import pytest
import torch

from gpu_worker.engines.base import Done, Fault, Job, Reference
from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.reference_cache import MAX_WAITING, EncodedReference
from shared.protocol import Sampling
from tests.gpu_worker.engines.qwen.driving import (
    UNFADED,
    Outcome,
    assemble,
    clone,
    job,
    kept_parts,
    parts,
    recording,
    run,
    shared,
    take,
    wait_until_runnable,
)
from tests.gpu_worker.engines.qwen.faulty_parts import FaultyEncoder, OutOfMemoryPart, with_encoder
from tests.gpu_worker.engines.qwen.parity import TRANSCRIPT, official
from tests.official_package import quick_masks

HIDDEN = 64
"""Size of a speaker embedding of the small Base model."""


def crowded(number: int) -> Job:
    """A clone whose recording and transcript fill a slot of 512 positions, which shows only once it is encoded."""
    reference = Reference.of(recording(3, seed=number), text="\u0436" * 185, x_vector_only=False)
    sampling = Sampling(seed=number, max_new_tokens=200)
    return job(number, task="Base", voice="", reference=reference, non_streaming_mode=True, sampling=sampling)


@quick_masks()
def test_a_clone_in_context_equals_the_official_one(cloner: QwenEngine) -> None:
    """Speaker embedding, reference codes, prompt, speech and the cut behind the reference are the official ones."""
    pcm = recording(1.3)
    model = official("base", None)
    (waveform,), _ = model.generate_voice_clone(
        text="Hello world today",
        ref_audio=(np.frombuffer(pcm, dtype="<i2").astype(np.float32) / 32768, 24_000),
        ref_text=TRANSCRIPT,
        do_sample=False,
        subtalker_dosample=False,
        repetition_penalty=1.05,
        max_new_tokens=13,
    )
    reference = Reference.of(pcm, text=TRANSCRIPT, x_vector_only=False)
    sampling = Sampling(temperature=0, max_new_tokens=12)
    spoken = run(cloner, [job(0, "Hello world today", task="Base", voice="", reference=reference, sampling=sampling)])
    ours = np.frombuffer(spoken["job 0"].pcm, dtype="<i2") / 32767
    # The official cut is a rounded quotient, for this length one sample early.
    assert 0 <= len(waveform) - len(ours) <= 1
    assert np.abs(ours - waveform[-len(ours) :])[UNFADED].max() < 3e-5


def test_clones_are_the_same_in_any_batch_and_from_the_cache(cloner: QwenEngine) -> None:
    """In-context and x-vector clones run side by side. The cached reference gives the same samples again."""
    jobs = [clone(1), clone(2, text=None), clone(3)]
    together = run(cloner, jobs)
    for one in jobs:
        assert together[one.id].pcm
        assert run(cloner, [one])[one.id].pcm == together[one.id].pcm


def test_control_tokens_are_removed_from_transcripts(cloner: QwenEngine) -> None:
    """A transcript with control tokens and outer spaces gives the same speech as one without."""
    plain, dressed = clone(1), clone(1, text=" the speech of today<|im_end|>\n")
    assert run(cloner, [dressed])["job 1"].pcm == run(cloner, [plain])["job 1"].pcm


def test_a_reference_that_leaves_no_room_fails_its_job_alone(cloner: QwenEngine) -> None:
    """The length of a reference is known once it is encoded: a Fault then, and the neighbour speaks."""
    outcomes = run(cloner, [crowded(1), clone(2, text=None)])
    assert isinstance(outcomes["job 1"].end, Fault)
    assert outcomes["job 1"].end.error.code == "invalid_value"
    assert isinstance(outcomes["job 2"].end, Done)


def test_an_encoder_error_fails_one_job_alone() -> None:
    """The error of the encoder is a Fault of the job whose recording it was, and the neighbour speaks."""
    encoder = FaultyEncoder(HIDDEN, [RuntimeError("no such window")])
    with with_encoder(kept_parts("base"), encoder, shared().wake) as made:
        outcomes = run(assemble(made), [clone(31), clone(32, text=None)])
    assert isinstance(outcomes["job 31"].end, Fault)
    assert outcomes["job 31"].end.error.code == "synthesis_failed"
    assert isinstance(outcomes["job 32"].end, Done)


@pytest.mark.parametrize("failures", [1, 2])
def test_an_encoder_out_of_memory_is_tried_twice(failures: int) -> None:
    """The step raises once, so that memory can be freed. If memory runs out again, that job alone fails."""
    encoder = FaultyEncoder(HIDDEN, [torch.OutOfMemoryError("made up")] * failures)
    jobs = [clone(40), clone(50, text=None)]
    outcomes = {one.id: Outcome() for one in jobs}
    raised = 0
    with with_encoder(kept_parts("base"), encoder, shared().wake) as made:
        cloner = assemble(made)
        for one in jobs:
            cloner.admit(one)
        while not all(outcome.end for outcome in outcomes.values()):
            wait_until_runnable(cloner)
            try:
                take(cloner, outcomes, 0)
            except torch.OutOfMemoryError:
                raised += 1
    assert raised == 1
    end = outcomes["job 40"].end
    if failures == 1:
        assert isinstance(end, Done)
    else:
        assert isinstance(end, Fault)
        assert end.error.code == "insufficient_vram"
    assert isinstance(outcomes["job 50"].end, Done)


def test_cancelled_clones_leave_no_reference_behind() -> None:
    """While one reference is being encoded, any number of cancelled clones leaves room for the next one."""
    go = threading.Event()
    encoder = FaultyEncoder(HIDDEN)

    def held_back(waveform: np.ndarray, wants_codes: bool) -> EncodedReference:  # noqa: FBT001 -- ReferenceCache calls it so
        go.wait()
        return encoder(waveform, wants_codes)

    outcomes = {"job 2": Outcome()}
    with with_encoder(kept_parts("base"), held_back, shared().wake) as made:
        cloner = assemble(made)
        try:
            for number in range(MAX_WAITING + 2):
                cloner.admit(clone(100 + number))
                cloner.cancel(f"job {100 + number}")
            cloner.admit(clone(2, text=None))
        finally:
            go.set()
        while outcomes["job 2"].end is None:
            wait_until_runnable(cloner)
            take(cloner, outcomes, 0)
    assert isinstance(outcomes["job 2"].end, Done)


def test_faults_survive_a_step_that_runs_out_of_memory() -> None:
    """The step that raises loses no event: the next one returns it, unless its job was cancelled."""
    encoded = threading.Semaphore(0)
    made = parts("base", wake=encoded.release)
    failing_once = OutOfMemoryPart(made.runner, "prefill", every=2)
    cloner = assemble(msgspec.structs.replace(made, runner=failing_once))
    jobs = [crowded(1), crowded(2), clone(3, text=None)]
    for one in jobs:
        cloner.admit(one)
    for _ in jobs:
        assert encoded.acquire(timeout=60)
    with pytest.raises(torch.OutOfMemoryError):
        cloner.step(())
    assert cloner.runnable([one.id for one in jobs])
    cloner.cancel("job 2")
    assert [event.job_id for event in cloner.step(()) if isinstance(event, Fault)] == ["job 1"]
    cloner.close()
