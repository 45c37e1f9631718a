"""Whether an engine has a thread for its codec: a trial on a fake clock, and its kept outcome."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpu_worker.engines.qwen import codec_thread_trial
from gpu_worker.engines.qwen.codec_thread import CodecThread
from gpu_worker.engines.qwen.codec_thread_trial import EngineRehearsal, Split, choose, trial
from tests.gpu_worker.engines.qwen.driving import kept_parts


class Machine:
    """A clock, and what takes how long on it, alone and, by the number of the codec's threads, beside the other."""

    def __init__(
        self, *, frame: float, chunk: float, frame_beside: dict[int, float], chunk_beside: dict[int, float]
    ) -> None:
        self.now = 0.0
        self.chunks = 0
        self.frame_ms, self.chunk_ms = frame, chunk
        self.frame_beside, self.chunk_beside = frame_beside, chunk_beside
        self.codec_threads = 0
        self.busy_until: float | None = None
        self.same_bits = True

    def prompt(self) -> list[Tensor]:
        """Depends on the number of threads, or not."""
        return [torch.tensor(0 if self.same_bits else torch.get_num_threads())]

    def frame(self) -> None:
        """As Rehearsal."""
        busy = self.busy_until is not None and self.now < self.busy_until
        self.now += self.frame_beside[self.codec_threads] if busy else self.frame_ms

    def chunk(self) -> Tensor:
        """As Rehearsal."""
        self.chunks += 1
        self.now += self.chunk_ms
        return torch.zeros(1)

    def thread(self, *, threads: int, codec_threads: int, streams: int) -> "FakeThread":
        """In the place of CodecThread."""
        assert codec_threads < threads
        assert streams == 1
        self.codec_threads = codec_threads
        return FakeThread(self, self.chunk_beside[codec_threads])


class FakeThread:
    """A chunk beside frames, without a thread."""

    def __init__(self, machine: Machine, takes: float) -> None:
        self._machine = machine
        self._takes = takes

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """As CodecThread."""
        yield

    def start(self, call: Callable[[], float]) -> None:
        """As CodecThread."""
        del call
        self._machine.busy_until = self._machine.now + self._takes

    def done(self) -> bool:
        """As CodecThread."""
        return self._machine.busy_until is not None and self._machine.now >= self._machine.busy_until

    def take(self) -> float:
        """As CodecThread."""
        self._machine.busy_until = None
        return self._takes

    def close(self) -> None:
        """As CodecThread."""


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine, int], Split | None]:
    """Makes the trial on a machine with so many threads. No test computes with more than one."""
    monkeypatch.setattr(
        torch, "set_num_threads", lambda number: monkeypatch.setattr(torch, "get_num_threads", lambda: number)
    )

    def made(machine: Machine, threads: int) -> Split | None:
        monkeypatch.setattr(codec_thread_trial, "CodecThread", machine.thread)
        return trial(machine, threads, lambda: machine.now)

    return made


def test_a_thread_is_taken_where_it_saves_time(tried: Callable[[Machine, int], Split | None]) -> None:
    """Four cores: frames wait for memory, so they hardly need the core that the codec takes."""
    machine = Machine(frame=100, chunk=60, frame_beside={1: 105, 2: 150}, chunk_beside={1: 210, 2: 130})
    # In 210 ms two frames are made, which takes 10 ms more than without the codec. Of 60 ms, 50 are saved.
    # The next chunks are due after 8 frames of 105 ms: four streams can be decoded until then.
    assert tried(machine, 4) == Split(codec_threads=1, streams=4)


def test_no_thread_is_taken_where_both_need_the_same_core(tried: Callable[[Machine, int], Split | None]) -> None:
    """Two threads of one core: frames take as much longer as the codec takes. One round is enough to see it."""
    machine = Machine(frame=100, chunk=130, frame_beside={1: 160}, chunk_beside={1: 310})
    assert tried(machine, 2) is None
    assert machine.chunks == 2


def test_no_thread_is_taken_that_cannot_keep_up(tried: Callable[[Machine, int], Split | None]) -> None:
    """A chunk that takes longer than its frames would stop them."""
    machine = Machine(frame=20, chunk=200, frame_beside={1: 21}, chunk_beside={1: 190})
    assert tried(machine, 2) is None


def test_no_thread_is_taken_where_bits_depend_on_the_number_of_threads(
    tried: Callable[[Machine, int], Split | None],
) -> None:
    """Frames have more threads while the codec has nothing to do."""
    machine = Machine(frame=100, chunk=60, frame_beside={1: 100}, chunk_beside={1: 100})
    assert tried(machine, 2) is not None
    machine.same_bits = False
    assert tried(machine, 2) is None


def test_the_outcome_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the other trials' outcomes. One thread cannot be divided: there is no trial."""
    found: list[Split | None] = [Split(1, 3), None]
    monkeypatch.setattr(codec_thread_trial, "trial", lambda *_: found.pop(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    rehearsal = EngineRehearsal(kept_parts("custom_voice"))

    def chosen(question: str) -> Split | None:
        return choose(rehearsal, (question,), lambda: 0.0, tmp_path / "products.json")

    assert [chosen("a"), chosen("b")] == [Split(1, 3), None]
    assert [chosen("a"), chosen("b")] == [Split(1, 3), None]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert chosen("a") is None


@torch.inference_mode()
def test_a_rehearsal_always_computes_the_same() -> None:
    """It leaves the engine idle."""
    made = kept_parts("custom_voice")
    rehearsal = EngineRehearsal(made)
    first = [*rehearsal.prompt(), rehearsal.chunk()]
    rehearsal.frame()
    assert all(
        torch.equal(one, other) for one, other in zip([*rehearsal.prompt(), rehearsal.chunk()], first, strict=True)
    )
    assert all(tensor.any() for tensor in first)
    assert not made.state.active.any()


def test_a_thread_divides_the_threads() -> None:
    """While it has a call, the caller has the others, and all of them behind the step."""
    before = torch.get_num_threads()
    thread: CodecThread[int] = CodecThread(threads=5, codec_threads=2, streams=1)
    try:
        with thread.sharing():
            assert torch.get_num_threads() == 5
            thread.start(torch.get_num_threads)
            assert torch.get_num_threads() in (3, 5)  # 5 if it is done already
            assert thread.take() == 2
            assert torch.get_num_threads() == 5
        assert torch.get_num_threads() == 5
        thread.start(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            thread.take()
        assert not thread.busy
    finally:
        thread.close()
        torch.set_num_threads(before)
