"""A reload between the main process and its web workers: one state for all, and an answer when all have it."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from server.http.keys import Caller, Keyring, digest_of
from server.reload import main_process
from server.reload.main_link import MainLink
from server.reload.main_process import Reloads
from server.reload.messages import ReloadOutcome, WebState
from shared.settings import Settings, load_settings


def a_state(number: int) -> WebState:
    """A state that has every kind of value."""
    variables = {"TTS_MAX_QUEUE": str(number), "TTS_MODEL_PATHS": "m=/x/y", "TTS_CORS_ORIGINS": "https://a.example"}
    caller = Caller(client="key:a", models=frozenset({"m"}))
    return WebState(
        settings=load_settings(variables),
        keyring=Keyring({digest_of("sk"): caller}, guards_speech=True),
        worker_variables={"TTS_MAX_QUEUE": str(number)},
    )


class Bench:
    """A main process and two web workers in one event loop; `problems` are those of the next reload."""

    def __init__(self) -> None:
        self.number = 0
        self.problems: list[str] = []
        self.error: Exception | None = None
        self.is_over = True
        self.reloads = Reloads(self._read, lambda: None, lambda: self.is_over)
        self.reloads.start()
        self.taken: list[list[WebState]] = [[], []]
        self.retired: list[int] = []
        self.gates = [asyncio.Event(), asyncio.Event()]
        self.opened: list[MainLink] = []
        self.links = [self.connect(worker) for worker in (0, 1)]
        self.looping = asyncio.create_task(self._loop())

    def connect(self, worker: int) -> MainLink:
        """A web worker that has just been forked."""
        self.gates[worker].set()
        link = MainLink(worker, self.reloads.link(worker), self.reloads.outbox)

        async def take(state: WebState) -> None:
            await self.gates[worker].wait()
            self.taken[worker].append(state)

        link.start(take, lambda: self.retired.append(worker))
        self.opened.append(link)
        return link

    def close(self) -> None:
        """End the loop, and close every end."""
        self.looping.cancel()
        self.reloads.close()
        for link in self.opened:
            link.close()

    def _read(self) -> tuple[ReloadOutcome, WebState | None]:
        if self.error is not None:
            raise self.error
        if self.problems:
            return ReloadOutcome(problems=self.problems), None
        self.number += 1
        return ReloadOutcome(changed=[str(self.number)]), a_state(self.number)

    async def _loop(self) -> None:
        while True:
            self.reloads.turn()
            await asyncio.sleep(0.001)


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    """A bench whose main process turns."""
    bench = Bench()
    yield bench
    bench.close()


async def becomes(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 -- another task makes it true
            await asyncio.sleep(0.001)


async def test_the_answer_comes_when_all_have_the_state(bench: Bench) -> None:
    """Not before a web worker that takes its time; and each has exactly what the main process has read."""
    bench.gates[1].clear()
    asking = asyncio.create_task(bench.links[0].reload())
    await becomes(lambda: bool(bench.taken[0]))
    assert not asking.done()
    bench.gates[1].set()
    assert await asking == ReloadOutcome(changed=["1"])
    assert bench.taken == [[a_state(1)], [a_state(1)]]


async def test_a_mistake(bench: Bench) -> None:
    """The problems come back, and no web worker hears of it."""
    bench.problems = ["TTS_X: wrong", "TTS_Y: wrong"]
    assert await bench.links[1].reload() == ReloadOutcome(problems=bench.problems)
    assert bench.taken == [[], []]


async def test_an_error_of_our_own(bench: Bench) -> None:
    """It is a problem of the reload, not the end of the service; the next reload works."""
    bench.error = RuntimeError("no")
    assert (await bench.links[1].reload()).problems == ["the settings could not be read; the log says why"]
    bench.error = None
    assert (await bench.links[1].reload()).changed == ["1"]


async def test_a_signal(bench: Bench) -> None:
    """SIGHUP asks for the same, and nobody waits for an answer."""
    bench.reloads.request()
    await becomes(lambda: bench.taken == [[a_state(1)], [a_state(1)]])


async def test_asks_during_a_reload_are_answered_by_the_next(bench: Bench) -> None:
    """A change that was written after the first one has read its files is not missed."""
    bench.gates[1].clear()
    first = asyncio.create_task(bench.links[0].reload())
    await becomes(lambda: bool(bench.taken[0]))
    others = [asyncio.create_task(bench.links[worker].reload()) for worker in (0, 1, 0)]
    await asyncio.sleep(0.05)  # they are on their way; the result is the same if they are not
    bench.gates[1].set()
    assert (await first).changed == ["1"]
    assert {tuple((await other).changed) for other in others} <= {("2",), ("3",)}
    assert bench.taken[0][-1] == bench.taken[1][-1] == a_state(bench.number)


async def test_a_web_worker_that_dies_is_not_waited_for(bench: Bench) -> None:
    """And the one in its place gets the next state."""
    bench.gates[1].clear()
    asking = asyncio.create_task(bench.links[0].reload())
    await becomes(lambda: bool(bench.taken[0]))
    bench.reloads.unlink(1)
    assert (await asking).changed == ["1"]
    link = bench.connect(1)
    assert (await link.reload()).changed == ["2"]
    assert bench.taken[1][-1] == a_state(2)


async def test_a_web_worker_that_stands_still(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds up the answer for a while, and nothing else; it takes every state when it goes on."""
    monkeypatch.setattr(main_process, "TAKEN_WITHIN_S", 0.01)
    bench.gates[1].clear()
    for number in (1, 2, 3):
        assert (await bench.links[0].reload()).changed == [str(number)]
    bench.gates[1].set()
    await becomes(lambda: bench.taken[1] == [a_state(number) for number in (1, 2, 3)])


async def test_the_answer_waits_for_the_rest_of_the_reload(bench: Bench) -> None:
    """Work that the reload has begun beside the state must be over; one that changes nothing does not wait for it."""
    bench.is_over = False
    asking = asyncio.create_task(bench.links[0].reload())
    await becomes(lambda: len(bench.taken[0]) == 1)
    assert not asking.done()
    bench.is_over = True
    assert (await asking).changed == ["1"]
    bench.is_over, bench.problems = False, ["TTS_X: wrong"]
    assert (await bench.links[0].reload()).problems == bench.problems


async def test_a_replaced_web_worker(bench: Bench) -> None:
    """It is told so, and still takes the state of reloads: a key that goes is refused there too."""
    bench.reloads.retire(1)
    await becomes(lambda: bench.retired == [1])
    await bench.links[0].reload()
    assert bench.taken == [[a_state(1)], [a_state(1)]]


async def test_a_large_state_crosses() -> None:
    """Ten thousand keys are no message of a few bytes."""
    keys = {digest_of(str(number)): Caller(client=f"key:{number}") for number in range(10_000)}
    state = WebState(settings=Settings(), keyring=Keyring(keys, guards_speech=True))
    bench = Reloads(lambda: (ReloadOutcome(changed=["TTS_KEYS_FILE"]), state), lambda: None, lambda: True)
    taken: list[WebState] = []

    async def take(state: WebState) -> None:
        taken.append(state)

    bench.start()
    link = MainLink(0, bench.link(0), bench.outbox)
    link.start(take, lambda: None)
    bench.request()
    bench.turn()
    await becomes(lambda: taken == [state])
    link.close()
    bench.close()
