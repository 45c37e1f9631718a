"""The mover: one transition after the other, measured, and nothing left behind after a failure."""

import sys
import weakref
from collections.abc import Callable, Iterator

import pytest
import structlog
from structlog.testing import capture_logs

from gpu_worker.engines.base import JobError, Memory
from gpu_worker.residency.models import (
    ModelState,
    MoverFailed,
    Transition,
    TransitionDone,
    TransitionFailed,
    TransitionKind,
)
from gpu_worker.residency.mover import Mover
from shared.catalog import ModelSpec
from tests.gpu_worker.fakes import FakeDevice, Reports, a_spec
from tests.gpu_worker.residency.bench import FakeEngine


class Bench:
    """A Mover over a fake device, whose engines can be made to fail."""

    def __init__(self) -> None:
        self.device = FakeDevice()
        self.reports: Reports[TransitionDone | TransitionFailed | MoverFailed] = Reports()
        self.engines: list[FakeEngine] = []
        self.before_open: Callable[[], None] = lambda: None
        self.mover = Mover([a_spec("a"), a_spec("b")], self._open, self.device, self.reports)

    def _open(self, spec: ModelSpec) -> FakeEngine:
        self.before_open()
        self.engines.append(FakeEngine(spec.id, self.device, spec.estimated_bytes))
        return self.engines[-1]

    def move(self, kind: TransitionKind, model: str = "a") -> TransitionDone:
        """Move a model; the transition has to work."""
        self.mover.submit(Transition(model, kind))
        report = self.reports.wait()
        assert isinstance(report, TransitionDone), report
        assert report.transition == Transition(model, kind)
        return report

    def fail(self, kind: TransitionKind, model: str = "a") -> TransitionFailed:
        """Move a model; the transition has to fail."""
        self.mover.submit(Transition(model, kind))
        report = self.reports.wait()
        assert isinstance(report, TransitionFailed), report
        assert report.transition == Transition(model, kind)
        return report


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench whose mover ends with the test."""
    bench = Bench()
    yield bench
    bench.mover.close(10)


def test_every_kind(bench: Bench) -> None:
    """Each kind of transition runs on the mover thread and reports what was measured around it."""
    loaded = bench.move("load")
    assert (loaded.before_bytes, loaded.after_bytes) == (0, 100)
    assert loaded.memory == Memory(device={"weights": 100})
    assert loaded.engine is bench.engines[0]
    assert loaded.seconds >= 0
    offloaded = bench.move("offload")
    assert (offloaded.before_bytes, offloaded.after_bytes) == (100, 0)
    assert offloaded.memory == Memory(host={"weights": 100})
    assert offloaded.engine is None
    restored = bench.move("restore")
    assert restored.engine is bench.engines[0]
    assert restored.memory == Memory(device={"weights": 100})
    dropped = bench.move("drop")
    assert (dropped.before_bytes, dropped.after_bytes) == (100, 0)
    assert (dropped.engine, dropped.memory) == (None, Memory())
    assert bench.engines[0].calls == ["offload", "restore", "close"]
    assert bench.engines[0].threads == {"mover"}


def test_moves_are_announced(bench: Bench) -> None:
    """The probe knows that a model is moved while its engine is touched, and no longer when the move is reported."""
    seen: list[bool] = []
    bench.before_open = lambda: seen.append(bench.device.is_moving)
    bench.move("load")
    assert seen == [True]
    assert not bench.device.is_moving


def test_reclaims_after_every_transition(bench: Bench) -> None:
    """Freed memory is reclaimed before the second measurement; garbage is collected only after a drop."""
    bench.move("load")
    bench.move("offload")
    bench.move("restore")
    assert (bench.device.reclaimed, bench.device.collected) == (3, 0)
    bench.move("drop")
    assert (bench.device.reclaimed, bench.device.collected) == (4, 1)


def test_in_order(bench: Bench) -> None:
    """Transitions end in the order of their submission."""
    transitions = [Transition("a", "load"), Transition("b", "load"), Transition("a", "drop")]
    for transition in transitions:
        bench.mover.submit(transition)
    reports = [bench.reports.wait() for _ in transitions]
    assert [report.transition for report in reports if not isinstance(report, MoverFailed)] == transitions


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            JobError("model_unavailable", "a.safetensors is missing", retry_after_s=9),
            "model_unavailable",
            "a.safetensors",
        ),
        (JobError("insufficient_vram", "no room"), "insufficient_vram", "no room"),
        (MemoryError(), "insufficient_vram", "memory ran out during the load of a"),
        (OSError(2, "No such file"), "model_unavailable", "the load of a failed: FileNotFoundError: "),
        (KeyError(), "model_unavailable", "the load of a failed: KeyError"),
    ],
)
def test_failed_load(bench: Bench, error: Exception, code: str, message: str) -> None:
    """A failed load reports a code of the HTTP contract, leaves nothing behind, and can be repeated."""

    def fail() -> None:
        raise error

    bench.before_open = fail
    report = bench.fail("load")
    assert report.error.code == code
    assert message in report.error.message
    assert report.error.retry_after_s == (9 if "missing" in report.error.message else None)
    assert report.state is ModelState.ABSENT
    assert bench.device.device().ours_bytes == 0
    assert bench.device.collected == 1
    bench.before_open = lambda: None
    assert bench.move("load").engine is bench.engines[0]


@pytest.mark.parametrize("error_type", [RuntimeError, MemoryError, JobError])
def test_half_a_load_is_freed(bench: Bench, error_type: type[Exception]) -> None:
    """Everything that a failed load had made is freed before the report, even if a log handler keeps the error."""

    class Weights:
        pass

    half: list[weakref.ref[Weights]] = []

    def fail() -> None:
        weights = Weights()
        half.append(weakref.ref(weights))
        try:
            read()
        except OSError as error:
            raise (JobError("model_unavailable", "broken") if error_type is JobError else error_type()) from error

    def read() -> None:
        buffer = Weights()
        half.append(weakref.ref(buffer))
        raise OSError("the disk is gone")

    kept: list[BaseException | None] = []

    def keep(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        kept.append(sys.exc_info()[1])
        return event

    bench.before_open = fail
    with capture_logs(processors=[keep]):
        report = bench.fail("load")
    assert isinstance(kept[0], error_type)
    assert [weights() for weights in half] == [None, None]
    assert report.error.__traceback__ is None
    assert report.error.__cause__ is None


def test_failed_restore(bench: Bench) -> None:
    """A failed restore is undone: the model is offloaded as before and can be restored later."""
    bench.move("load")
    bench.move("offload")
    bench.engines[0].troubles["restore"] = MemoryError()
    report = bench.fail("restore")
    assert (report.error.code, report.state) == ("insufficient_vram", ModelState.OFFLOADED)
    assert bench.engines[0].calls[-2:] == ["restore", "offload"]
    bench.engines[0].troubles.clear()
    assert bench.move("restore").memory == Memory(device={"weights": 100})


def test_restore_that_cannot_be_undone(bench: Bench) -> None:
    """A model that can be neither restored nor offloaded is dropped, and loaded the next time."""
    bench.move("load")
    bench.move("offload")
    bench.engines[0].troubles.update(restore=MemoryError(), offload=RuntimeError())
    assert bench.fail("restore").state is ModelState.ABSENT
    assert bench.engines[0].calls[-1] == "close"
    assert bench.move("load").engine is bench.engines[1]


def test_failed_offload(bench: Bench) -> None:
    """A model that cannot be offloaded is dropped."""
    bench.move("load")
    bench.engines[0].troubles["offload"] = MemoryError()
    report = bench.fail("offload")
    assert (report.error.code, report.state) == ("insufficient_vram", ModelState.ABSENT)
    assert bench.device.device().ours_bytes == 0


def test_broken_device(bench: Bench) -> None:
    """A broken device ends the mover with MoverFailed; later transitions are not carried out."""
    bench.move("load")
    bench.engines[0].troubles["offload"] = RuntimeError("CUDA error: an illegal memory access was encountered")
    bench.mover.submit(Transition("a", "offload"))
    report = bench.reports.wait()
    assert isinstance(report, MoverFailed)
    assert "illegal memory access" in report.reason


def test_failed_close(bench: Bench) -> None:
    """A drop works even if the engine's close raises."""
    bench.move("load")
    bench.engines[0].troubles["close"] = RuntimeError()
    assert bench.move("drop").memory == Memory()
    assert bench.move("load").engine is bench.engines[1]


def test_close(bench: Bench) -> None:
    """`close` carries out what was submitted, closes every engine and ends the thread."""
    bench.move("load")
    bench.mover.submit(Transition("b", "load"))
    bench.mover.close(10)
    assert isinstance(bench.reports.wait(), TransitionDone)
    assert [engine.calls for engine in bench.engines] == [["close"], ["close"]]
    assert bench.device.device().ours_bytes == 0
