"""An engine speaks the official waveform, the same in any batch, utterance by utterance."""

import gc
import itertools

import numpy as np
import pytest

from gpu_worker.engines.base import Done, Pcm
from gpu_worker.engines.qwen import planner
from gpu_worker.engines.qwen.engine import QwenEngine
from shared.pcm import bytes_for
from shared.protocol import Sampling, Segment
from tests.benchmarks.endless import endless
from tests.checkpoints import Kind
from tests.gpu_worker.engines.qwen.driving import UNFADED, Outcome, clone, engine, job, kept_engine, run, take
from tests.gpu_worker.engines.qwen.parity import CASES, expected, official

FRAME_BYTES = 3840
PAUSE = bytes(7200)
"""The silence between utterances."""
LONG = "Hello world, good morning to the voice of today. " * 6
"""A text of several utterances."""


def end_of(outcome: Outcome) -> tuple[str, int]:
    """The reason of a job's end, and its frames."""
    assert isinstance(outcome.end, Done)
    return outcome.end.reason, outcome.end.usage.output_tokens


def tokens_of(text: str) -> int:
    """Text tokens, by the tokenizer of the official package."""
    return len(official("custom_voice", None).processor.tokenizer(text)["input_ids"])


@pytest.mark.parametrize("index", [0, 8])
def test_greedy_speech_equals_the_official_waveform(index: int) -> None:
    """The samples are those that the official package decodes from its codes, to one part in 32767.

    Only a loud beginning is faded in for 2 ms, and a loud end out for 5 ms.
    """
    case, wanted = CASES[index], expected(index)
    frames = min(12, len(wanted.codes))
    tasks = {"custom_voice": "CustomVoice", "voice_design": "VoiceDesign"}
    speaker = kept_engine(case.kind, case.size)
    spoken = run(
        speaker,
        [
            job(
                0,
                case.text,
                task=tasks[case.kind],
                voice=case.voice,
                language=case.language,
                instructions=case.instructions,
                non_streaming_mode=case.whole_text,
                sampling=Sampling(temperature=0, max_new_tokens=frames),
            )
        ],
    )
    decoder = official(case.kind, case.size).model.speech_tokenizer
    (waveform,), _ = decoder.decode([{"audio_codes": wanted.codes[:frames]}])
    ours = np.frombuffer(spoken["job 0"].pcm, dtype="<i2") / 32767
    assert ours.shape == waveform.shape
    assert np.abs(ours - waveform)[UNFADED].max() < 3e-5
    assert np.abs(ours[[0, -1]]).max() < 2e-3


def test_the_first_chunk_is_one_frame_and_later_ones_grow(speaker: QwenEngine) -> None:
    """The first two steps of a job return 80 ms each; then come chunks of 2, 4 and 8 frames."""
    spoken = run(speaker, [job(17, sampling=Sampling(seed=17, max_new_tokens=24))])["job 17"]
    _, frames = end_of(spoken)
    assert [len(chunk) // FRAME_BYTES for chunk in spoken.chunks] == [1, 1, 2, 4, 8, 8]
    assert sum(map(len, spoken.chunks)) == frames * FRAME_BYTES
    assert spoken.steps[0] == 1  # `run` admits the job instead of step 0


def test_audio_is_the_same_in_any_batch(speaker: QwenEngine) -> None:
    """Eight jobs on four slots, which join at odd steps, have the very samples of each job alone."""
    jobs = [job(number, "Hello world. " * (1 + number % 3)) for number in range(8)]
    together = run(speaker, jobs, every=3)
    for one in jobs:
        alone = run(speaker, [one])[one.id]
        assert together[one.id].pcm == alone.pcm
        assert end_of(together[one.id]) == end_of(alone)


def test_frames_are_counted_by_their_jobs(speaker: QwenEngine) -> None:
    """Every frame counts once, by the number of its jobs; the code predictor's trace was ready for each."""
    spoken = run(speaker, [job(number, sampling=Sampling(seed=1, max_new_tokens=3 + number)) for number in range(3)])
    counted = speaker.stats()
    frames = sum(end_of(outcome)[1] for outcome in spoken.values())
    assert sum(size * count for size, count in counted.batch_sizes.items()) >= frames  # some run beyond the end
    assert max(counted.batch_sizes) == 3
    assert (counted.captured_steps, counted.eager_steps) == (sum(counted.batch_sizes.values()), 0)


def test_emptied_caches_change_no_sample(speaker: QwenEngine) -> None:
    """Prompts and tokens are made again; each look-up counts as a hit or a miss."""
    speaker.empty_cache("prompts")
    speaker.empty_cache("tokens")
    missed = {cache.name: cache.misses for cache in speaker.stats().caches}["prompts"]
    spoken = [run(speaker, [job(1, sampling=Sampling(seed=1, max_new_tokens=3))])["job 1"].pcm]
    before = {cache.name: cache for cache in speaker.stats().caches}
    assert before.keys() == {"references", "prompts", "tokens"}
    assert (before["prompts"].entries, before["prompts"].misses, before["tokens"].entries > 0) == (1, missed + 1, True)
    assert before["prompts"].bytes
    spoken.append(run(speaker, [job(1, sampling=Sampling(seed=1, max_new_tokens=3))])["job 1"].pcm)
    assert {cache.name: cache.hits for cache in speaker.stats().caches}["prompts"] == before["prompts"].hits + 1
    for name in ("references", "prompts", "prefixes", "tokens", "recordings"):
        speaker.empty_cache(name)  # type: ignore[arg-type] # a word of the protocol
    assert [cache.entries for cache in speaker.stats().caches] == [0, 0, 0]
    spoken.append(run(speaker, [job(1, sampling=Sampling(seed=1, max_new_tokens=3))])["job 1"].pcm)
    assert len(set(spoken)) == 1


def test_a_long_text_is_spoken_utterance_by_utterance(speaker: QwenEngine) -> None:
    """Sentences beyond the limit of an utterance follow in the same slot, with nothing but the pause between them."""
    spoken = run(speaker, [job(1, LONG, sampling=Sampling(seed=1))])["job 1"]
    assert spoken.chunks.count(PAUSE) >= 1
    assert isinstance(spoken.end, Done)
    around = [PAUSE, *spoken.chunks, PAUSE]
    for before, after in itertools.pairwise(np.frombuffer(chunk, "<i2").astype(int) for chunk in around):
        if not (before.any() and after.any()):
            assert max(abs(before[-1]), abs(after[0])) <= 66  # no click where words meet silence
    pauses = spoken.chunks.count(PAUSE)
    assert len(spoken.pcm) == spoken.end.usage.output_tokens * FRAME_BYTES + pauses * len(PAUSE)
    assert abs(spoken.end.usage.input_tokens - tokens_of(LONG.strip())) <= pauses


PAUSED = [
    Segment(text="", pause_ms=250),
    Segment(text="Hello world.", pause_ms=1500),
    Segment(text="Good morning.", pause_ms=701, rate=2.0),
]
"""Pauses before, between and behind two utterances."""


def test_pauses_are_exact(speaker: QwenEngine) -> None:
    """A pause comes on top of the silence between utterances, in pieces, and the words around it stay the same."""
    spoken = run(speaker, [job(1, segments=PAUSED, sampling=Sampling(seed=1))])["job 1"]
    alone = run(speaker, [job(1, "Hello world.", sampling=Sampling(seed=1))])["job 1"]
    assert spoken.pcm.startswith(bytes(bytes_for(0.25)) + alone.pcm + PAUSE + bytes(72_000))
    assert spoken.pcm.endswith(bytes(bytes_for(0.701)))
    assert len(spoken.pcm) == end_of(spoken)[1] * FRAME_BYTES + len(PAUSE) + bytes_for(2.451)
    assert max(len(chunk) for chunk in spoken.chunks) <= bytes_for(0.64)


def test_a_job_in_a_pause_can_be_held_back_and_cancelled(speaker: QwenEngine) -> None:
    """While it is held back, no silence comes either. The rates of the pieces are those of their segments."""
    one = job(1, segments=PAUSED, sampling=Sampling(seed=1))
    speaker.admit(one)
    assert not speaker.runnable([one.id])
    assert speaker.step([one.id]) == []
    rates = []
    while speaker.runnable(()):
        rates += [event.rate for event in speaker.step(()) if isinstance(event, Pcm)]
    assert [rate for rate, _ in itertools.groupby(rates)] == [None, 1.0, None, 2.0, None]
    speaker.admit(one)
    speaker.step(())
    speaker.cancel(one.id)
    assert not speaker.runnable(())


def test_every_utterance_has_its_own_randomness(speaker: QwenEngine) -> None:
    """The same words twice under one seed sound different the second time."""
    sentence = "Hello world, good morning to the voice of today and hello again to all of the world this morning. "
    spoken = run(speaker, [job(2, sentence * 2, sampling=Sampling(seed=2))])["job 2"]
    first, second = spoken.pcm.split(PAUSE)
    assert first[: 4 * FRAME_BYTES] != second[: 4 * FRAME_BYTES]


def test_the_requests_limit_counts_all_utterances(speaker: QwenEngine) -> None:
    """`max_new_tokens` ends the job in any utterance. The speech until then is that of the job without a limit."""
    whole = run(speaker, [job(1, LONG, sampling=Sampling(seed=1))])["job 1"]
    first = -(-whole.pcm.index(PAUSE) // FRAME_BYTES)  # the last byte of the speech may be zero, too
    for frames in (first, first + 3):
        cut = run(speaker, [job(1, LONG, sampling=Sampling(seed=1, max_new_tokens=frames))])["job 1"]
        assert end_of(cut) == ("length", frames)
        # The last chunk is shorter, so it rounds differently; and its end is faded out.
        spoken, wanted = (np.frombuffer(pcm[: len(cut.pcm)], "<i2").astype(int) for pcm in (cut.pcm, whole.pcm))
        assert np.abs(spoken - wanted)[UNFADED].max() <= 1


def test_a_limit_is_reported_as_length(speaker: QwenEngine) -> None:
    """The job has exactly `max_new_tokens` frames, and the reason `length`."""
    assert end_of(run(speaker, [job(4, sampling=Sampling(seed=4, max_new_tokens=3))])["job 4"]) == ("length", 3)


def test_a_slot_filled_to_its_end_harms_no_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that fills its slot ends with `length`, and the other job continues."""
    monkeypatch.setattr(planner, "MIN_FRAME_CAP", 40)  # so that a small slot can be filled
    speaker = engine("custom_voice", slots=2, max_model_len=96, directory=endless("tiny"))
    limit = Sampling(seed=1, max_new_tokens=90)
    filling = job(1, "Hello world, good morning. See you then.", sampling=limit)
    outcomes = run(speaker, [filling, job(2, sampling=limit)], every=30)
    _, frames = end_of(outcomes["job 1"])
    assert frames == 59  # 96, less 36 prompt tokens and the position that stays free
    assert end_of(outcomes["job 2"]) == ("length", 71)


def test_a_cancelled_job_frees_its_slot_at_once(speaker: QwenEngine) -> None:
    """The cancelled job has no further event, its neighbours continue, and the next job takes the slot."""
    jobs = [job(number, sampling=Sampling(seed=17, max_new_tokens=20)) for number in range(4)]
    outcomes = {one.id: Outcome() for one in jobs}
    for one in jobs:
        speaker.admit(one)
    assert speaker.capacity() == 0
    for number in range(3):
        take(speaker, outcomes, number)
    speaker.cancel("job 1")
    speaker.cancel("job 1")
    assert speaker.capacity() == 1
    delivered = list(outcomes["job 1"].chunks)
    late = job(9)
    outcomes[late.id] = Outcome()
    speaker.admit(late)
    while not all(outcome.end for name, outcome in outcomes.items() if name != "job 1"):
        take(speaker, outcomes, 0)
    assert outcomes["job 1"].chunks == delivered
    assert outcomes["job 2"].pcm == outcomes["job 0"].pcm
    assert outcomes[late.id].pcm == run(speaker, [late])[late.id].pcm


def test_nothing_is_kept_of_a_job(speaker: QwenEngine) -> None:
    """Neither of one that has ended nor of one that was cancelled: the number of objects stays the same."""

    def objects_after(first: int) -> int:
        for number in range(first, first + 4, 2):
            cancelled, spoken = (job(one, sampling=Sampling(seed=1, max_new_tokens=3)) for one in (number, number + 1))
            speaker.admit(cancelled)
            take(speaker, {cancelled.id: Outcome()}, 0)
            speaker.cancel(cancelled.id)
            run(speaker, [spoken])
        gc.collect()
        return len(gc.get_objects())

    counts = [objects_after(first) for first in range(100, 112, 4)]
    assert counts[2] - counts[1] < 4, counts


def test_a_job_that_is_held_back_pauses_and_loses_nothing(speaker: QwenEngine) -> None:
    """A job that is held back returns no audio. Afterwards it continues where it was."""
    jobs = [job(17, sampling=Sampling(seed=17, max_new_tokens=12)), job(4)]
    outcomes = {one.id: Outcome() for one in jobs}
    for one in jobs:
        speaker.admit(one)
    take(speaker, outcomes, 0)
    delivered = len(outcomes["job 17"].chunks)
    while outcomes["job 4"].end is None:
        take(speaker, outcomes, 0, held_back=["job 17"])
    assert len(outcomes["job 17"].chunks) == delivered
    assert not speaker.runnable(["job 17"])
    assert speaker.runnable([])
    while outcomes["job 17"].end is None:
        take(speaker, outcomes, 0)
    assert outcomes["job 17"].pcm == run(speaker, jobs[:1])["job 17"].pcm


def test_a_described_voice_speaks_in_one_utterance() -> None:
    """The voice would be a different one in the next utterance, so a text of many tokens stays whole."""
    speaker = kept_engine("voice_design", slots=1, traced=False, max_model_len=2048)
    limit = 341 - tokens_of("a deep voice") // 6
    words = "hello world " * 400
    fitting = words[: next(end for end in range(len(words), 0, -12) if tokens_of(words[:end].strip()) < limit - 2)]
    fields = {"task": "VoiceDesign", "voice": "", "instructions": "a deep voice"}
    spoken = run(speaker, [job(1, fitting, **fields, sampling=Sampling(seed=1, max_new_tokens=2))])["job 1"]
    assert isinstance(spoken.end, Done)
    assert spoken.end.usage.input_tokens == tokens_of(fitting.strip())


@pytest.mark.parametrize("kind", ["custom_voice", "base"])
def test_offloading_changes_no_sample(kind: Kind) -> None:
    """After `offload` and `restore` a seed gives the same audio. In between, the device holds nothing."""
    speaker = engine(kind, slots=1, traced=True)
    one = job(5) if kind == "custom_voice" else clone(5)
    before = run(speaker, [one])[one.id].pcm
    resident = speaker.memory()
    speaker.offload()
    assert speaker.memory().device == {}
    assert speaker.memory().host == {
        purpose: resident.device[purpose] for purpose in ("weights", "graphs", "workspace")
    }
    speaker.restore()
    assert speaker.memory().device.keys() == resident.device.keys() - {"references"}
    assert run(speaker, [one])[one.id].pcm == before
    speaker.close()
    assert speaker.memory().device == {}


def test_the_engine_uses_the_checkpoints_own_tokenizer(speaker: QwenEngine) -> None:
    """A text has as many tokens as the official tokenizer counts."""
    text = "Hello 今天 world!"
    spoken = run(speaker, [job(1, text, sampling=Sampling(seed=1, max_new_tokens=2))])["job 1"]
    assert isinstance(spoken.end, Done)
    assert spoken.end.usage.input_tokens == tokens_of(text)
