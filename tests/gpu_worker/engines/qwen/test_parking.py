"""Jobs that leave their slots in the midst of their speech and come back: not a sample of any job changes."""

import functools
from collections.abc import Iterator, Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.engines.base import Job
from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.runtime.transfers import HostCopy
from shared.protocol import Sampling
from tests.checkpoints import Kind
from tests.gpu_worker.engines.qwen.driving import (
    Outcome,
    assemble,
    clone,
    engine,
    job,
    parts,
    run,
    take,
    wait_until_runnable,
)
from tests.gpu_worker.engines.qwen.test_engine import LONG, end_of

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
            clone(2, text=None, non_streaming_mode=False, id="long", sampling=Sampling(seed=4)),
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
        job(4, non_streaming_mode=False, sampling=sampling(4, 16, top_k=0, top_p=0.9)),
        job(5, sampling=sampling(5, 12, repetition_penalty=1.8)),
    ]


@functools.cache
def alone(kind: Kind) -> dict[str, Outcome]:
    """What each job speaks if nothing disturbs it."""
    speaker = engine(kind, max_model_len=1024)
    spoken = {one.id: run(speaker, [one])[one.id] for one in jobs_of(kind)}
    speaker.close()
    return spoken


@pytest.fixture(scope="module")
def speakers() -> Iterator[dict[Kind, QwenEngine]]:
    """An engine of each task with four slots, idle again after each test."""
    made: dict[Kind, QwenEngine] = {kind: engine(kind, max_model_len=1024) for kind in KINDS}
    run(made["base"], jobs_of("base"))  # the references are cached from here on
    yield made
    for speaker in made.values():
        assert speaker.capacity() == 4
        assert "parked" not in speaker.memory().host
        speaker.close()


def check(outcomes: dict[str, Outcome], kind: Kind) -> None:
    """The speech and its end are those of an undisturbed job."""
    for name, outcome in outcomes.items():
        assert outcome.pcm == alone(kind)[name].pcm, name
        assert end_of(outcome) == end_of(alone(kind)[name])


def take_turns(speaker: QwenEngine, jobs: Sequence[Job], steps: int = 1) -> dict[str, Outcome]:
    """Let jobs take turns of `steps` steps in one slot: each is parked between its turns."""
    outcomes = {one.id: Outcome() for one in jobs}
    for one in jobs:
        speaker.admit(one)
        speaker.park(one.id)
    while any(outcome.end is None for outcome in outcomes.values()):
        for name in [name for name, outcome in outcomes.items() if outcome.end is None]:
            speaker.unpark(name)
            assert speaker.capacity() == 0
            for number in range(steps):
                if speaker.capacity() == 0:
                    wait_until_runnable(speaker)
                if speaker.runnable(()):
                    take(speaker, outcomes, number)
            expected = speaker.park_bytes(name)
            kept = speaker.park(name)
            assert expected <= kept <= expected + (4 << 20 if expected else 0)
            assert speaker.park(name) == speaker.park_bytes(name) == kept
            assert speaker.memory().host.get("parked", 0) >= kept
            assert speaker.capacity() == 1
    assert "parked" not in speaker.memory().host
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_jobs_take_turns_in_one_slot(kind: Kind) -> None:
    """Every job is parked behind each frame, and another one uses its slot before it comes back."""
    speaker = engine(kind, slots=1, max_model_len=1024)
    check(take_turns(speaker, jobs_of(kind)), kind)
    speaker.close()


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", ["custom_voice", "base"])
def test_what_is_on_its_way_is_neither_lost_nor_early(kind: Kind, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, a frame is still on the device when its job is parked, and chunks are still being decoded."""
    monkeypatch.setattr(HostCopy, "ready", lambda _copy: False)
    speaker = assemble(parts(kind, slots=1, max_model_len=1024), run_ahead=True)
    check(take_turns(speaker, jobs_of(kind), steps), kind)
    speaker.close()


class Absence(msgspec.Struct, frozen=True):
    """A job is parked before a step, for a number of steps."""

    job: int
    step: int
    steps: int


ABSENCES = st.lists(st.builds(Absence, st.integers(0, 4), st.integers(0, 70), st.integers(0, 9)), max_size=20)


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
@given(joins=st.lists(st.integers(0, 30), min_size=5, max_size=5), absences=ABSENCES)
def test_parked_jobs_and_their_neighbours_speak_as_ever(
    speakers: dict[Kind, QwenEngine], kind: Kind, joins: list[int], absences: list[Absence]
) -> None:
    """In a batch that jobs join and leave, any job may be parked at any step and come back into any slot."""
    check(speak(speakers[kind], jobs_of(kind), joins, absences), kind)
