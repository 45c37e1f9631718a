"""Jobs that leave their slots in the midst of their speech and come back: not a sample of any job changes."""

import functools
import threading
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.engines.base import Fault, Job
from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.reference_cache import MAX_WAITING, EncodedReference
from gpu_worker.engines.qwen.runtime.transfers import HostCopy
from shared.protocol import Sampling
from tests.checkpoints import Kind
from tests.gpu_worker.engines.qwen.driving import (
    Outcome,
    assemble,
    clone,
    engine,
    job,
    kept_engine,
    kept_parts,
    run,
    shared,
    take,
    take_turns,
    wait_until_runnable,
)
from tests.gpu_worker.engines.qwen.faulty_parts import (
    FaultyEncoder,
    OutOfMemoryOperators,
    with_encoder,
)
from tests.gpu_worker.engines.qwen.test_engine import LONG, PAUSE, PAUSED, end_of

KINDS: Sequence[Kind] = ("custom_voice", "voice_design", "base")


def sampling(seed: int, frames: int, **fields: float) -> Sampling:
    """Sampling with a limit on the frames."""
    return Sampling(seed=seed, max_new_tokens=frames, **fields)


@functools.cache
def jobs_of(kind: Kind) -> list[Job]:
    """Jobs of one task: all layouts and kinds of sampling, one of two utterances."""
    if kind == "base":
        return [
            clone(1, sampling=sampling(1, 15)),
            clone(2, text=None, sampling=sampling(2, 9)),
            clone(1, non_streaming_mode=True, id="whole", sampling=sampling(3, 12)),
            clone(2, text=None, non_streaming_mode=False, id="streamed", sampling=sampling(4, 13)),
        ]
    if kind == "voice_design":
        fields = {"task": "VoiceDesign", "voice": "", "instructions": "a deep voice"}
        return [
            job(1, **fields, sampling=sampling(1, 17)),
            job(2, **fields, non_streaming_mode=False, sampling=sampling(2, 14)),
        ]
    return [
        job(17, sampling=sampling(17, 19)),
        job(2, sampling=sampling(2, 11, temperature=0)),
        job(3, LONG, sampling=Sampling(seed=3)),
        job(4, non_streaming_mode=False, sampling=sampling(1, 12, top_k=0, top_p=0.97, temperature=3.0)),
        job(5, sampling=sampling(2, 12, repetition_penalty=8.0)),
        job(6, sampling=sampling(1, 12, top_k=3, temperature=2.0)),
        job(7, segments=PAUSED, sampling=Sampling(seed=1)),
    ]


@functools.cache
def alone(kind: Kind) -> dict[str, Outcome]:
    """The undisturbed speech of each job."""
    speaker = kept_engine(kind)
    return {one.id: run(speaker, [one])[one.id] for one in jobs_of(kind)}


@pytest.fixture(scope="module")
def speakers() -> Iterator[dict[Kind, QwenEngine]]:
    """An engine of each task with four slots, idle again after each test. The first one runs ahead, as on CUDA."""
    made: dict[Kind, QwenEngine] = {kind: kept_engine(kind, run_ahead=kind == "custom_voice") for kind in KINDS}
    run(made["base"], jobs_of("base"))  # the references are cached from here on
    yield made
    for speaker in made.values():
        assert speaker.capacity() == 4
        assert "parked" not in speaker.memory().host


def check(outcomes: dict[str, Outcome], kind: Kind) -> None:
    """The speech and its end are those of an undisturbed job."""
    for name, outcome in outcomes.items():
        assert outcome.pcm == alone(kind)[name].pcm, name
        assert end_of(outcome) == end_of(alone(kind)[name])


@pytest.mark.parametrize("kind", ["custom_voice", "base", pytest.param("voice_design", marks=pytest.mark.soak)])
def test_jobs_take_turns_in_one_slot(kind: Kind) -> None:
    """Every job is parked behind each frame, and another one uses its slot before it comes back."""
    check(take_turns(kept_engine(kind, slots=1), jobs_of(kind)), kind)


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("custom_voice", 1),
        ("base", 2),
        pytest.param("custom_voice", 2, marks=pytest.mark.soak),
        pytest.param("base", 1, marks=pytest.mark.soak),
    ],
)
def test_what_is_on_its_way_is_neither_lost_nor_early(kind: Kind, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, a frame is still on the device when its job is parked, and chunks are still being decoded."""
    monkeypatch.setattr(HostCopy, "ready", lambda _copy: False)
    check(take_turns(kept_engine(kind, slots=1, run_ahead=True), jobs_of(kind), steps), kind)


def test_a_parked_job_may_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose last chunk is being decoded when it is parked ends without a slot, and keeps nothing."""
    monkeypatch.setattr(HostCopy, "ready", lambda _copy: False)
    speaker = kept_engine("custom_voice", slots=2, run_ahead=True)
    short, other = job(6, sampling=sampling(6, 4)), jobs_of("custom_voice")[4]
    wanted = run(speaker, [short])[short.id]
    ended_parked = 0
    for parked_before in range(3, 8):
        outcomes = {short.id: Outcome(), other.id: Outcome()}
        for one in (short, other):
            speaker.admit(one)
        for number in range(parked_before):
            take(speaker, outcomes, number)
        ended = outcomes[short.id].end is not None
        speaker.park(short.id)
        while outcomes[other.id].end is None:
            take(speaker, outcomes, 0)
        ended_parked += outcomes[short.id].end is not None and not ended
        speaker.unpark(short.id)
        while outcomes[short.id].end is None:
            take(speaker, outcomes, 0)
        assert outcomes[short.id].pcm == wanted.pcm
        assert outcomes[other.id].pcm == alone("custom_voice")[other.id].pcm
        assert speaker.capacity() == 2
        assert "parked" not in speaker.memory().host
    assert ended_parked


def test_a_job_changes_slots_while_its_frame_is_on_the_device() -> None:
    """The frame belongs to the slot that the job had: at whichever frame, also at the last one."""
    speaker = kept_engine("custom_voice", slots=2, run_ahead=True)
    other, moving = jobs_of("custom_voice")[:2]
    _, frames = end_of(alone("custom_voice")[moving.id])
    assert frames < 10
    for parked_before in range(1, frames + 2):
        speaker.admit(other)
        speaker.admit(moving)
        outcomes = {moving.id: Outcome(), other.id: Outcome()}
        for number in range(parked_before):
            take(speaker, outcomes, number)
        speaker.cancel(other.id)
        speaker.park(moving.id)
        speaker.unpark(moving.id)
        while outcomes[moving.id].end is None:
            take(speaker, outcomes, 0)
        del outcomes[other.id]
        check(outcomes, "custom_voice")


def test_between_two_utterances_nothing_is_kept(speakers: dict[Kind, QwenEngine]) -> None:
    """The next prompt is not read yet, and the slot's contents are not needed any more."""
    speaker, long = speakers["custom_voice"], jobs_of("custom_voice")[2]
    outcomes = {long.id: Outcome()}
    speaker.admit(long)
    assert speaker.park_bytes(long.id) == 0
    while PAUSE not in outcomes[long.id].chunks:
        take(speaker, outcomes, 0)
        assert (speaker.park_bytes(long.id) == 0) == (PAUSE in outcomes[long.id].chunks)
    assert speaker.park(long.id) == 0
    assert speaker.capacity() == 4
    assert speaker.step(()) == []
    other = jobs_of("custom_voice")[1]
    assert run(speaker, [other])[other.id].pcm == alone("custom_voice")[other.id].pcm
    speaker.unpark(long.id)
    while outcomes[long.id].end is None:
        take(speaker, outcomes, 0)
    check(outcomes, "custom_voice")


def test_a_cancelled_job_keeps_nothing(speakers: dict[Kind, QwenEngine]) -> None:
    """Neither a slot nor host memory. It does not come back, and a neighbour speaks as ever."""
    speaker = speakers["custom_voice"]
    gone, neighbour = jobs_of("custom_voice")[0], jobs_of("custom_voice")[4]
    outcomes = {gone.id: Outcome(), neighbour.id: Outcome()}
    for one in (gone, neighbour):
        speaker.admit(one)
    for number in range(4):
        take(speaker, outcomes, number)
    heard = outcomes[gone.id].pcm
    kept = speaker.park(gone.id)
    assert speaker.memory().host == {"parked": kept}
    speaker.cancel(gone.id)
    assert speaker.memory().host == {}
    speaker.unpark(gone.id)
    assert speaker.capacity() == 3
    while outcomes[neighbour.id].end is None:
        take(speaker, outcomes, 0)
    assert outcomes[gone.id].pcm == heard
    assert outcomes[neighbour.id].pcm == alone("custom_voice")[neighbour.id].pcm
    assert speaker.capacity() == 4


def test_closing_frees_parked_jobs() -> None:
    """A closed engine holds nothing, wherever its jobs were."""
    speaker = engine("custom_voice", slots=1)
    parked, running = jobs_of("custom_voice")[:2]
    speaker.admit(parked)
    speaker.step(())
    assert speaker.park(parked.id) > 0
    speaker.admit(running)
    speaker.close()
    assert speaker.memory().host == {}
    assert speaker.memory().device == {}
    assert speaker.capacity() == 1


@pytest.fixture
def held_encoder() -> Iterator[tuple[QwenEngine, threading.Event]]:
    """A Base engine whose encoder waits until the event is set, and then fails once for an in-context clone."""
    go = threading.Event()
    encoder = FaultyEncoder(64, [RuntimeError("made up")])

    def held_back(waveform: np.ndarray, wants_codes: bool) -> EncodedReference:  # noqa: FBT001 -- ReferenceCache calls it so
        go.wait()
        return encoder(waveform, wants_codes)

    with with_encoder(kept_parts("base"), held_back, shared().wake) as made:
        yield assemble(made), go
        go.set()


def test_a_job_is_parked_while_its_reference_is_encoded(held_encoder: tuple[QwenEngine, threading.Event]) -> None:
    """It keeps no bytes, and finds its reference, or the encoder's error, when it has a slot again."""
    speaker, go = held_encoder
    failing, good = clone(1, sampling=sampling(1, 5)), clone(2, text=None, sampling=sampling(2, 5))
    outcomes = {failing.id: Outcome(), good.id: Outcome()}
    for one in (failing, good):
        speaker.admit(one)
        assert speaker.park(one.id) == 0
    assert speaker.capacity() == 4
    go.set()
    assert not speaker.runnable(())
    for one in (failing, good):
        speaker.unpark(one.id)
    while not all(outcome.end for outcome in outcomes.values()):
        wait_until_runnable(speaker)
        take(speaker, outcomes, 0)
    assert isinstance(outcomes[failing.id].end, Fault)
    assert outcomes[good.id].pcm == run(speaker, [good])[good.id].pcm
    assert speaker.capacity() == 4


def test_parked_jobs_that_are_cancelled_leave_no_reference_behind(
    held_encoder: tuple[QwenEngine, threading.Event],
) -> None:
    """Any number of them leaves room for the recording of the next job."""
    speaker, _ = held_encoder
    for number in range(MAX_WAITING + 2):
        speaker.admit(clone(number))
        speaker.park(f"job {number}")
        speaker.cancel(f"job {number}")
    assert speaker.capacity() == 4


def test_whatever_runs_out_of_memory_can_be_repeated() -> None:
    """A step, an admission, and parking itself: a job that could not be parked is still in its slot."""
    speaker = kept_engine("custom_voice", slots=1)
    jobs = jobs_of("custom_voice")[:4]
    outcomes = {one.id: Outcome() for one in jobs}
    failures = dict.fromkeys(("admit", "step", "park"), 0)
    admitted: set[str] = set()
    in_park = OutOfMemoryOperators(every=3)  # parking allocates twice
    with OutOfMemoryOperators(every=97):
        while not all(outcome.end for outcome in outcomes.values()):
            for one in [one for one in jobs if outcomes[one.id].end is None]:
                while speaker.capacity():
                    try:
                        speaker.unpark(one.id) if one.id in admitted else speaker.admit(one)
                        admitted.add(one.id)
                    except torch.OutOfMemoryError:
                        failures["admit"] += 1
                try:
                    take(speaker, outcomes, 0)
                except torch.OutOfMemoryError:
                    failures["step"] += 1
                while not speaker.capacity():
                    before = speaker.memory().host
                    try:
                        with in_park:
                            speaker.park(one.id)
                    except torch.OutOfMemoryError:
                        failures["park"] += 1
                        assert speaker.capacity() == 0
                        assert speaker.memory().host == before
    assert failures["step"] > 10
    assert failures["park"] > 10
    check(outcomes, "custom_voice")
    assert "parked" not in speaker.memory().host


def test_every_tensor_of_a_slot_is_parked() -> None:
    """A tensor that is added to the state goes along, too, and the bytes are counted; `active` belongs to a step."""
    state = kept_parts("custom_voice").state
    rows = state.rows(1, frames=5, trailing=3)
    wanted = {tensor.untyped_storage().data_ptr() for tensor in state.tensors() if tensor is not state.active}
    assert {row.untyped_storage().data_ptr() for row in rows} == wanted
    assert state.row_bytes(frames=5, trailing=3) == sum(row.nbytes for row in rows)


class Absence(msgspec.Struct, frozen=True):
    """A job is parked before a step, for a number of steps."""

    job: int
    step: int
    steps: int


ABSENCES = st.lists(st.builds(Absence, st.integers(0, 5), st.integers(0, 70), st.integers(0, 9)), max_size=20)


def speak(
    speaker: QwenEngine, jobs: Sequence[Job], joins: Sequence[int], absences: Sequence[Absence]
) -> dict[str, Outcome]:
    """Admit each job at the step of `joins`, or when a slot is free, and park jobs as `absences` say."""
    outcomes: dict[str, Outcome] = {}
    waiting = sorted(zip(joins, jobs, strict=False), key=lambda pair: pair[0])
    back: dict[str, int] = {}
    for number in range(3000):
        for name, until in list(back.items()):
            if until <= number and speaker.capacity():
                speaker.unpark(name)
                del back[name]
        while waiting and waiting[0][0] <= number and speaker.capacity():
            _, one = waiting.pop(0)
            speaker.admit(one)
            outcomes[one.id] = Outcome()
        for absence in absences:
            name = jobs[absence.job % len(jobs)].id
            if absence.step == number and name in outcomes and outcomes[name].end is None and name not in back:
                free = speaker.capacity()
                speaker.park(name)
                assert speaker.capacity() == free + 1
                back[name] = number + absence.steps
        if speaker.runnable(()):
            take(speaker, outcomes, number)
        if not waiting and all(outcome.end for outcome in outcomes.values()):
            return outcomes
    raise AssertionError(f"not done: {outcomes}")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=max(4, settings.default.max_examples // 10))
@given(joins=st.lists(st.integers(0, 30), min_size=6, max_size=6), absences=ABSENCES)
def test_parked_jobs_and_their_neighbours_speak_as_ever(
    speakers: dict[Kind, QwenEngine], kind: Kind, joins: list[int], absences: list[Absence]
) -> None:
    """In a batch that jobs join and leave, any job may be parked at any step and come back into any slot."""
    check(speak(speakers[kind], jobs_of(kind), joins, absences), kind)
