"""The open-loop client, with whole, refused and broken answers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.benchmarks import client

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@asynccontextmanager
async def answering(*pieces: bytes) -> AsyncIterator[str]:
    """A server that sends these pieces and closes the connection; its address."""

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
    """Every chunk is recorded, and the answer is complete."""
    async with answering(HEAD, b"3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n") as url:
        answer = await client.ask(url, {"input": "x"}, timeout_s=5)
    assert [data for _, data in answer.arrivals] == [b"abc", b"de"]
    assert (answer.status, answer.error, answer.refused) == (200, "", False)
    assert 0 <= answer.sent_s <= answer.arrivals[0][0] <= answer.ended_s


@pytest.mark.parametrize("pieces", [[HEAD, b"3\r\nabc\r\n"], [HEAD, b"3\r\na"], [HEAD], [b""]])
async def test_answer_that_breaks_off_failed(pieces: list[bytes]) -> None:
    """A transfer without its last chunk is a failure, however much arrived."""
    async with answering(*pieces) as url:
        answer = await client.ask(url, {"input": "x"}, timeout_s=5)
    assert answer.error
    assert not answer.refused


@pytest.mark.parametrize(("status", "refused"), [(429, True), (503, False)])
async def test_refusals_are_told_from_failures(status: int, refused: bool) -> None:  # noqa: FBT001 -- a parameter
    """A 429 is a refusal; any other status is a failure, with its body as the error."""
    async with answering(f"HTTP/1.1 {status} No\r\nContent-Length: 4\r\n\r\nbusy".encode()) as url:
        answer = await client.ask(url, {"input": "x"}, timeout_s=5)
    assert (answer.refused, answer.error) == (refused, f"{status} busy")


async def test_answer_that_never_ends_failed() -> None:
    """The time limit ends a request with an error and closes its connection."""
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
    """Latencies include the client's own delay."""
    async with answering(HEAD, b"1\r\na\r\n0\r\n\r\n") as url:
        due = asyncio.get_running_loop().time() - 2.0
        answer = await client.ask(url, {"input": "x"}, timeout_s=5, due=due)
    assert 2.0 <= answer.sent_s <= answer.arrivals[0][0] <= answer.ended_s


def test_poisson_is_the_same_again_and_has_its_rate() -> None:
    """A seed gives the same times; their number fits the rate over a long time, and never exceeds `most`."""
    due = client.poisson(10, 100, 10_000, seed=1)
    assert due == client.poisson(10, 100, 10_000, seed=1) == sorted(due)
    assert due != client.poisson(10, 100, 10_000, seed=2)
    assert len(due) == pytest.approx(1000, rel=0.1)
    assert due[-1] < 100
    assert client.poisson(10, 100, 7, seed=1) == due[:7]
