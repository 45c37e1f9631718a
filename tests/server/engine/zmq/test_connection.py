"""The DEALER of a web process: what `Connection` relies on in pyzmq, and messages that find no room."""

from pathlib import Path

import zmq
import zmq.asyncio

from server.engine.zmq.connection import Connection
from shared.protocol import Cancel, Ping, encode
from shared.sockets import connect_dealer
from tests.fakes import FakeWorker
from tests.server.running import becomes


async def test_contract_with_pyzmq_a_noblock_send_is_done_at_once(worker: FakeWorker, tmp_path: Path) -> None:
    """`send` reads the outcome of the future without awaiting it: sent, or zmq.Again where nobody listens."""
    with zmq.asyncio.Context() as context:
        dealer = connect_dealer(context, f"ipc://{tmp_path}/nobody.ipc")
        refused = dealer.send_multipart(encode(Ping()), flags=zmq.NOBLOCK)
        assert refused.done(), "pyzmq does not finish a NOBLOCK send at once any more; see Connection.send"
        assert isinstance(refused.exception(), zmq.Again)
        dealer.close()
        dealer = connect_dealer(context, worker.url)
        await becomes(lambda: dealer.get(zmq.EVENTS) & zmq.POLLOUT)
        sent = dealer.send_multipart(encode(Ping()), flags=zmq.NOBLOCK)
        assert sent.done(), "pyzmq does not finish a NOBLOCK send at once any more; see Connection.send"
        assert sent.exception() is None
        dealer.close()


async def test_kept_messages_are_sent_later(tmp_path: Path) -> None:
    """A Credit or Cancel that finds no worker is kept; `send_kept` sends it once there is one."""
    fake = FakeWorker(tmp_path / "w.ipc")
    connected: list[bool] = []
    connection = Connection(
        fake.url,
        on_connected=lambda: connected.append(True),
        on_lost=lambda: connected.append(False),
        on_message=lambda _message, _payload: None,
    )
    assert not connection.send(Ping())
    connection.send_or_keep(Cancel(id="r1"))
    with fake:
        await becomes(lambda: connected == [True])
        connection.send_kept()
        await becomes(lambda: [cancel.id for cancel in fake.of(Cancel)] == ["r1"])
        await connection.close()


async def test_kept_messages_end_with_the_connection(tmp_path: Path) -> None:
    """A new worker knows nothing of the requests of the old one, so it gets none of their messages."""
    worker = FakeWorker(tmp_path / "w.ipc")
    connected: list[bool] = []
    connection = Connection(
        worker.url,
        on_connected=lambda: connected.append(True),
        on_lost=lambda: connected.append(False),
        on_message=lambda _message, _payload: None,
    )
    # The worker comes later: a handshake may be over before the connection watches for it.
    with worker:
        await becomes(lambda: connected == [True])
        connection._unsent.append(Cancel(id="old"))
        worker.stop()
        await becomes(lambda: connected == [True, False])
        worker.restart("boot-2")
        await becomes(lambda: connected == [True, False, True])
        connection.send_kept()
        connection.send_or_keep(Cancel(id="new"))
        await becomes(lambda: worker.of(Cancel))
        assert [cancel.id for cancel in worker.of(Cancel)] == ["new"]
        await connection.close()
