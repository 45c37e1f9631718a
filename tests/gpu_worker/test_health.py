"""Asking a worker whether it is alive."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from gpu_worker.health import check
from shared.protocol import VERSION, Failed, Hello, Message, Welcome, decode_from_web, encode
from shared.sockets import bind_router
from tests.fakes import a_snapshot


def _answered(path: Path, answer: Callable[[Any], list[bytes]]) -> str | None:
    """What `check` says of a worker that answers the first message like that."""
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
    """A worker that welcomes us is alive; it is asked with the version and the token."""
    heard: list[Any] = []

    def answer(message: Any) -> list[bytes]:
        heard.append(message)
        return encode(_welcome())

    assert _answered(tmp_path, answer) is None
    assert heard == [Hello(version=VERSION, token="the token")]  # noqa: S106 -- no secret of anybody's


def test_refused(tmp_path: Path) -> None:
    """What it says against us is what is wrong."""
    failed = encode(Failed(id="", code="wrong_token", message="TTS_WORKER_TOKEN differs"))
    assert _answered(tmp_path, lambda _: failed) == "TTS_WORKER_TOKEN differs"


def test_not_our_conversation(tmp_path: Path) -> None:
    """Something else at that address is said to be something else."""
    problem = _answered(tmp_path, lambda _: [b"HTTP/1.1 400 Bad Request"])
    assert problem is not None
    assert "not a message" in problem


def test_nobody(tmp_path: Path) -> None:
    """Nobody at that address."""
    url = f"ipc://{tmp_path}/worker.ipc"
    assert check(url, "", timeout_s=0.2) == f"nobody listens at {url}"


def test_silent(tmp_path: Path) -> None:
    """A worker whose loop hangs is no living worker, though its socket takes what we say."""
    url = f"ipc://{tmp_path}/worker.ipc"
    context: zmq.Context[Any] = zmq.Context()
    router = bind_router(context, url)
    problem = check(url, "", timeout_s=0.3)
    router.close()
    context.term()
    assert problem is not None
    assert problem.startswith(f"no answer from {url} within")
