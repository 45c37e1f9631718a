"""The health probe."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from gpu_worker.health import check
from shared.protocol import VERSION, Failed, Hello, Message, Welcome, decode_from_web, encode
from shared.sockets import bind_router
from tests.fakes import a_snapshot


def _check(path: Path, answer: Callable[[Any], list[bytes]]) -> str | None:
    """The result of `check` if the worker answers the first message with `answer`."""
    url = f"ipc://{path}/worker.ipc"
    context: zmq.Context[Any] = zmq.Context()
    router = bind_router(context, url)

    def serve() -> None:
        peer, *frames = router.recv_multipart()
        router.send_multipart([peer, *answer(decode_from_web(frames)[0])])

    server = threading.Thread(target=serve)
    server.start()
    try:
        return check(url, "the token", timeout_s=5)
    finally:
        server.join()
        router.close()
        context.term()


def _welcome() -> Message:
    return Welcome(version=VERSION, boot_id="b", catalog=[], snapshot=a_snapshot([]))


def test_alive(tmp_path: Path) -> None:
    """A Welcome means alive; the Hello carries the version and the token."""
    received: list[Any] = []

    def answer(message: Any) -> list[bytes]:
        received.append(message)
        return encode(_welcome())

    assert _check(tmp_path, answer) is None
    assert received == [Hello(version=VERSION, token="the token")]  # noqa: S106 -- not a secret


def test_refused(tmp_path: Path) -> None:
    """The message of a Failed is the problem."""
    failed = encode(Failed(id="", code="wrong_token", message="TTS_WORKER_TOKEN differs"))
    assert _check(tmp_path, lambda _: failed) == "TTS_WORKER_TOKEN differs"


def test_another_protocol(tmp_path: Path) -> None:
    """An answer of another protocol is named as such."""
    problem = _check(tmp_path, lambda _: [b"HTTP/1.1 400 Bad Request"])
    assert problem is not None
    assert "not a message" in problem


def test_no_worker(tmp_path: Path) -> None:
    """No process listens at the address."""
    url = f"ipc://{tmp_path}/worker.ipc"
    assert check(url, "", timeout_s=0.2) == f"no worker listens at {url}"


def test_silent(tmp_path: Path) -> None:
    """A worker whose loop hangs is not alive, though its socket takes the message."""
    url = f"ipc://{tmp_path}/worker.ipc"
    context: zmq.Context[Any] = zmq.Context()
    router = bind_router(context, url)
    problem = check(url, "", timeout_s=0.3)
    router.close()
    context.term()
    assert problem is not None
    assert problem.startswith(f"no answer from {url} within")
