"""Invariants after every turn, through any mixture of requests, credit, cancels, faults and departures."""

import random
from collections import Counter

import pytest

from gpu_worker.requests import RequestState
from gpu_worker.transport import PeerGone
from shared.pcm import bytes_for
from shared.protocol import Audio, Credit
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.worker_bench import MakeBench, WorkerBench, loaded


class _RandomClients:
    """Web workers that act at random. `credit` is what each request got, `dropped` the cancelled requests."""

    def __init__(self, bench: WorkerBench, seed: int) -> None:
        self._bench = bench
        self._dice = random.Random(seed)  # noqa: S311 -- a dice, not a secret
        self.credit: dict[tuple[bytes, str], int] = {}
        self.dropped: set[tuple[bytes, str]] = set()

    def act(self) -> None:
        """Do one thing, and run a few turns."""
        actions = [self._speak, self._speak, self._grant, self._grant, self._cancel, self._leave, self._break]
        self._dice.choice(actions)(self._dice.choice([b"web-1", b"web-2", b"web-3"]))
        self._bench.turn(self._dice.randrange(3))

    def read_everything(self) -> None:
        """Grant credit for everything that is left."""
        for peer, name in self.credit.keys() - self.dropped:
            self._give(peer, name, 100)
        self._bench.settle()

    def _speak(self, peer: bytes) -> None:
        name, credit = f"r{len(self.credit)}", self._dice.randrange(4)
        self.credit[peer, name] = credit
        words = " ".join(self._dice.choices([*"abcdefghijklmnopqrs", "fault"], k=self._dice.randrange(1, 25)))
        model, client = self._dice.choice("mn"), self._dice.choice("xyz")
        self._bench.speak(name, words, peer=peer, model=model, client=client, credit=credit)

    def _grant(self, peer: bytes) -> None:
        for name in self._one_of(peer):
            self._give(peer, name, self._dice.randrange(1, 5))

    def _cancel(self, peer: bytes) -> None:
        for name in self._one_of(peer):
            self.dropped.add((peer, name))
            self._bench.cancel(name, peer)

    def _leave(self, peer: bytes) -> None:
        if self._dice.random() < 0.1:
            self.dropped.update(key for key in self.credit if key[0] == peer)
            self._bench.inbox.put(PeerGone(peer))

    def _break(self, _peer: bytes) -> None:
        if self._bench.engines and self._dice.random() < 0.3:
            error = self._dice.choice([ValueError("broken"), MemoryError("full")])
            self._bench.engines[self._dice.choice(list(self._bench.engines))].step_errors.append(error)

    def _give(self, peer: bytes, name: str, chunks: int) -> None:
        self.credit[peer, name] += chunks
        self._bench.send(Credit(id=name, chunks=chunks), peer=peer)

    def _one_of(self, peer: bytes) -> list[str]:
        mine = [name for to, name in self.credit if to == peer and (to, name) not in self.dropped]
        return [self._dice.choice(mine)] if mine else []


def _check_states(bench: WorkerBench) -> None:
    """Each state means what RequestState says: in the queue, in a slot, parked, a reference on the model, or none.

    The buffer holds what its requests keep, to the byte, and no more than its budget.
    """
    by_state = {state: [r for r in bench.scheduler.submitted if r.state is state] for state in RequestState}
    queued, running, parked = (
        by_state[state] for state in (RequestState.QUEUED, RequestState.RUNNING, RequestState.PARKED)
    )
    assert Counter(bench.scheduler) == Counter(queued)
    slots = set().union(*(engine.job_ids for engine in bench.engines.values()))
    assert slots == {request.job.id for request in running}
    kept = set().union(*(engine.parked for engine in bench.engines.values()))
    assert kept == {request.job.id for request in parked}
    assert bench.buffer.used_bytes <= bench.buffer.budget_bytes
    waiting = sum(request.sink.waiting_bytes for request in bench.scheduler.submitted)
    assert bench.buffer.used_bytes == waiting + sum(request.parked_bytes for request in parked)
    references = Counter(request.model for request in [*queued, *running, *parked])
    assert bench.references() == {model: references[model] for model in bench.sizes}
    drained = [request.id for request in by_state[RequestState.DRAINING] if request.sink.drained]
    assert drained == []


def _check_snapshot(bench: WorkerBench, requests: int) -> None:
    """The snapshot lists the requests that are not DONE.

    It counts every request once when it gets its first slot, and once when it is DONE.
    """
    submitted = bench.scheduler.submitted
    done = sum(request.state is RequestState.DONE for request in submitted)
    snapshot = bench.snapshot()
    counts = snapshot.requests
    assert {stream.id for stream in snapshot.streams} == {
        request.id for request in submitted if request.state is not RequestState.DONE
    }
    assert counts.started == sum(request.started_at is not None for request in submitted)
    assert counts.finished + counts.failed + counts.cancelled == done
    assert counts.rejected == requests - len(submitted)


def test_states_draining(make_bench: MakeBench) -> None:
    """The checks hold in a turn with a request of every state."""
    bench = loaded(make_bench(slots=1))
    bench.engines["m"].words_per_step = 2
    bench.engines["m"].word_s = 2.0
    bench.speak("draining", "a b", credit=1)
    bench.turn()
    bench.speak("parked", "a b c d e", credit=0)
    bench.turn()
    bench.clock.advance(1)
    bench.speak("running", "a b c d e", credit=0)
    bench.turn()
    bench.speak("queued", "a b c d e", credit=0)
    bench.turn()
    states = {request.id: request.state for request in bench.scheduler.submitted}
    assert states == {
        "first-m": RequestState.DONE,
        "draining": RequestState.DRAINING,
        "parked": RequestState.PARKED,
        "running": RequestState.RUNNING,
        "queued": RequestState.QUEUED,
    }
    _check_states(bench)
    _check_snapshot(bench, requests=5)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "budget_bytes"), [(0, 150), (1, 200), (2, 200)])
def test_any_mixture(make_bench: MakeBench, seed: int, budget_bytes: int) -> None:
    """No more pieces than credit, no gap, one last message and none behind it, none for a cancelled request.

    The states, the counts and the buffer hold after every act.
    In the end no slot, no place in the queue, no reference and nothing in the buffer is left.
    """
    device = FakeDevice(budget_bytes=budget_bytes)
    bench = make_bench(
        {"m": 100, "n": 100}, slots=3, max_concurrency=4, max_queue=6, device=device, buffer_bytes=bytes_for(40)
    )
    parks = 0
    clients = _RandomClients(bench, seed)
    for act in range(1_000):
        clients.act()
        for engine in bench.engines.values():
            engine.word_s, engine.parked_bytes = 1.0, bytes_for(0.5)
        bench.clock.advance(0.15)
        _check_states(bench)
        parks += any(engine.parked for engine in bench.engines.values())
        if act % 50 == 0:
            bench.settle()
            _check_snapshot(bench, len(clients.credit))
    clients.read_everything()
    _check_states(bench)
    _check_snapshot(bench, len(clients.credit))

    ends = {"Finished": 0, "Failed": 0}
    for (peer, name), credit in clients.credit.items():
        kinds = bench.kinds(name, peer)
        numbers = [message.seq for message in bench.messages(name, peer) if isinstance(message, Audio)]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) <= credit
        ended = [kind for kind in kinds if kind in ends]
        assert len(ended) == 1 or (not ended and (peer, name) in clients.dropped)
        for end in ended:
            assert kinds[-1] == end
            ends[end] += 1
    assert min(ends.values()) > 10
    assert parks > 10
    assert bench.buffer.used_bytes == 0
    assert {request.state for request in bench.scheduler.submitted} == {RequestState.DONE}
    snapshot = bench.snapshot()
    assert (snapshot.running, snapshot.queued) == (0, 0)
    assert snapshot.requests.failed + snapshot.requests.rejected == ends["Failed"]
