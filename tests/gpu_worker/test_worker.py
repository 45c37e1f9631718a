"""The loop's answers to Hello and Ping, and its end."""

import pytest

from gpu_worker.transport import PeerGone
from gpu_worker.worker import Drain
from shared.protocol import (
    VERSION,
    BufferMemory,
    Cleanup,
    Counters,
    Hello,
    LoadModel,
    Message,
    Ping,
    Pong,
    Welcome,
)
from tests.gpu_worker.worker_bench import OTHER, WEB, MakeBench, WorkerBench, loaded, pcm_of


class _PingsForever(list[tuple[bytes, Message, bytes | None]]):
    """The messages of a worker whose web worker answers each one with another Ping; an answer takes 10 ms."""

    def __init__(self, bench: WorkerBench) -> None:
        super().__init__()
        self._bench = bench

    def append(self, sent: tuple[bytes, Message, bytes | None]) -> None:
        super().append(sent)
        self._bench.clock.advance(0.01)
        if isinstance(sent[1], Pong) and len(self) < 1_000:
            self._bench.send(Ping())


def test_flood(bench: WorkerBench) -> None:
    """Messages that come without an end leave the engines a step between every 0.1 s of them."""
    loaded(bench)
    bench.sent = _PingsForever(bench)
    bench.speak("r", "one two three", peer=OTHER)
    bench.send(Ping())
    bench.turn(3)
    assert bench.words("r", OTHER) == "one two three"
    assert len(bench.sent) < 40


class TestSnapshot:
    """The answers to Hello and Ping."""

    def test_hello(self, bench: WorkerBench) -> None:
        """Welcome has the boot id, the catalogue and a snapshot."""
        bench.send(Hello(version=VERSION, token=""))
        bench.turn()
        ((peer, welcome, payload),) = bench.sent
        assert (peer, payload) == (WEB, None)
        assert isinstance(welcome, Welcome)
        assert (welcome.version, welcome.boot_id, welcome.catalog) == (VERSION, "boot-1", bench.specs)
        assert welcome.snapshot.boot_id == "boot-1"

    def test_the_sockets_of_all_web_workers(self, make_bench: MakeBench) -> None:
        """Each says how many it has; those of one that is gone do not count."""
        bench = loaded(make_bench({"m": 100}))
        for peer, count in ((b"web-3", 3), (OTHER, 1), (OTHER, 2)):
            bench.send(Ping(open_sockets=count), peer=peer)
        assert bench.snapshot().open_sockets == 5
        bench.inbox.put(PeerGone(b"web-3"))
        assert bench.snapshot().open_sockets == 2

    def test_what_web_workers_refuse(self, make_bench: MakeBench) -> None:
        """Each Ping has what is new; what a web worker has refused stays counted when it is gone."""
        bench = loaded(make_bench({"m": 100}))
        for peer, count in ((b"web-3", 3), (OTHER, 1), (OTHER, 2)):
            bench.send(Ping(limit_hits={"requests_of_address": count}), peer=peer)
        bench.inbox.put(PeerGone(b"web-3"))
        assert bench.snapshot().limit_hits == {"requests_of_address": 6}

    def test_ping(self, make_bench: MakeBench) -> None:
        """The loop itself answers a Ping, with everything that dashboards read."""
        bench = loaded(make_bench({"m": 100, "n": 50}, slots=2))
        voice = bench.save_voice("Mine")
        bench.speak("q", "a b", credit=1)
        bench.settle()
        bench.engines["m"].muted.add("c")
        for name in "rstu":
            bench.speak(name, "c")
        bench.settle()
        bench.clock.advance(5)
        bench.send(Ping(), peer=OTHER)
        bench.turn()
        peer, pong, _ = bench.sent[-1]
        assert peer == OTHER
        assert isinstance(pong, Pong)
        snapshot = pong.snapshot
        assert (snapshot.boot_id, snapshot.default_model, snapshot.accepting) == ("boot-1", "m", True)
        assert (snapshot.running, snapshot.queued, snapshot.slots) == (2, 2, 2)
        assert (snapshot.buffered, snapshot.stalled) == (1, 0)
        assert snapshot.audio_buffer == BufferMemory(used_bytes=len(pcm_of("b")), budget_bytes=2**24)
        assert snapshot.requests == Counters(started=4, finished=1)
        assert [(model.id, model.state, model.references) for model in snapshot.models] == [
            ("m", "resident", 4),
            ("n", "absent", 0),
        ]
        assert snapshot.device.ours_bytes == 100
        assert snapshot.host.total_bytes == bench.device.host_total_bytes
        assert snapshot.shared_bytes == {"codec": 7}
        assert snapshot.voices == [voice]
        assert snapshot.uptime_s == pytest.approx(5.0)
        assert snapshot.cleanup is None
        assert snapshot.restarts == 2
        assert [(stream.id, stream.client, stream.state, stream.age_s) for stream in snapshot.streams] == [
            ("r", "alice", "generating", 5.0),
            ("s", "alice", "generating", 5.0),
            ("q", "alice", "buffered", 5.0),
            ("t", "alice", "waiting", 5.0),
            ("u", "alice", "waiting", 5.0),
        ]


class TestDrain:
    """From Drain to the end of `run`."""

    def test_running_requests_end_queued_ones_fail(self, make_bench: MakeBench) -> None:
        """Running requests end normally; queued and new ones fail with a time to retry."""
        bench = loaded(make_bench(slots=1))
        bench.speak("r", "a b c")
        bench.speak("s", "x")
        bench.turn()
        bench.inbox.put(Drain(30))
        bench.turn()
        bench.speak("t", "y")
        bench.worker.run()
        assert bench.words("r") == "a b c"
        assert bench.kinds("r")[-1] == "Finished"
        for name in "st":
            (failed,) = bench.messages(name)
            assert failed.code == "shutting_down"
            assert failed.retry_after_s is not None

    def test_deadline(self, bench: WorkerBench) -> None:
        """Requests that run past the deadline fail."""
        loaded(bench)
        bench.speak("r", "a b c", credit=1)
        bench.inbox.put(Drain(30))
        bench.settle()
        bench.clock.advance(31)
        bench.worker.run()
        assert bench.kinds("r") == ["Started", "Audio", "Failed"]
        assert bench.last_message("r").code == "shutting_down"
        assert bench.engines["m"].jobs == set()

    def test_the_earliest_deadline_counts(self, bench: WorkerBench) -> None:
        """A second Drain may shorten the first one, and cannot prolong it."""
        loaded(bench)
        bench.speak("r", "a b c", credit=1)
        for deadline_s in (30, 1, 60):
            bench.inbox.put(Drain(deadline_s))
        bench.settle()
        bench.clock.advance(2)
        bench.worker.run()
        assert bench.last_message("r").code == "shutting_down"

    def test_calls(self, make_bench: MakeBench) -> None:
        """No LoadModel is taken any more, and calls that still wait at the end fail."""
        bench = make_bench({"m": 100, "n": 100})
        bench.load_gate.clear()
        bench.call("load", LoadModel(model="m"))
        bench.speak("r", "one")
        bench.settle()
        bench.call("clean", Cleanup())
        bench.turn()
        bench.inbox.put(Drain(30))
        bench.call("late", LoadModel(model="n"))
        bench.worker.run()
        for name in ("load", "clean", "late", "r"):
            (failed,) = bench.messages(name)
            assert failed.code == "shutting_down"
        assert bench.states()["n"] == "absent"

    def test_idle(self, bench: WorkerBench) -> None:
        """An idle worker ends at once."""
        bench.inbox.put(Drain(30))
        bench.worker.run()
        assert bench.sent == []

    def test_snapshot(self, bench: WorkerBench) -> None:
        """The snapshot says that no request is accepted any more."""
        loaded(bench)
        bench.speak("r", "a b", credit=0)
        bench.turn()
        assert bench.snapshot().accepting
        bench.inbox.put(Drain(30))
        assert not bench.snapshot().accepting
