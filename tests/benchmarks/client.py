"""An open-loop client: requests leave at the times of a Poisson process, whether or not earlier ones were answered.

It records the arrival time of all bytes, and no more: playback.py evaluates them after the load.
Each request has a connection of its own, over bare asyncio streams: the client needs little CPU time.
"""

import asyncio
import json
import random
from typing import Any
from urllib.parse import urlsplit

import msgspec

OK = 200
TOO_MANY = 429


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one request; all times are seconds since the request was due.

    Latencies therefore include the delay of a client or server that falls behind.
    `error` is empty for a complete answer.
    """

    sent_s: float
    ended_s: float
    arrivals: list[tuple[float, bytes]]
    status: int = 0
    error: str = ""

    @property
    def refused(self) -> bool:
        """Whether the server's queue was full."""
        return self.status == TOO_MANY


def poisson(rate: float, seconds: float, most: int, seed: int) -> list[float]:
    """The times at which requests are due: `rate` a second on average for `seconds`, at most `most`."""
    random_ = random.Random(seed)  # noqa: S311 -- a benchmark's, which must be repeatable
    due: list[float] = []
    now = random_.expovariate(rate)
    while now < seconds and len(due) < most:
        due.append(now)
        now += random_.expovariate(rate)
    return due


async def load(
    url: str, bodies: list[dict[str, Any]], due: list[float], timeout_s: float
) -> tuple[list[Answer], float]:
    """Send every body when it is due; the answers, and the seconds from the first request to the last end."""
    loop = asyncio.get_running_loop()
    began = loop.time() + 0.1

    async def at(instant: float, body: dict[str, Any]) -> Answer:
        await asyncio.sleep(began + instant - loop.time())
        return await ask(url, body, timeout_s, due=began + instant)

    answers = await asyncio.gather(*(at(instant, body) for instant, body in zip(due, bodies, strict=True)))
    ended = max(instant + answer.ended_s for instant, answer in zip(due, answers, strict=True))
    return answers, ended - due[0]


async def ask(url: str, body: dict[str, Any], timeout_s: float, due: float | None = None) -> Answer:
    """One request for speech, `due` on the loop's clock (None: now). Failures of the server are in Answer.error."""
    loop = asyncio.get_running_loop()
    due = loop.time() if due is None else due
    sent = loop.time() - due
    arrivals: list[tuple[float, bytes]] = []
    status, error = 0, ""
    try:
        async with asyncio.timeout(timeout_s):
            where = urlsplit(url)
            reader, writer = await asyncio.open_connection(where.hostname, where.port or 80)
            try:
                writer.write(_request(where.netloc, body))
                status = int((await reader.readline()).split()[1])
                head = await reader.readuntil(b"\r\n\r\n")
                if status == OK:
                    while data := await _chunk(reader):
                        arrivals.append((loop.time() - due, data))
                else:
                    error = f"{status} {(await _whole(reader, head)).decode(errors='replace')}"
            finally:
                writer.close()
    except TimeoutError:
        error = f"not complete after {timeout_s:g} s"
    except (OSError, EOFError, ValueError, IndexError, asyncio.LimitOverrunError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    return Answer(sent_s=sent, ended_s=loop.time() - due, arrivals=arrivals, status=status, error=error)


def _request(host: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    """The next chunk of a chunked body, empty at its end; EOFError or ValueError if the body breaks off."""
    size = int(await reader.readline(), 16)
    return (await reader.readexactly(size + 2))[:-2]


async def _whole(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """The body of an error."""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return await reader.readexactly(int(line.partition(b":")[2]))
    return b""
