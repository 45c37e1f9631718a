"""The open-loop client: what it makes of good, refused and broken answers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.benchmarks import client

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@asynccontextmanager
async def answering(*pieces: bytes) -> AsyncIterator[str]:
    """A server that says this and hangs up; its address."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_whole_answer() -> None:
    """Chunks come out as they came in, and the end is proper."""
    async with answering(HEAD, b"3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n") as url:
        answer = await client.ask(url, {"input": "x"}, timeout_s=5)
    assert [data for _, data in answer.arrivals] == [b"abc", b"de"]
    assert (answer.status, answer.error, answer.refused) == (200, "", False)
    assert 0 <= answer.sent_s <= answer.arrivals[0][0] <= answer.ended_s


@pytest.mark.parametrize("pieces", [[HEAD, b"3\r\nabc\r\n"], [HEAD, b"3\r\na"], [HEAD], [b""]])
async def test_answer_that_breaks_off_failed(pieces: list[bytes]) -> None:
    """A transfer without its last chunk is no success, however much came."""
    async with answering(*pieces) as url:
        answer = await client.ask(url, {"input": "x"}, timeout_s=5)
    assert answer.error
    assert not answer.refused


@pytest.mark.parametrize(("status", "refused"), [(429, True), (503, False)])
async def test_refusals_are_told_from_failures(status: int, refused: bool) -> None:  # noqa: FBT001 -- a parameter
    """A 429 is a refusal; any other status is a failure, with what it says."""
    async with answering(f"HTTP/1.1 {status} No\r\nContent-Length: 4\r\n\r\nbusy".encode()) as url:
        answer = await client.ask(url, {"input": "x"}, timeout_s=5)
    assert (answer.refused, answer.error) == (refused, f"{status} busy")


async def test_answer_that_never_ends_failed() -> None:
    """The time limit ends a request, says so, and hangs up."""
    left = asyncio.Event()

    async def listen_only(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    server = await asyncio.start_server(listen_only, "127.0.0.1", 0)
    async with server, asyncio.timeout(5):
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        answer = await client.ask(url, {"input": "x"}, timeout_s=0.05)
        await left.wait()
    assert answer.error == "not complete after 0.05 s"


async def test_latency_counts_from_when_it_was_due() -> None:
    """A request that leaves late has waited: the client's own delay is part of what it reports."""
    async with answering(HEAD, b"1\r\na\r\n0\r\n\r\n") as url:
        due = asyncio.get_running_loop().time() - 2.0
        answer = await client.ask(url, {"input": "x"}, timeout_s=5, due=due)
    assert 2.0 <= answer.sent_s <= answer.arrivals[0][0] <= answer.ended_s


def test_poisson_is_the_same_again_and_has_its_rate() -> None:
    """A seed gives the same instants; over a long time there are as many as the rate says; never more than `most`."""
    due = client.poisson(10, 100, 10_000, seed=1)
    assert due == client.poisson(10, 100, 10_000, seed=1) == sorted(due)
    assert due != client.poisson(10, 100, 10_000, seed=2)
    assert len(due) == pytest.approx(1000, rel=0.1)
    assert due[-1] < 100
    assert client.poisson(10, 100, 7, seed=1) == due[:7]
