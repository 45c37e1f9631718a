"""A renewed certificate: a reload has new web workers serve it, and cuts nothing of what the old ones are doing."""

import asyncio
import json
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme
from websockets.asyncio.client import ClientConnection, connect

from tests.system.service import Service, eventually

SPEECH = "/v1/audio/speech"
LONG = "One sentence after the other. " * 60  # 6 MB are more than the kernel's buffers hold


class Renewing:
    """A service of two web workers with https, whose certificate can be renewed."""

    def __init__(self, folder: Path) -> None:
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self.authority = trustme.CA()
        self.context = ssl.create_default_context()
        self.authority.configure_trust(self.context)
        self.renew()
        self.service = Service(folder, TLS_CERT=self.cert, TLS_KEY=self.key, WEB_WORKERS=2, STALL_TIMEOUT=3000)
        self.service.url = self.service.url.replace("http:", "https:")
        self.service.http = httpx.Client(base_url=self.service.url, timeout=60, trust_env=False, verify=self.context)

    def renew(self) -> None:
        """Another certificate at the same paths, behind links as certbot has them; nothing is read yet."""
        issued = self.authority.issue_cert("localhost", "127.0.0.1")
        number = len(list(self.cert.parent.glob("*.pem")))
        for path, pem in ((self.cert, issued.cert_chain_pems[0]), (self.key, issued.private_key_pem)):
            target = path.with_name(f"{number}-{path.name}")
            pem.write_to_path(target)
            path.unlink(missing_ok=True)
            path.symlink_to(target)
        self.newest = ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())

    def served(self) -> set[bytes]:
        """The certificates of twenty new connections, which the kernel spreads over the web workers."""
        found = set()
        for _ in range(20):
            with (
                socket.create_connection(("127.0.0.1", self.service.port), 90) as plain,
                self.context.wrap_socket(plain, server_hostname="localhost") as secure,
            ):
                found.add(secure.getpeercert(binary_form=True) or b"")
        return found

    def client(self, **options: object) -> httpx.AsyncClient:
        """An asynchronous client that trusts the certificates."""
        return httpx.AsyncClient(
            base_url=self.service.url, verify=self.context, timeout=120, trust_env=False, **options
        )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def renewing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Renewing]:
    """A running service. Each test leaves it with the newest certificate."""
    renewing = Renewing(tmp_path_factory.mktemp("renewing"))
    try:
        renewing.service.wait_ready()
        yield renewing
    finally:
        renewing.service.kill()


async def _stream(http: httpx.AsyncClient, began: asyncio.Semaphore, go_on: asyncio.Event) -> int:
    """Read a little of a speech, wait, and read the rest; the number of bytes."""
    async with http.stream("POST", SPEECH, json={"input": LONG, "response_format": "pcm"}) as answer:
        pieces = answer.aiter_raw()
        n_bytes = len(await anext(pieces))
        began.release()
        await go_on.wait()
        async for piece in pieces:
            n_bytes += len(piece)
        return n_bytes


async def _keep_asking(http: httpx.AsyncClient, over: asyncio.Event, headers: dict[str, str]) -> int:
    """Ask for speech until it is over; the number of answers. A connection that breaks raises."""
    count = 0
    while not over.is_set():
        answer = await http.post(SPEECH, json={"input": "Yes.", "response_format": "pcm"}, headers=headers)
        assert answer.status_code == httpx.codes.OK, answer.text
        count += 1
        await asyncio.sleep(0.05)  # leaves CPU time to the web workers that start
    return count


async def _speak(ws: ClientConnection) -> int:
    """One utterance over an open WebSocket; the number of bytes."""
    await ws.send(json.dumps({"type": "input.text", "text": "Good morning."}))
    await ws.send(json.dumps({"type": "input.commit"}))
    n_bytes = 0
    async for message in ws:
        if isinstance(message, bytes):
            n_bytes += len(message)
        elif json.loads(message)["type"] == "audio.done":
            break
    return n_bytes


def test_a_mistake_in_the_pair(renewing: Renewing) -> None:
    """A key of another certificate is a 400 that names it, and what was served before is still served."""
    before, cert, key = renewing.newest, renewing.cert.readlink(), renewing.key.readlink()
    said = renewing.service.log.read_text().count("web_worker_retired")
    renewing.renew()
    renewing.cert.unlink()
    renewing.cert.symlink_to(cert)
    answer = renewing.service.http.post("/admin/reload")
    assert answer.status_code == httpx.codes.BAD_REQUEST
    assert "TTS_TLS_KEY" in answer.json()["error"]["message"]
    assert renewing.served() == {before}
    assert renewing.service.log.read_text().count("web_worker_retired") == said
    renewing.key.unlink()
    renewing.key.symlink_to(key)
    renewing.newest = before


async def test_a_renewed_certificate(renewing: Renewing) -> None:
    """It is served after the reload; streams and WebSockets end whole, and no request of those who go on fails.

    Web workers that start later have it too.
    """
    service, before = renewing.service, renewing.newest
    retired = service.log.read_text().count("web_worker_retired")
    assert renewing.served() == {before}
    alone = len(service.http.post(SPEECH, json={"input": LONG, "response_format": "pcm"}).content)
    began, go_on, over = asyncio.Semaphore(0), asyncio.Event(), asyncio.Event()
    narrow = httpx.AsyncHTTPTransport(
        verify=renewing.context, socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)]
    )
    async with (
        renewing.client(transport=narrow) as slow,
        renewing.client() as kept,
        renewing.client() as fresh,
        renewing.client(http1=False, http2=True) as multiplexed,
        connect(f"{service.url.replace('https', 'wss')}{SPEECH}/stream", ssl=renewing.context, proxy=None) as ws,
    ):
        await ws.send(json.dumps({"type": "session.config", "response_format": "pcm"}))
        reading = [asyncio.create_task(_stream(slow, began, go_on)) for _ in range(4)]
        asking = [
            asyncio.create_task(_keep_asking(http, over, headers))
            for http, headers in ((kept, {}), (multiplexed, {}), *[(fresh, {"connection": "close"})] * 4)
        ]
        for _ in reading:
            await began.acquire()
        renewing.renew()
        async with renewing.client() as http:
            answer = await http.post("/admin/reload")
        assert answer.json() == {"changed": ["TTS_TLS_CERT", "TTS_TLS_KEY"], "needs_restart": []}
        await asyncio.to_thread(eventually, lambda: renewing.served() == {renewing.newest}, 90, "the new certificate")
        over.set()
        assert min(await asyncio.gather(*asking)) > 0
        assert await _speak(ws) > 1_000
        go_on.set()
        assert all(abs(n_bytes - alone) < alone / 100 for n_bytes in await asyncio.gather(*reading))
    # httpx has closed its connections, and so have the web workers.
    service.http.close()
    said = service.log.read_text
    eventually(lambda: said().count("web_worker_retired") == retired + 2, 90, said)
    service.http = httpx.Client(base_url=service.url, timeout=60, trust_env=False, verify=renewing.context)
    os.kill(service.stats()["web_pid"], signal.SIGKILL)
    eventually(lambda: "web_worker_died" in said() and service.is_ready(), 90, "another web worker")
    assert renewing.served() == {renewing.newest}
