"""A low slot, and steps that end early, bring a newcomer's first audio sooner on a CPU. No sample changes."""

import itertools

import pytest

from gpu_worker.engines.base import Pcm
from gpu_worker.engines.qwen.engine import Parts
from gpu_worker.engines.qwen.sequence import RunningJob
from shared.protocol import Sampling
from tests.gpu_worker.engines.qwen.driving import Outcome, assemble, job, kept_engine, kept_parts, run, take

JOBS = [job(number, sampling=Sampling(seed=number, max_new_tokens=20 + number)) for number in range(4)]
NEWCOMER = job(9, sampling=Sampling(seed=9, max_new_tokens=12))


@pytest.fixture(scope="module")
def alone() -> dict[str, bytes]:
    """The speech of each job if nothing disturbs it."""
    speaker = kept_engine("custom_voice")
    return {one.id: run(speaker, [one])[one.id].pcm for one in (*JOBS, NEWCOMER)}


def spied(made: Parts, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], list[list[str]]]:
    """The slots of each frame, and the jobs of each call of the vocoder, from now on."""
    frames: list[list[int]] = []
    decodes: list[list[str]] = []
    decode_step, decode = made.runner.decode_step, made.vocoder.decode

    def step(slot_lengths: list[tuple[int, int]], *, full_vocab: bool) -> None:
        frames.append([slot for slot, _ in slot_lengths])
        decode_step(slot_lengths, full_vocab=full_vocab)

    def decode_chunks(group: list[RunningJob]) -> object:
        decodes.append([sequence.job.id for sequence in group])
        return decode(group)

    monkeypatch.setattr(made.runner, "decode_step", step)
    monkeypatch.setattr(made.vocoder, "decode", decode_chunks)
    return frames, decodes


@pytest.mark.parametrize(("parked", "run_ahead"), [(0, False), (3, False), (2, True)])
def test_a_newcomer_has_the_lowest_slot(
    parked: int,
    run_ahead: bool,  # noqa: FBT001 -- a parameter of the test
    alone: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever slot became free, its first frame is one of slot 0 alone, and every job speaks as ever."""
    made = kept_parts("custom_voice")
    speaker = assemble(made, run_ahead=run_ahead)
    outcomes = {one.id: Outcome() for one in (*JOBS, NEWCOMER)}
    for one in JOBS:
        speaker.admit(one)
    for number in range(5):
        take(speaker, outcomes, number)
    speaker.park(JOBS[parked].id)
    speaker.admit(NEWCOMER)
    frames, _ = spied(made, monkeypatch)
    while not outcomes[NEWCOMER.id].chunks:
        take(speaker, outcomes, 0, held_back=[one.id for one in JOBS])
    assert {tuple(slots) for slots in frames} == {(0,)}
    while any(outcome.end is None for outcome in outcomes.values()):
        if speaker.capacity():
            speaker.unpark(JOBS[parked].id)
        take(speaker, outcomes, 0)
    assert {name: outcome.pcm for name, outcome in outcomes.items()} == alone


def test_jobs_that_have_not_spoken_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two newcomers do not move each other."""
    made = kept_parts("custom_voice")
    speaker = assemble(made)
    frames, _ = spied(made, monkeypatch)
    for one in JOBS:
        speaker.admit(one)
    speaker.step(())
    assert frames == [[0, 1, 2, 3]]


@pytest.mark.parametrize("answers", [[True], [False, True]], ids=["always", "every other time"])
def test_a_command_ends_a_step_early(
    answers: list[bool], alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step decodes one group of chunks at least; a job that is held back leaves its own due. Nothing is lost."""
    made = kept_parts("custom_voice")
    interrupted = itertools.cycle(answers)
    speaker = assemble(made, interrupted=lambda: next(interrupted))
    outcomes = {one.id: Outcome() for one in JOBS}
    _, decodes = spied(made, monkeypatch)
    waiting = list(JOBS)
    for number in range(1000):
        if waiting:
            speaker.admit(waiting.pop())  # one a step, so chunks of several lengths are due together
        held_back = [one.id for one in JOBS[number % 3 :: 3]]
        if speaker.runnable(held_back):
            del decodes[:]
            take(speaker, outcomes, number, held_back=held_back)
            assert not {name for group in decodes for name in group} & set(held_back)
    assert {name: outcome.pcm for name, outcome in outcomes.items()} == {one.id: alone[one.id] for one in JOBS}


def test_first_audio_comes_before_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a command waiting, the step that makes a newcomer's first frame decodes that, and nothing else."""
    made = kept_parts("custom_voice")
    commands: list[str] = []
    speaker = assemble(made, interrupted=lambda: bool(commands))
    speaker.admit(JOBS[0])
    for _ in range(3):
        speaker.step(())
    commands.append("credit")
    speaker.admit(NEWCOMER)
    _, decodes = spied(made, monkeypatch)
    events = speaker.step(())  # with the fourth frame of the first job its third chunk is due, too
    assert decodes == [[NEWCOMER.id]]
    assert [event.job_id for event in events if isinstance(event, Pcm)] == [NEWCOMER.id]
    speaker.step([JOBS[0].id])  # the same while it is held back
    assert decodes == [[NEWCOMER.id]] * 2
    speaker.step([NEWCOMER.id])
    assert decodes == [[NEWCOMER.id], [NEWCOMER.id], [JOBS[0].id]]
