"""The figures that the loop counts of speech and models."""

import pytest

from shared.protocol import (
    VERSION,
    Hello,
    Welcome,
)
from tests.gpu_worker.worker_bench import WorkerBench, loaded


class TestFigures:
    """The figures of a model in the snapshot."""

    def test_speech(self, bench: WorkerBench) -> None:
        """Every stream counts once, at its first audio and at its end; the load counts as a transition."""
        bench.load_s = 2.0
        bench.speak("r", "a b c")
        bench.settle()
        model_stats = bench.snapshot().model_stats["m"]
        assert (sum(model_stats.first_audio_s.counts), model_stats.first_audio_s.sum) == (1, pytest.approx(2.0))
        assert (sum(model_stats.real_time_factor.counts), sum(model_stats.underrun_s.counts)) == (1, 1)
        assert {kind: sum(moves.counts) for kind, moves in model_stats.transitions_s.items()} == {"load": 1}

    def test_underrun(self, bench: WorkerBench) -> None:
        """Steps that take longer than their audio lasts cause underruns."""
        loaded(bench)
        bench.engines["m"].step_s = 1.0
        bench.speak("r", "a b c")
        bench.settle()
        model_stats = bench.snapshot().model_stats["m"]
        assert model_stats.underrun_s.sum == pytest.approx(2.0, abs=0.01)
        assert sum(model_stats.underrun_s.counts[1:]) == 1

    def test_performance(self, bench: WorkerBench) -> None:
        """The windows have the request's wait for its model, its first audio, its underruns and its batches."""
        bench.load_s = 2.0
        bench.speak("r", "a b c")
        bench.settle()
        bench.engines["m"].step_s = 0.5
        bench.speak("s", "a b c")
        bench.speak("t", "a b c")
        bench.settle()
        bench.clock.advance(1.0)
        [minute, *longer] = bench.snapshot().performance["m"]
        assert [window.minutes for window in longer] == [15, 60]
        assert minute.queue_wait_s.p99 == pytest.approx(2.0, rel=0.08)
        assert (minute.first_audio_s.count, minute.real_time_factor.count, minute.streams) == (3, 3, 3)
        assert minute.underruns == {"0": 2, "100": 2, "300": 2, "1000": 0}
        assert (minute.batch_size.count, minute.batch_size.p99) == (6, 2.0)
        assert bench.snapshot().model_stats["m"].captured_steps == 6
        assert bench.snapshot().model_stats["m"].audio_s > 0

    def test_pause_of_the_reader(self, bench: WorkerBench) -> None:
        """A lack of credit is no underrun."""
        loaded(bench)
        bench.speak("r", "a b c", credit=1)
        bench.settle()
        bench.clock.advance(30)
        bench.credit("r", 9)
        bench.settle()
        assert bench.words("r") == "a b c"
        model_stats = bench.snapshot().model_stats["m"]
        assert model_stats.underrun_s.sum == pytest.approx(0.0, abs=0.01)
        assert model_stats.real_time_factor.sum == pytest.approx(0.0, abs=1.0)

    def test_cancelled(self, bench: WorkerBench) -> None:
        """A cancelled stream counts at its first audio, but not at its end."""
        loaded(bench)
        bench.speak("r", "a b c")
        bench.turn()
        bench.cancel("r")
        bench.settle()
        model_stats = bench.snapshot().model_stats["m"]
        assert (sum(model_stats.first_audio_s.counts), sum(model_stats.underrun_s.counts)) == (2, 1)

    def test_failures(self, bench: WorkerBench) -> None:
        """A failed load, and memory that runs out in a step and in an admission."""
        bench.open_errors["m"] = [OSError("no such file")]
        bench.speak("r", "a")
        bench.settle()
        bench.speak("s", "a")
        bench.settle()
        bench.engines["m"].step_errors.append(MemoryError())
        bench.speak("t", "a")
        bench.settle()
        bench.engines["m"].admit_errors.append(MemoryError())
        bench.speak("u", "a")
        bench.settle()
        model_stats = bench.snapshot().model_stats["m"]
        assert (model_stats.failed_transitions, model_stats.out_of_memory) == ({"load": 1}, 2)
        assert sum(model_stats.transitions_s["load"].counts) == 1

    def test_settings(self, bench: WorkerBench) -> None:
        """Welcome has the settings of this worker."""
        bench.send(Hello(version=VERSION, token=""))
        bench.turn()
        _, welcome, _ = bench.sent[-1]
        assert isinstance(welcome, Welcome)
        assert welcome.settings == {"idle_timeout": 300.0, "default_model": "m"}
