"""espeak-ng behind the Engine protocol: real speech, compared with itself and read by a speech recogniser."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pytest

from gpu_worker.engines.base import PAUSE_CHUNK_BYTES, Done, Event, Fault, Job, JobError, Memory, Pcm
from gpu_worker.engines.espeak.engine import CHUNK_S, MAX_STEP_S, SLOTS, EspeakEngine
from gpu_worker.engines.espeak.library import MAX_PIECE_CHARS, Clause, EspeakLibrary
from shared.catalog import Voice, load_catalog
from shared.pcm import EMPTY_S, FRAME_SAMPLES, bytes_for, seconds_of
from shared.protocol import Sampling, Segment, Word
from tests.audio import peak
from tests.recogniser import SENTENCES, recognise

SPEC = next(spec for spec in load_catalog() if spec.engine == "espeak")
AUDIBLE = 1_000
"""Silence and noise stay below this peak."""


@pytest.fixture(scope="module")
def engine() -> EspeakEngine:
    """One engine for all tests, as a process has only one. Each test leaves it without jobs. No step takes long."""
    return EspeakEngine(SPEC, clock=lambda: 0.0)


_ids = itertools.count()


def _job(text: str, voice: str = "en-us+f2", language: str = "auto", max_new_tokens: int | None = None) -> Job:
    return Job(
        id=f"job-{next(_ids)}",
        task="CustomVoice",
        segments=[Segment(text=text)],
        voice=voice,
        language=language,
        sampling=Sampling(max_new_tokens=max_new_tokens),
    )


def _run(engine: EspeakEngine, jobs: Iterable[Job]) -> dict[str, list[Event]]:
    """The events of jobs that are admitted together, until all have ended."""
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
    """The average level of `pcm` in each of 64 bands up to 6 kHz, in dB."""
    samples = np.frombuffer(pcm, dtype="<i2").astype(np.float64)
    frames = samples[: len(samples) // 1024 * 1024].reshape(-1, 1024) * np.hanning(1024)
    power = (np.abs(np.fft.rfft(frames)) ** 2).mean(axis=0)[1:257].reshape(64, 4).mean(axis=1)
    spectrum: np.ndarray[Any, np.dtype[np.float64]] = 10 * np.log10(power + 1)
    return spectrum


def _alike(one: bytes, other: bytes) -> bool:
    """True if both are the same text in the same voice.

    espeak-ng continues from the state of its oscillators: lengths differ by up to 30 ms, spectra by 0.8 dB.
    The spectra of two voices of the catalogue differ by at least 1.2 dB, and mostly by more than 2.
    """
    apart_db = float(np.abs(_spectrum(one) - _spectrum(other)).mean())
    return abs(seconds_of(one) - seconds_of(other)) < 0.05 and apart_db < 1.0


def _say(engine: EspeakEngine, job: Job) -> bytes:
    events = _run(engine, [job])[job.id]
    assert isinstance(events[-1], Done)
    return _speech(events)


@pytest.mark.slow
class TestSpeech:
    """The sound of voices and languages."""

    @pytest.mark.parametrize("sentence", SENTENCES[:3])
    def test_intelligible(self, engine: EspeakEngine, sentence: str) -> None:
        """A recogniser reads the sentence."""
        assert recognise(_say(engine, _job(sentence))) == sentence

    @pytest.mark.slow
    def test_every_voice(self, engine: EspeakEngine) -> None:
        """Each voice of the catalogue speaks, and none sounds like another."""
        speech = {voice.id: _say(engine, _job("12, 34.", voice.id)) for voice in SPEC.voices}
        for voice, pcm in speech.items():
            assert 0.8 < seconds_of(pcm) < 8, voice
            assert peak(pcm) > AUDIBLE, voice
        assert not any(_alike(one, other) for one, other in itertools.combinations(speech.values(), 2))

    def test_every_language(self, engine: EspeakEngine) -> None:
        """One voice speaks each language of the catalogue differently. Its own language is also the default."""
        speech = {
            language.name: _say(engine, _job("12, 34.", "en-us+f2", language.name)) for language in SPEC.languages
        }
        assert all(peak(pcm) > AUDIBLE for pcm in speech.values())
        assert not any(_alike(one, other) for one, other in itertools.combinations(speech.values(), 2))
        assert _alike(speech["english"], _say(engine, _job("12, 34.", "en-us+f2")))

    def test_another_language_keeps_the_voice(self, engine: EspeakEngine) -> None:
        """A voice in another language is that language with the variant of the voice."""
        voices = [*SPEC.voices, Voice(id="de+f2", name="Emma's German", language="german")]
        wider = EspeakEngine(msgspec.structs.replace(SPEC, voices=voices), clock=lambda: 0.0)
        expected = _say(wider, _job("Guten Morgen, wie geht es Ihnen heute?", "de+f2"))
        assert _alike(_say(engine, _job("Guten Morgen, wie geht es Ihnen heute?", "en-us+f2", "german")), expected)
        assert not _alike(_say(engine, _job("Guten Morgen, wie geht es Ihnen heute?", "de+f3")), expected)

    def test_counted(self, engine: EspeakEngine) -> None:
        """Each step counts by the jobs that had a part in it."""
        before = engine.stats().batch_sizes
        jobs = [_job("Hello."), _job("Good morning.")]
        for job in jobs:
            engine.admit(job)
        engine.step({jobs[0].id})
        engine.step(())
        after = engine.stats().batch_sizes
        for job in jobs:
            engine.cancel(job.id)
        assert [after.get(size, 0) - before.get(size, 0) for size in (1, 2)] == [1, 1]

    def test_by_name(self, engine: EspeakEngine) -> None:
        """A voice may be requested by its name."""
        assert _alike(_say(engine, _job(SENTENCES[0], "emma")), _say(engine, _job(SENTENCES[0], "en-us+f2")))

    def test_same_again(self, engine: EspeakEngine) -> None:
        """A voice has the same pace and sound after every other voice."""
        first = _say(engine, _job(SENTENCES[0]))
        for voice in SPEC.voices:
            _say(engine, _job("12.", voice.id))
            assert _alike(_say(engine, _job(SENTENCES[0])), first), voice.id


class TestWholeText:
    """The whole text is spoken."""

    @pytest.mark.slow
    def test_several_sentences(self, engine: EspeakEngine) -> None:
        """Each sentence is spoken, in order."""
        text = " ".join(SENTENCES[:4])
        assert recognise(_say(engine, _job(text)), 4) == text

    def test_as_long_as_its_parts(self, engine: EspeakEngine) -> None:
        """A text of many sentences is as long as the single sentences and the pauses between them."""
        alone = sum(seconds_of(_say(engine, _job(sentence))) for sentence in SENTENCES)
        pauses = 0.45 * (len(SENTENCES) - 1)
        assert seconds_of(_say(engine, _job(" ".join(SENTENCES)))) == pytest.approx(alone + pauses, rel=0.03)

    @pytest.mark.parametrize(
        "separator", [", ", "; ", ": ", "! ", "? ", "\n", "\n\n", "... ", " — ", "。", " (", '" "']
    )
    def test_separators(self, engine: EspeakEngine, separator: str) -> None:
        """All clauses are spoken, for each separator between them."""
        once = seconds_of(_say(engine, _job("seventeen brown foxes")))
        text = separator.join(["seventeen brown foxes"] * 6)
        assert 6 * once * 0.8 < seconds_of(_say(engine, _job(text))) < 6 * once * 1.5

    @pytest.mark.slow
    def test_without_punctuation(self, engine: EspeakEngine) -> None:
        """A text without a full stop is spoken to its end, even if espeak-ng needs several calls."""
        words = ["seven", "green", "bottles"] * 200
        assert len(" ".join(words)) > 3 * MAX_PIECE_CHARS
        short = seconds_of(_say(engine, _job(" ".join(words[:60]))))
        assert seconds_of(_say(engine, _job(" ".join(words)))) == pytest.approx(10 * short, rel=0.05)

    def test_without_spaces(self, engine: EspeakEngine) -> None:
        """A very long word is not cut off."""
        lengths = [seconds_of(_say(engine, _job("ba" * count))) for count in (100, 1_000, 2_000)]
        assert lengths[0] < lengths[1] < lengths[2]

    def test_other_scripts(self, engine: EspeakEngine) -> None:
        """Text positions count characters, not bytes."""
        for voice, text in (("cmn+f3", "今天天气很好。"), ("ar+m2", "صباح الخير. "), ("ru+f3", "Доброе утро. ")):
            once = seconds_of(_say(engine, _job(text, voice)))
            assert 8 * once < seconds_of(_say(engine, _job(text * 8, voice))) < 8 * (once + 0.6)


@pytest.mark.slow
class TestStreaming:
    """Chunks, steps and slots."""

    def test_chunks(self, engine: EspeakEngine) -> None:
        """The chunks have 100 ms, 200 ms, then 400 ms, and the rest comes last. Done is the last event."""
        job = _job(SENTENCES[0])
        *pieces, done = _run(engine, [job])[job.id]
        sizes = [len(piece.data) for piece in pieces if isinstance(piece, Pcm)]
        assert sizes[:3] == [bytes_for(seconds) for seconds in CHUNK_S]
        assert set(sizes[2:-1]) == {bytes_for(0.4)}
        assert 0 < sizes[-1] <= bytes_for(0.4)
        assert isinstance(done, Done)
        assert done.reason == "stop"

    def test_first_step(self, engine: EspeakEngine) -> None:
        """The first step of a long text already returns audio."""
        engine.admit(job := _job(" ".join(SENTENCES)))
        assert [len(event.data) for event in engine.step(()) if isinstance(event, Pcm)] == [bytes_for(0.1)]
        engine.cancel(job.id)

    def test_usage(self, engine: EspeakEngine) -> None:
        """The input counts in words, the output in frames of 80 ms."""
        job = _job("one two three")
        events = _run(engine, [job])[job.id]
        done = events[-1]
        assert isinstance(done, Done)
        assert done.usage.input_tokens == 3
        assert done.usage.output_tokens == -(-len(_speech(events)) // (FRAME_SAMPLES * 2))

    @pytest.mark.slow
    def test_side_by_side(self, engine: EspeakEngine) -> None:
        """32 jobs in many voices at the same time sound as each one alone."""
        jobs = [
            _job(f"{SENTENCES[index % 20]} Number {index}.", SPEC.voices[index % len(SPEC.voices)].id)
            for index in range(SLOTS)
        ]
        together = _run(engine, jobs)
        for job in jobs:
            alone = msgspec.structs.replace(job, id="alone")
            assert _alike(_speech(together[job.id]), _say(engine, alone))

    def test_slots(self, engine: EspeakEngine) -> None:
        """Each job holds a slot until it is cancelled or the engine closes."""
        jobs = [_job("hello") for _ in range(3)]
        for job in jobs:
            engine.admit(job)
        assert engine.capacity() == SLOTS - 3
        engine.cancel(jobs[0].id)
        assert engine.capacity() == SLOTS - 2
        engine.close()
        assert engine.capacity() == SLOTS

    def test_parked(self, engine: EspeakEngine) -> None:
        """A parked job holds no slot, returns nothing and loses nothing. Its audio counts as host memory."""
        slow, fast, cancelled = _job(SENTENCES[0]), _job(SENTENCES[1]), _job(SENTENCES[2])
        for job in (slow, fast, cancelled):
            engine.admit(job)
        said = {job.id: list[Event]() for job in (slow, fast, cancelled)}
        for event in engine.step(()):
            said[event.job_id].append(event)
        before = list(said[slow.id])
        kept = engine.park_bytes(slow.id)
        assert kept > 0
        assert engine.park(slow.id) == kept
        assert engine.park(slow.id) == kept
        assert engine.memory().host == {"parked": kept}
        kept += engine.park(cancelled.id)
        assert engine.memory().host == {"parked": kept}
        assert engine.capacity() == SLOTS - 1
        engine.cancel(cancelled.id)
        while engine.runnable(()):
            for event in engine.step(()):
                said[event.job_id].append(event)
        assert isinstance(said[fast.id][-1], Done)
        assert said[slow.id] == before
        engine.unpark(slow.id)
        engine.unpark(cancelled.id)
        assert engine.memory().host == {}
        assert engine.capacity() == SLOTS - 1
        while engine.runnable(()):
            for event in engine.step(()):
                said[event.job_id].append(event)
        assert isinstance(said[slow.id][-1], Done)
        assert _alike(_speech(said[slow.id]), _say(engine, msgspec.structs.replace(slow, id="alone")))
        assert engine.park(slow.id) == engine.park_bytes(slow.id) == 0

    def test_closing_drops_parked_jobs(self, engine: EspeakEngine) -> None:
        """A closed engine keeps nothing of a parked job."""
        job = _job(SENTENCES[0])
        engine.admit(job)
        engine.step(())
        engine.park(job.id)
        engine.close()
        assert engine.memory().host == {}
        engine.unpark(job.id)
        assert engine.capacity() == SLOTS

    def test_held_back(self, engine: EspeakEngine) -> None:
        """A job that is held back pauses and loses nothing."""
        slow, fast = _job(SENTENCES[0]), _job(SENTENCES[1])
        engine.admit(slow)
        engine.admit(fast)
        returned: list[Event] = []
        while engine.runnable({slow.id}):
            returned += engine.step({slow.id})
        assert {event.job_id for event in returned} == {fast.id}
        while engine.runnable(()):
            returned += engine.step(())
        assert recognise(_speech(event for event in returned if event.job_id == slow.id)) == SENTENCES[0]

    def test_cancel(self, engine: EspeakEngine) -> None:
        """A cancelled job returns no further event, and its neighbour is not disturbed. An unknown id is ignored."""
        gone, stays = _job(SENTENCES[0]), _job(SENTENCES[1])
        engine.admit(gone)
        engine.admit(stays)
        returned = engine.step(())
        engine.cancel(gone.id)
        engine.cancel("nobody")
        while engine.runnable(()):
            events = engine.step(())
            assert {event.job_id for event in events} <= {stays.id}
            returned += events
        assert recognise(_speech(event for event in returned if event.job_id == stays.id)) == SENTENCES[1]

    def test_one_clause_a_step(self, engine: EspeakEngine) -> None:
        """A text of a thousand silent clauses does not delay other jobs: a step synthesizes one clause of each job."""
        engine.admit(quiet := _job("\n\n.\n" * 500 + "a"))
        engine.admit(_job(SENTENCES[0]))
        returned = list(itertools.chain.from_iterable(engine.step(()) for _ in range(20)))
        assert recognise(_speech(event for event in returned if event.job_id != quiet.id)) == SENTENCES[0]
        assert engine.runnable(())
        engine.cancel(quiet.id)

    def test_length(self, engine: EspeakEngine) -> None:
        """`max_new_tokens` ends the speech at the exact sample. A limit that is not reached changes nothing."""
        job = _job(SENTENCES[0], max_new_tokens=7)
        events = _run(engine, [job])[job.id]
        done = events[-1]
        assert isinstance(done, Done)
        assert (done.reason, done.usage.output_tokens) == ("length", 7)
        assert len(_speech(events)) == 7 * FRAME_SAMPLES * 2
        assert recognise(_say(engine, _job(SENTENCES[0], max_new_tokens=1_000))) == SENTENCES[0]


class TestScripts:
    """Text in a script that the voice cannot read."""

    @pytest.mark.parametrize(
        ("text", "language"),
        [("你好我的朋友", "cmn"), ("Здравствуйте", "ru"), ("مرحبا بكم", "ar"), ("Καλημέρα σας", "el")],
    )
    def test_another_voice_reads_it(self, engine: EspeakEngine, text: str, language: str) -> None:
        """It takes as long as in its own language: spelled letter by letter, it would take three times as long."""
        name = SPEC.language(language)
        assert name is not None
        own, alone, within = (
            seconds_of(_say(engine, job))
            for job in (_job(text, language=name), _job(text), _job(f"Well, {text}, yes."))
        )
        assert alone == pytest.approx(own, rel=0.1, abs=0.05)
        assert own < within < own + 1.5

    def test_words_around_it_stay_intelligible(self, engine: EspeakEngine) -> None:
        """The voice of the request goes on behind it."""
        said = _say(engine, _job(f"你好。 {SENTENCES[0]}"))
        first = len(_say(engine, _job("你好。")))
        assert recognise(said[first - first % 2 :]) == SENTENCES[0]


class TestPauses:
    """Segments with pauses between them."""

    def test_exact(self, engine: EspeakEngine) -> None:
        """Each pause is exact to a sample and comes in pieces between the words, which stay intelligible."""
        segments = [
            Segment(text="", pause_ms=250),
            Segment(text=SENTENCES[0], pause_ms=1500),
            Segment(text=SENTENCES[1], pause_ms=701, rate=2.0),
        ]
        job = msgspec.structs.replace(_job(""), segments=segments)
        events = _run(engine, [job])[job.id]
        pieces = [event for event in events if isinstance(event, Pcm)]
        parts = [
            (rate, b"".join(piece.data for piece in group))
            for rate, group in itertools.groupby(pieces, lambda piece: piece.rate)
        ]
        silence = [data for rate, data in parts if rate is None]
        assert [rate for rate, _ in parts] == [None, 1.0, None, 2.0, None]
        assert silence == [bytes(12_000), bytes(72_000), bytes(33_648)]
        assert [recognise(parts[1][1]), recognise(parts[3][1])] == list(SENTENCES[:2])
        assert max(len(piece.data) for piece in pieces) <= PAUSE_CHUNK_BYTES
        done = events[-1]
        assert isinstance(done, Done)
        assert done.usage.output_tokens == -(-(len(parts[1][1]) + len(parts[3][1])) // 3840)

    def test_parked_in_a_pause(self, engine: EspeakEngine) -> None:
        """A job that is parked after every step has the same pauses, and keeps no bytes for them."""
        job = msgspec.structs.replace(_job(""), segments=[Segment(text="", pause_ms=1500), Segment(text="One.")])
        engine.admit(job)
        pcm = b""
        while engine.runnable(()):
            for event in engine.step(()):
                pcm += event.data if isinstance(event, Pcm) and event.rate is None else b""
            assert engine.park(job.id) == engine.park_bytes(job.id)
            engine.unpark(job.id)
        assert pcm == bytes(72_000)


class TestOddText:
    """Unusual text."""

    @pytest.mark.parametrize("text", ["", " \n\t", "\0", "\u200b\u200d\ufeff", "\x01\x1b", "\u00a0\u3000", "?!", "😀"])
    def test_nothing_to_say(self, engine: EspeakEngine, text: str) -> None:
        """Text without a letter or digit is refused, and takes no slot: the web side answers it with silence."""
        with pytest.raises(JobError, match="no speakable text") as caught:
            engine.admit(_job(text))
        assert (caught.value.code, caught.value.param) == ("invalid_value", "input")
        assert engine.capacity() == SLOTS

    @pytest.mark.parametrize(
        "text",
        [
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
        """All other text makes audible speech, and ends."""
        assert peak(_say(engine, _job(text))) > AUDIBLE

    def test_nul_ends_nothing(self, engine: EspeakEngine) -> None:
        """The text behind a NUL is spoken, too."""
        assert recognise(_say(engine, _job(SENTENCES[0].replace(" ", "\0")))) == SENTENCES[0]

    @pytest.mark.slow
    def test_characters_that_are_not_said(self, engine: EspeakEngine) -> None:
        """Zero-width characters and emoji before a text move no clause border into a word."""
        text = " ".join(SENTENCES[:3])
        assert recognise(_say(engine, _job("\u200b" * 40 + text)), 3) == text
        grins = "One. " + "😀. " * 5
        parts = [seconds_of(_say(engine, _job(part))) for part in (grins, text)]
        assert seconds_of(_say(engine, _job(grins + text))) == pytest.approx(sum(parts) + 0.4, rel=0.05)


def test_long_clauses_do_not_make_a_long_step() -> None:
    """A step that takes long leaves the other jobs to the next ones, and none of them waits for a second turn."""
    times = itertools.count(step=MAX_STEP_S)
    engine = EspeakEngine(SPEC, clock=lambda: next(times))
    jobs = [_job("word " * 100) for _ in range(3)]
    for job in jobs:
        engine.admit(job)
    firsts = [event.job_id for _ in range(6) for event in engine.step(())]
    assert firsts == [job.id for job in jobs] * 2
    assert engine.stats().batch_sizes == {1: 6}
    engine.close()


def test_an_unexpected_error_fails_its_own_job(engine: EspeakEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other jobs speak on."""
    bad, good = _job("Tell me the odd word."), _job(SENTENCES[0])
    clause = EspeakLibrary.synthesize_clause

    def fail(self: EspeakLibrary, voice: str, text: str) -> Clause:
        if "odd" in text:
            raise ValueError("too odd")
        return clause(self, voice, text)

    monkeypatch.setattr(EspeakLibrary, "synthesize_clause", fail)
    events = _run(engine, [bad, good])
    (fault,) = events[bad.id]
    assert isinstance(fault, Fault)
    assert (fault.error.code, fault.error.message) == ("synthesis_failed", "espeak-ng failed: too odd")
    assert isinstance(events[good.id][-1], Done)


class TestRefusals:
    """Voices and languages that are refused, not replaced."""

    def test_unknown_voice(self, engine: EspeakEngine) -> None:
        """The catalogue lacks the voice."""
        with pytest.raises(JobError) as caught:
            engine.admit(_job("hello", "nobody"))
        assert (caught.value.code, caught.value.param) == ("voice_not_found", "voice")
        assert engine.capacity() == SLOTS

    def test_unknown_language(self, engine: EspeakEngine) -> None:
        """The catalogue lacks the language."""
        with pytest.raises(JobError) as caught:
            engine.admit(_job("hello", language="klingon"))
        assert (caught.value.code, caught.value.param) == ("invalid_value", "language")
        assert engine.capacity() == SLOTS

    def test_voice_that_espeak_lacks(self) -> None:
        """A voice that the catalogue lists and espeak-ng lacks fails its own job alone."""
        voices = [*SPEC.voices, Voice(id="tlh-none+f2", name="Worf", language="english")]
        engine = EspeakEngine(msgspec.structs.replace(SPEC, voices=voices))
        bad, good = _job("hello", "Worf"), _job(SENTENCES[0])
        events = _run(engine, [bad, good])
        (fault,) = events[bad.id]
        assert isinstance(fault, Fault)
        assert (fault.error.code, fault.error.param) == ("voice_not_found", "voice")
        assert recognise(_speech(events[good.id])) == SENTENCES[0]


class TestLife:
    """Opening, closing, offloading, and memory."""

    def test_again_after_close(self) -> None:
        """A new engine after `close` speaks as before. The jobs of the closed engine are gone."""
        first = EspeakEngine(SPEC)
        expected = _say(first, _job(SENTENCES[0]))
        first.admit(_job("Never spoken."))
        first.close()
        assert not first.runnable(())
        second = EspeakEngine(SPEC)
        assert _alike(_say(second, _job(SENTENCES[0])), expected)
        assert _alike(_say(first, _job(SENTENCES[0])), expected)

    def test_offload_and_restore(self, engine: EspeakEngine) -> None:
        """They change nothing."""
        expected = _say(engine, _job(SENTENCES[0]))
        engine.offload()
        assert engine.memory() == Memory()
        engine.restore()
        assert _alike(_say(engine, _job(SENTENCES[0])), expected)

    @pytest.mark.slow
    def test_memory_is_flat(self, engine: EspeakEngine) -> None:
        """Many jobs in all voices, some of them cancelled, leave no memory behind."""

        def work() -> int:
            for index in range(150):
                engine.admit(job := _job("One, two, three. Four!", SPEC.voices[index % len(SPEC.voices)].id))
                engine.step(())
                if index % 3 == 0:
                    engine.cancel(job.id)
                while engine.runnable(()):
                    engine.step(())
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        before = work()
        assert work() - before < 2 * 2**20


@pytest.mark.parametrize("voice", [voice.id for voice in SPEC.voices[:8]])
def test_no_edge_clicks(engine: EspeakEngine, voice: str) -> None:
    """Speech begins and ends below -50 dB, also where it meets a pause and where a limit cuts it off."""
    texts = ["I", "Go - now", "Ooh", "Hi. Oh. Ah."]
    jobs = [_job(text, voice) for text in texts] + [_job("Hello everybody out there.", voice, max_new_tokens=6)]
    for events in _run(engine, jobs).values():
        samples = np.frombuffer(_speech(events), "<i2").astype(int)
        assert abs(samples[0]) <= 104
        assert abs(samples[-1]) <= 104
        quiet = np.concatenate(([False], np.abs(samples) <= 3, [False]))
        edges = np.flatnonzero(quiet[1:] != quiet[:-1]).reshape(-1, 2)
        for start, end in edges[edges[:, 1] - edges[:, 0] > 480]:
            assert start == 0 or np.abs(samples[start - 3 : start]).max() <= 600
            assert end == len(samples) or np.abs(samples[end : end + 3]).max() <= 600


class TestWords:
    """The times of words."""

    def _said(self, engine: EspeakEngine, *segments: Segment, voice: str = "en-us+f2") -> tuple[bytes, list[Word]]:
        """The speech of the segments and its words; each word comes with the first audio that is made with it."""
        job = msgspec.structs.replace(_job("", voice), segments=list(segments), timestamps=True)
        events = _run(engine, [job])[job.id]
        return _speech(events), [word for event in events if isinstance(event, Pcm) for word in event.words]

    def test_each_word_is_heard_at_its_time(self, engine: EspeakEngine) -> None:
        """Words begin with the sound behind a pause, and none is said in a pause."""
        segments = (Segment(text="Hello there.", pause_ms=1000), Segment(text=" My world", pause_ms=500))
        pcm, words = self._said(engine, *segments)
        assert [segments[word.segment].text[word.start : word.end] for word in words] == [
            "Hello",
            "there",
            "My",
            "world",
        ]
        borders = [border for word in words for border in (word.start_s, word.end_s)]
        assert borders == sorted(borders)
        assert borders[-1] <= seconds_of(pcm) - 0.5
        for word in words:
            assert peak(pcm[bytes_for(word.start_s) : bytes_for(word.end_s)]) > AUDIBLE
        between = pcm[bytes_for(words[1].end_s + 0.02) : bytes_for(words[2].start_s)]
        assert seconds_of(between) >= 0.95
        assert peak(between) < AUDIBLE
        behind = np.abs(np.frombuffer(pcm[bytes_for(words[2].start_s) :], dtype="<i2").astype(int))
        assert np.flatnonzero(behind > AUDIBLE / 10)[0] / 24_000 < 0.1

    def test_words_of_the_text_and_not_of_what_is_said(self, engine: EspeakEngine) -> None:
        """A number is one word however many are said for it; punctuation and symbols are none."""
        text = "I have 1234567 apples, don't you? It's one of the well-known — “quoted” ones… 3pm"
        _, words = self._said(engine, Segment(text=text))
        expected = [*("I", "have", "1234567", "apples", "don't", "you", "It's", "one", "of", "the", "well-known")]
        expected += ["quoted", "ones", "3pm"]
        assert [text[word.start : word.end] for word in words] == expected
        number = words[2]
        assert number.end_s - number.start_s > 2

    @pytest.mark.slow
    def test_long_texts(self, engine: EspeakEngine) -> None:
        """Through clauses and pieces, each word once and in order."""
        text = " ".join(SENTENCES * 3)
        pcm, words = self._said(engine, Segment(text=text))
        assert [text[word.start : word.end] for word in words] == [word.strip(".,?!") for word in text.split()]
        begins = [word.start_s for word in words]
        assert begins == sorted(begins)
        assert seconds_of(pcm) - 1 < words[-1].end_s <= seconds_of(pcm)

    def test_only_if_asked(self, engine: EspeakEngine) -> None:
        """Other jobs have none."""
        job = _job("Hello there.")
        assert not any(event.words for event in _run(engine, [job])[job.id] if isinstance(event, Pcm))


def _step_until_it_waits(engine: EspeakEngine, job: Job) -> bytes:
    events: list[Event] = []
    while engine.runnable(()):
        events += engine.step(())
    assert engine.waits_for_text(job.id) or engine.capacity() == SLOTS
    return _speech(events)


def test_wide_digits_are_spoken(engine: EspeakEngine) -> None:
    """espeak-ng itself is silent at them, in every voice."""
    assert _alike(_say(engine, _job("\uff11\uff12\uff13")), _say(engine, _job("123")))


class TestOpenJobs:
    """Text that is still being written."""

    def test_sentence_by_sentence(self, engine: EspeakEngine) -> None:
        """A sentence is spoken once the next one has begun, the last one when the text ends."""
        job = msgspec.structs.replace(_job("Good"), open=True)
        engine.admit(job)
        heard = []
        for piece in (" morning to Dr.", " Smith, everybody.", " It is a", " fine day."):
            engine.append(job.id, piece, flush=False)
            heard.append(_step_until_it_waits(engine, job))
        engine.end_text(job.id)
        heard.append(_step_until_it_waits(engine, job))
        assert [len(pcm) > bytes_for(0.5) for pcm in heard] == [False, False, True, False, True]
        one, two = (
            _speech(_run(engine, [said])[said.id])
            for said in (_job("Good morning to Dr. Smith, everybody."), _job("It is a fine day."))
        )
        assert _alike(heard[2], one)
        assert _alike(heard[4], two)

    def test_decomposed_letters(self, engine: EspeakEngine) -> None:
        """An accent that comes behind its letter is no letter of its own."""
        job = msgspec.structs.replace(_job("A cafe"), open=True)
        engine.admit(job)
        engine.append(job.id, "\u0301 a la cre\u0300me.", flush=False)
        engine.end_text(job.id)
        heard = _step_until_it_waits(engine, job)
        composed = _job("A café a la crème.")
        assert _alike(heard, _speech(_run(engine, [composed])[composed.id]))

    def test_white_space_shows_the_end_of_a_sentence(self, engine: EspeakEngine) -> None:
        """So a client that sends whole sentences need not send the next one, or flush."""
        job = msgspec.structs.replace(_job(""), open=True)
        engine.admit(job)
        for piece, spoken in (("It costs 3.", False), ("50. ", True), ("Hello", False), ("", True)):
            engine.append(job.id, piece, flush=not piece)
            assert bool(_step_until_it_waits(engine, job)) == spoken
        engine.cancel(job.id)

    def test_a_text_without_a_word(self, engine: EspeakEngine) -> None:
        """It ends with a moment of silence, whatever came."""
        for piece in ("", "---. ", "?!. . "):
            job = msgspec.structs.replace(_job(piece), open=True)
            engine.admit(job)
            engine.append(job.id, piece, flush=True)
            engine.append(job.id, piece, flush=False)
            engine.end_text(job.id)
            events: list[Event] = []
            while engine.runnable(()):
                events += engine.step(())
            assert _speech(events) == bytes(bytes_for(EMPTY_S))
            assert isinstance(events[-1], Done)
            assert events[-1].reason == "empty"

    def test_words_have_their_places_in_the_segment(self, engine: EspeakEngine) -> None:
        """As in the whole text. A flush begins another segment. The text also grows while its job is parked."""
        job = msgspec.structs.replace(_job("One two. Thr"), open=True, timestamps=True)
        engine.admit(job)
        engine.park(job.id)
        engine.append(job.id, "ee four. Fi", flush=False)
        assert not engine.waits_for_text(job.id)
        engine.unpark(job.id)
        engine.append(job.id, "ve. ", flush=True)
        engine.append(job.id, "Six", flush=False)
        engine.end_text(job.id)
        events: list[Event] = []
        while engine.runnable(()):
            events += engine.step(())
        words = [word for event in events if isinstance(event, Pcm) for word in event.words]
        texts = ["One two. Three four. Five. ", "Six"]
        assert [texts[word.segment][word.start : word.end].strip(". ") for word in words] == [
            *("One", "two", "Three", "four", "Five", "Six")
        ]
        assert [word.start_s for word in words] == sorted(word.start_s for word in words)


_SPEAKS: Final = """
from tests.gpu_worker.engines.espeak.test_engine import SPEC, EspeakEngine, _job
engine = EspeakEngine(SPEC)
for language in ("arabic", "finnish"):
    engine.admit(_job("a \u28ff\u15c6 b", language=language))
    while engine.runnable(()):
        engine.step(())
"""


def test_braille_does_not_end_the_process() -> None:
    """espeak-ng would write the names of the eight dots beyond its buffer, in a language with long ones."""
    assert subprocess.run([sys.executable, "-c", _SPEAKS], check=False).returncode == 0
