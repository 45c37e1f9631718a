"""Jobs whose text is still being written: they speak what the whole text would, and wait where it is missing."""

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.engines.base import Done, Job
from gpu_worker.engines.fades import FADE_OUT_S
from gpu_worker.engines.qwen.engine import QwenEngine
from shared.pcm import EMPTY_S, FRAME_SAMPLES, SAMPLE_RATE, bytes_for
from shared.protocol import Sampling, Segment, Task
from shared.text import is_speakable
from tests.checkpoints import Kind
from tests.gpu_worker.engines.qwen.driving import Outcome, clone, job, kept_engine, run, take
from tests.gpu_worker.engines.qwen.test_incremental_splitting import WORDS
from tests.gpu_worker.fakes import FakeClock

TEXT = "Hello world, good morning."


END = "\0"
"""Stands for the end of a text among its pieces."""

HELD_SAMPLES = round(FADE_OUT_S * SAMPLE_RATE)

MORE_WORDS = [*WORDS, "<", "<|im_end|>", "<tts_", "pad>"]

Speakers = dict[Task, QwenEngine]


@pytest.fixture(scope="module")
def speakers() -> Iterator[Speakers]:
    """An engine of each task with four slots, idle again after each test. The first one runs ahead, as on CUDA."""
    kinds: dict[Task, Kind] = {"CustomVoice": "custom_voice", "VoiceDesign": "voice_design", "Base": "base"}
    made = {task: kept_engine(kind, run_ahead=task == "CustomVoice") for task, kind in kinds.items()}
    yield made
    for speaker in made.values():
        assert speaker.capacity() == 4


@pytest.fixture
def speaker(speakers: Speakers) -> QwenEngine:
    """The engine of preset voices."""
    return speakers["CustomVoice"]


def opened(whole: Job) -> Job:
    """The job with the same voice and seed, to which the text has not come yet."""
    return msgspec.structs.replace(whole, segments=[], open=True, non_streaming_mode=None)


def streamed(number: int, text: str = TEXT, **fields: object) -> Job:
    """A job of the layout that reads its text frame by frame."""
    return job(number, text, non_streaming_mode=False, **fields)


def drain(speaker: QwenEngine, outcomes: dict[str, Outcome]) -> None:
    """Step until nothing is left to do."""
    while speaker.runnable(()):
        take(speaker, outcomes, 0)


def test_pieces_and_flushes(speaker: QwenEngine) -> None:
    """A flush ends an utterance, as the end of a segment does."""
    whole = streamed(3, segments=[Segment(text="Hello world."), Segment(text="Good morning.")])
    wanted = run(speaker, [whole])[whole.id]
    outcomes = {whole.id: Outcome()}
    speaker.admit(opened(whole))
    for piece, flush in (("Hel", False), ("lo world.", True), ("Good mor", False), ("ning.", False)):
        speaker.append(whole.id, piece, flush=flush)
        drain(speaker, outcomes)
        assert speaker.waits_for_text(whole.id)
    speaker.end_text(whole.id)
    drain(speaker, outcomes)
    assert outcomes[whole.id].pcm == wanted.pcm
    assert outcomes[whole.id].end == wanted.end


def test_the_first_word_is_spoken_before_the_second_comes(speaker: QwenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a frame for each token that is sure, the last one without its end, which a fade might change.

    The clock stands still: no audio waits for anything but text.
    """
    monkeypatch.setattr(speaker, "_clock", FakeClock())
    whole = streamed(2, "hello good morning", sampling=Sampling(seed=2))
    wanted = run(speaker, [whole])[whole.id].pcm
    outcomes = {whole.id: Outcome()}
    speaker.admit(opened(whole))
    text, heard = "", []
    for piece in ("hel", "lo", " ", "go", "od ", "morn"):
        text += piece
        speaker.append(whole.id, piece, flush=False)
        drain(speaker, outcomes)
        tokens = len(speaker._parts.prompts.settled(text))
        assert len(outcomes[whole.id].pcm) == (tokens and 2 * (tokens * FRAME_SAMPLES - HELD_SAMPLES))
        assert wanted.startswith(outcomes[whole.id].pcm)
        heard.append(tokens)
    assert heard[:3] == [0, 0, 1]
    assert heard[-1] > 2
    speaker.cancel(whole.id)


def test_a_clone_waits_for_its_recording_first(speakers: Speakers) -> None:
    """Until its recording is encoded, an open clone has no utterance, and does not wait for text."""
    cloning = speakers["Base"]
    cloning.admit(opened(clone(1, non_streaming_mode=False)))
    assert not cloning.waits_for_text("job 1")
    cloning.cancel("job 1")


def test_a_text_without_a_word(speaker: QwenEngine) -> None:
    """It ends with a moment of silence."""
    for piece in ("", " \n", "--- …"):
        outcomes = {"job 1": Outcome()}
        speaker.admit(opened(streamed(1)))
        speaker.append("job 1", piece, flush=True)
        speaker.append("job 1", piece, flush=False)
        speaker.end_text("job 1")
        drain(speaker, outcomes)
        assert outcomes["job 1"].pcm == bytes(bytes_for(EMPTY_S))
        assert isinstance(outcomes["job 1"].end, Done)
        assert outcomes["job 1"].end.reason == "empty"


def test_a_limit_on_frames_ends_the_job_when_more_text_comes(speaker: QwenEngine) -> None:
    """An utterance may end at the limit: whether the speech was cut shows when the next text comes."""
    whole = streamed(
        1, segments=[Segment(text="Hello."), Segment(text="World.")], sampling=Sampling(seed=1, max_new_tokens=3)
    )
    wanted = run(speaker, [whole])[whole.id]
    outcomes = {whole.id: Outcome()}
    speaker.admit(opened(whole))
    speaker.append(whole.id, "Hello.", flush=True)
    drain(speaker, outcomes)
    assert outcomes[whole.id].end is None
    speaker.append(whole.id, "World.", flush=False)
    speaker.end_text(whole.id)
    drain(speaker, outcomes)
    assert outcomes[whole.id].end == wanted.end
    assert outcomes[whole.id].pcm == wanted.pcm


def whole_jobs(draw: st.DrawFn) -> list[Job]:
    """One to four jobs of one model, in all its layouts, with texts of many scripts, and flushes as segments."""
    kind: Kind = draw(st.sampled_from(("custom_voice", "voice_design", "base")))
    most, words = (3, st.sampled_from(WORDS[:30])) if kind == "voice_design" else (7, st.sampled_from(MORE_WORDS))
    made = []
    for number in range(draw(st.integers(1, 3))):
        texts = draw(st.lists(st.lists(words, max_size=most), min_size=1, max_size=2))
        joint = draw(st.sampled_from((" ", " ", "")))
        segments = [Segment(text=joint.join(words)) for words in (texts[:1] if kind == "voice_design" else texts)]
        if not any(is_speakable(segment.text) for segment in segments):
            segments[0] = Segment(text="Hello.")
        fields: dict[str, Any] = {
            "sampling": Sampling(seed=number, max_new_tokens=draw(st.sampled_from((6, 15, 40)))),
            "language": draw(st.sampled_from(("auto", "chinese", "german"))),
            "non_streaming_mode": False,
            "segments": segments,
        }
        if kind == "base":
            made.append(clone(number, text=draw(st.sampled_from((None, "the speech of today"))), **fields))
        elif kind == "voice_design":
            made.append(job(number, task="VoiceDesign", voice="", instructions="a deep voice", **fields))
        else:
            made.append(job(number, **fields))
    return made


@settings(max_examples=settings().max_examples // 8)
@given(jobs=st.composite(whole_jobs)(), seed=st.integers(0, 2**32))
def test_pieces_are_spoken_as_the_whole_text(speakers: Speakers, jobs: list[Job], seed: int) -> None:
    """Codes and sound are equal, for all pieces and delays, while jobs join, leave, wait, are parked and come back."""
    speaker = speakers[jobs[0].task]
    try:
        check_pieces(speaker, jobs, seed)
    finally:
        for one in jobs:
            speaker.cancel(one.id)
    assert speaker.capacity() == 4


def check_pieces(speaker: QwenEngine, jobs: list[Job], seed: int) -> None:
    """Let the jobs speak whole, then in pieces."""
    wanted = run(speaker, jobs)
    dice = random.Random(seed)  # noqa: S311 -- Hypothesis chooses the seed
    outcomes = {one.id: Outcome() for one in jobs}
    coming = list(jobs)
    texts = {one.id: written(one, dice) for one in jobs}
    hurry = 0.05 + dice.random()
    for _ in range(10_000):
        if coming and dice.random() < 0.5 and speaker.capacity():
            speaker.admit(opened(coming.pop(0)))
        for name in [one.id for one in jobs if one not in coming and not outcomes[one.id].end]:
            if dice.random() < hurry and texts[name]:
                write(speaker, name, texts[name].pop(0))
            if dice.random() < 0.02:
                speaker.park(name)
            elif speaker.capacity():
                speaker.unpark(name)
        if speaker.runnable(()):
            take(speaker, outcomes, 0)
        if all(outcome.end for outcome in outcomes.values()):
            break
    for name, outcome in outcomes.items():
        assert outcome.end == wanted[name].end
        assert outcome.pcm == wanted[name].pcm


def written(whole: Job, dice: random.Random) -> list[str | None]:
    """The job's text in pieces, with None for a flush between its segments, and for its end."""
    pieces: list[str | None] = []
    for segment in whole.segments:
        text = segment.text
        while text:
            size = min(dice.choice((1, 1, 2, 5, 30)), len(text))
            pieces.append(text[:size])
            text = text[size:]
        pieces.append(None)
    return [*pieces[:-1], END]


def write(speaker: QwenEngine, name: str, piece: str | None) -> None:
    """Send a piece, a flush or the end."""
    if piece == END:
        speaker.end_text(name)
    else:
        speaker.append(name, piece or "", flush=piece is None)
