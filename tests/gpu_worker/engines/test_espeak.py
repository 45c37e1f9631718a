"""espeak-ng behind the Engine protocol: real speech, compared with itself and heard by a recogniser."""

import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gpu_worker.engines.base import Done, Event, Fault, Job, JobError, Memory, Pcm, Sampling
from gpu_worker.engines.espeak import CHUNK_S, MAX_PIECE_CHARS, SLOTS, EspeakEngine
from shared.catalog import Voice, load_catalog
from shared.pcm import FRAME_SAMPLES, bytes_for, seconds_of
from tests.audio import peak
from tests.recogniser import SENTENCES, recognise

SPEC = next(spec for spec in load_catalog() if spec.engine == "espeak")
AUDIBLE = 1_000
"""A peak that silence and noise do not reach."""


@pytest.fixture(scope="module")
def engine() -> EspeakEngine:
    """One engine for all tests, as there is one in a process; each leaves it empty."""
    return EspeakEngine(SPEC)


_ids = itertools.count()


def _job(text: str, voice: str = "en-us+f2", language: str = "auto", max_new_tokens: int | None = None) -> Job:
    return Job(
        id=f"job-{next(_ids)}",
        task="CustomVoice",
        text=text,
        voice=voice,
        language=language,
        sampling=Sampling(max_new_tokens=max_new_tokens),
    )


def _run(engine: EspeakEngine, jobs: Iterable[Job]) -> dict[str, list[Event]]:
    """The events of each job, all admitted together, to their ends."""
    events: dict[str, list[Event]] = {}
    for job in jobs:
        engine.admit(job)
        events[job.id] = []
    while engine.runnable(()):
        for event in engine.step(()):
            events[event.job_id].append(event)
    assert engine.capacity() == SLOTS
    return events


def _speech(events: Iterable[Event]) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, Pcm))


def _spectrum(pcm: bytes) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How loud `pcm` is on average in each of 64 bands up to 6 kHz, in dB."""
    samples = np.frombuffer(pcm, dtype="<i2").astype(np.float64)
    frames = samples[: len(samples) // 1024 * 1024].reshape(-1, 1024) * np.hanning(1024)
    power = (np.abs(np.fft.rfft(frames)) ** 2).mean(axis=0)[1:257].reshape(64, 4).mean(axis=1)
    spectrum: np.ndarray[Any, np.dtype[np.float64]] = 10 * np.log10(power + 1)
    return spectrum


def _alike(one: bytes, other: bytes) -> bool:
    """Whether the same voice says the same, as far as espeak-ng ever says the same twice.

    Its oscillators go on where they were: lengths differ by up to 30 ms, spectra by 0.8 dB;
    between two voices of the catalogue it is 1.2 dB at least, and mostly more than 2.
    """
    apart_db = float(np.abs(_spectrum(one) - _spectrum(other)).mean())
    return abs(seconds_of(one) - seconds_of(other)) < 0.05 and apart_db < 1.0


def _say(engine: EspeakEngine, job: Job) -> bytes:
    events = _run(engine, [job])[job.id]
    assert isinstance(events[-1], Done)
    return _speech(events)


class TestSpeech:
    """What is heard."""

    @pytest.mark.parametrize("sentence", SENTENCES[:3])
    def test_intelligible(self, engine: EspeakEngine, sentence: str) -> None:
        """A recogniser hears the sentence."""
        assert recognise(_say(engine, _job(sentence))) == sentence

    def test_every_voice(self, engine: EspeakEngine) -> None:
        """Each voice of the catalogue speaks, and sounds like no other."""
        speech = {voice.id: _say(engine, _job("12, 34.", voice.id)) for voice in SPEC.voices}
        for voice, pcm in speech.items():
            assert 0.8 < seconds_of(pcm) < 8, voice
            assert peak(pcm) > AUDIBLE, voice
        assert not any(_alike(one, other) for one, other in itertools.combinations(speech.values(), 2))

    def test_every_language(self, engine: EspeakEngine) -> None:
        """One voice speaks each language of the catalogue, and each otherwise; its own as if none were named."""
        speech = {
            language.name: _say(engine, _job("12, 34.", "en-us+f2", language.name)) for language in SPEC.languages
        }
        assert all(peak(pcm) > AUDIBLE for pcm in speech.values())
        assert not any(_alike(one, other) for one, other in itertools.combinations(speech.values(), 2))
        assert _alike(speech["english"], _say(engine, _job("12, 34.", "en-us+f2")))

    def test_another_language_keeps_the_voice(self, engine: EspeakEngine) -> None:
        """A voice in another language is that language with the variant that makes the voice."""
        voices = [*SPEC.voices, Voice(id="de+f2", name="Emma's German", language="german")]
        wider = EspeakEngine(msgspec.structs.replace(SPEC, voices=voices))
        expected = _say(wider, _job("Guten Morgen.", "de+f2"))
        assert _alike(_say(engine, _job("Guten Morgen.", "en-us+f2", "german")), expected)
        assert not _alike(_say(engine, _job("Guten Morgen.", "de+f3")), expected)

    def test_by_name(self, engine: EspeakEngine) -> None:
        """A voice's name means the voice."""
        assert _alike(_say(engine, _job("Hello.", "emma")), _say(engine, _job("Hello.", "en-us+f2")))

    def test_same_again(self, engine: EspeakEngine) -> None:
        """A voice keeps its pace and sound, whichever other spoke before."""
        first = _say(engine, _job(SENTENCES[0]))
        for voice in SPEC.voices:
            _say(engine, _job("12.", voice.id))
            assert _alike(_say(engine, _job(SENTENCES[0])), first), voice.id


class TestWholeText:
    """Nothing of a text is left out."""

    def test_several_sentences(self, engine: EspeakEngine) -> None:
        """Sentence by sentence, each is heard, in order."""
        text = " ".join(SENTENCES[:4])
        assert recognise(_say(engine, _job(text)), 4) == text

    def test_as_long_as_its_parts(self, engine: EspeakEngine) -> None:
        """A text of many sentences takes as long as they do one by one, and a pause between each two."""
        alone = sum(seconds_of(_say(engine, _job(sentence))) for sentence in SENTENCES)
        pauses = 0.45 * (len(SENTENCES) - 1)
        assert seconds_of(_say(engine, _job(" ".join(SENTENCES)))) == pytest.approx(alone + pauses, rel=0.03)

    @pytest.mark.parametrize(
        "separator", [", ", "; ", ": ", "! ", "? ", "\n", "\n\n", "... ", " — ", "。", " (", '" "']
    )
    def test_separators(self, engine: EspeakEngine, separator: str) -> None:
        """However clauses are parted, all of them are said."""
        once = seconds_of(_say(engine, _job("seventeen brown foxes")))
        text = separator.join(["seventeen brown foxes"] * 6)
        assert 6 * once * 0.8 < seconds_of(_say(engine, _job(text))) < 6 * once * 1.5

    def test_without_punctuation(self, engine: EspeakEngine) -> None:
        """A text far longer than espeak-ng takes at once, without a full stop, is said to its end."""
        words = ["seven", "green", "bottles"] * 200
        assert len(" ".join(words)) > 3 * MAX_PIECE_CHARS
        short = seconds_of(_say(engine, _job(" ".join(words[:60]))))
        assert seconds_of(_say(engine, _job(" ".join(words)))) == pytest.approx(10 * short, rel=0.05)

    def test_without_spaces(self, engine: EspeakEngine) -> None:
        """Nor is a word without end cut off."""
        lengths = [seconds_of(_say(engine, _job("ba" * count))) for count in (100, 1_000, 2_000)]
        assert lengths[0] < lengths[1] < lengths[2]

    def test_other_scripts(self, engine: EspeakEngine) -> None:
        """Characters are counted as characters, however many bytes they take."""
        for voice, text in (("cmn+f3", "今天天气很好。"), ("ar+m2", "صباح الخير. "), ("ru+f3", "Доброе утро. ")):
            once = seconds_of(_say(engine, _job(text, voice)))
            assert 8 * once < seconds_of(_say(engine, _job(text * 8, voice))) < 8 * (once + 0.6)


class TestStreaming:
    """How it comes out."""

    def test_chunks(self, engine: EspeakEngine) -> None:
        """100 ms at first, then 200, then 400, the rest at the end; Done is the last word."""
        job = _job(SENTENCES[0])
        *pieces, done = _run(engine, [job])[job.id]
        sizes = [len(piece.data) for piece in pieces if isinstance(piece, Pcm)]
        assert sizes[:3] == [bytes_for(seconds) for seconds in CHUNK_S]
        assert set(sizes[2:-1]) == {bytes_for(0.4)}
        assert 0 < sizes[-1] <= bytes_for(0.4)
        assert isinstance(done, Done)
        assert done.reason == "stop"

    def test_first_step(self, engine: EspeakEngine) -> None:
        """The first step of a long text already speaks."""
        engine.admit(job := _job(" ".join(SENTENCES)))
        assert [len(event.data) for event in engine.step(()) if isinstance(event, Pcm)] == [bytes_for(0.1)]
        engine.cancel(job.id)

    def test_usage(self, engine: EspeakEngine) -> None:
        """Words in, frames of 80 ms out."""
        job = _job("one two three")
        events = _run(engine, [job])[job.id]
        done = events[-1]
        assert isinstance(done, Done)
        assert done.usage.input_tokens == 3
        assert done.usage.output_tokens == -(-len(_speech(events)) // (FRAME_SAMPLES * 2))

    def test_side_by_side(self, engine: EspeakEngine) -> None:
        """32 jobs in one another's way, of many voices, each sound as they do alone."""
        jobs = [
            _job(f"{SENTENCES[index % 20]} Number {index}.", SPEC.voices[index % len(SPEC.voices)].id)
            for index in range(SLOTS)
        ]
        together = _run(engine, jobs)
        for job in jobs:
            alone = msgspec.structs.replace(job, id="alone")
            assert _alike(_speech(together[job.id]), _say(engine, alone))

    def test_slots(self, engine: EspeakEngine) -> None:
        """Each job takes a slot until its end."""
        jobs = [_job("hello") for _ in range(3)]
        for job in jobs:
            engine.admit(job)
        assert engine.capacity() == SLOTS - 3
        engine.cancel(jobs[0].id)
        assert engine.capacity() == SLOTS - 2
        engine.close()
        assert engine.capacity() == SLOTS

    def test_stalled(self, engine: EspeakEngine) -> None:
        """A job that may not go on is left alone, and loses nothing by it."""
        slow, fast = _job(SENTENCES[0]), _job(SENTENCES[1])
        engine.admit(slow)
        engine.admit(fast)
        heard: list[Event] = []
        while engine.runnable({slow.id}):
            heard += engine.step({slow.id})
        assert {event.job_id for event in heard} == {fast.id}
        while engine.runnable(()):
            heard += engine.step(())
        assert recognise(_speech(event for event in heard if event.job_id == slow.id)) == SENTENCES[0]

    def test_cancel(self, engine: EspeakEngine) -> None:
        """A cancelled job is never heard again; its neighbour is not disturbed; an unknown one is no matter."""
        gone, stays = _job(SENTENCES[0]), _job(SENTENCES[1])
        engine.admit(gone)
        engine.admit(stays)
        heard = engine.step(())
        engine.cancel(gone.id)
        engine.cancel("nobody")
        while engine.runnable(()):
            events = engine.step(())
            assert {event.job_id for event in events} <= {stays.id}
            heard += events
        assert recognise(_speech(event for event in heard if event.job_id == stays.id)) == SENTENCES[1]

    def test_one_clause_a_step(self, engine: EspeakEngine) -> None:
        """A text of a thousand silent clauses does not hold the others up: it is no more than one of them a step."""
        engine.admit(quiet := _job("\n\n.\n" * 500))
        engine.admit(_job(SENTENCES[0]))
        heard = list(itertools.chain.from_iterable(engine.step(()) for _ in range(20)))
        assert recognise(_speech(event for event in heard if event.job_id != quiet.id)) == SENTENCES[0]
        assert engine.runnable(())
        engine.cancel(quiet.id)

    def test_length(self, engine: EspeakEngine) -> None:
        """A cap on frames ends the speech there, to the sample; one that is not reached changes nothing."""
        job = _job(SENTENCES[0], max_new_tokens=7)
        events = _run(engine, [job])[job.id]
        done = events[-1]
        assert isinstance(done, Done)
        assert (done.reason, done.usage.output_tokens) == ("length", 7)
        assert len(_speech(events)) == 7 * FRAME_SAMPLES * 2
        assert recognise(_say(engine, _job(SENTENCES[0], max_new_tokens=1_000))) == SENTENCES[0]


class TestOddText:
    """What clients write."""

    @pytest.mark.parametrize("text", ["", " \n\t", "\0", "\u200b\u200d\ufeff", "\x01\x1b", "\u00a0\u3000"])
    def test_nothing_to_say(self, engine: EspeakEngine, text: str) -> None:
        """Blanks and control characters are refused, and hold no slot."""
        with pytest.raises(JobError, match="no speakable text") as caught:
            engine.admit(_job(text))
        assert (caught.value.code, caught.value.param) == ("invalid_value", "input")
        assert engine.capacity() == SLOTS

    @pytest.mark.parametrize(
        "text",
        [
            "😀",
            "a\0b",
            "\x01hello\x1b[31m",
            "<speak>hello</speak>",
            "[[h@l'oU]]",
            "\u202ehello",
            "é" * 50,
            "\ud800 hello",
        ],
    )
    def test_spoken(self, engine: EspeakEngine, text: str) -> None:
        """Anything else is said somehow, and ends."""
        assert peak(_say(engine, _job(text))) > AUDIBLE

    def test_nul_ends_nothing(self, engine: EspeakEngine) -> None:
        """What stands behind a NUL is said too."""
        assert recognise(_say(engine, _job(SENTENCES[0].replace(" ", "\0")))) == SENTENCES[0]

    def test_characters_that_are_not_said(self, engine: EspeakEngine) -> None:
        """Zero-width characters and emoji in front of a text move no border between clauses into a word."""
        text = " ".join(SENTENCES[:3])
        assert recognise(_say(engine, _job("\u200b" * 40 + text)), 3) == text
        grins = "😀. " * 5
        parts = [seconds_of(_say(engine, _job(part))) for part in (grins, text)]
        assert seconds_of(_say(engine, _job(grins + text))) == pytest.approx(sum(parts) + 0.4, rel=0.05)

    @pytest.mark.parametrize("text", [".", "...", "-", "?!"])
    def test_marks_alone(self, engine: EspeakEngine, text: str) -> None:
        """Punctuation alone is a short silence."""
        assert seconds_of(_say(engine, _job(text))) < 0.5


class TestRefusals:
    """What is not spoken with another voice instead."""

    def test_unknown_voice(self, engine: EspeakEngine) -> None:
        """A voice that the catalogue lacks."""
        with pytest.raises(JobError) as caught:
            engine.admit(_job("hello", "nobody"))
        assert (caught.value.code, caught.value.param) == ("voice_not_found", "voice")
        assert engine.capacity() == SLOTS

    def test_unknown_language(self, engine: EspeakEngine) -> None:
        """A language that the catalogue lacks."""
        with pytest.raises(JobError) as caught:
            engine.admit(_job("hello", language="klingon"))
        assert (caught.value.code, caught.value.param) == ("invalid_value", "language")
        assert engine.capacity() == SLOTS

    def test_voice_that_espeak_lacks(self) -> None:
        """A voice that the catalogue promises and espeak-ng does not have fails its job, and no other."""
        voices = [*SPEC.voices, Voice(id="tlh-none+f2", name="Worf", language="english")]
        engine = EspeakEngine(msgspec.structs.replace(SPEC, voices=voices))
        bad, good = _job("hello", "Worf"), _job(SENTENCES[0])
        events = _run(engine, [bad, good])
        (fault,) = events[bad.id]
        assert isinstance(fault, Fault)
        assert (fault.error.code, fault.error.param) == ("voice_not_found", "voice")
        assert recognise(_speech(events[good.id])) == SENTENCES[0]


class TestLife:
    """Opening, closing, and in between."""

    def test_again_after_close(self) -> None:
        """Closed and opened again it speaks as before; what was being said is forgotten."""
        first = EspeakEngine(SPEC)
        expected = _say(first, _job("Hello again."))
        first.admit(_job("Never heard."))
        first.close()
        assert not first.runnable(())
        second = EspeakEngine(SPEC)
        assert _alike(_say(second, _job("Hello again.")), expected)
        assert _alike(_say(first, _job("Hello again.")), expected)

    def test_offload_and_restore(self, engine: EspeakEngine) -> None:
        """There is nothing to move, so nothing changes."""
        expected = _say(engine, _job("Hello."))
        engine.offload()
        assert engine.memory() == Memory()
        engine.restore()
        assert _alike(_say(engine, _job("Hello.")), expected)

    def test_memory_is_flat(self, engine: EspeakEngine) -> None:
        """Hundreds of jobs of all voices, some cancelled, leave nothing behind."""

        def work() -> int:
            for index in range(300):
                engine.admit(job := _job("One, two, three. Four!", SPEC.voices[index % len(SPEC.voices)].id))
                engine.step(())
                if index % 3 == 0:
                    engine.cancel(job.id)
                while engine.runnable(()):
                    engine.step(())
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        before = work()
        assert work() - before < 2 * 2**20
