"""A fake service for the commands that need one."""

import http
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class CannedService:
    """Answers each path from `answers`: a status and a JSON value, or a list of bytes that are sent as chunks.

    A `None` among the chunks breaks the transfer off. The value of a 302 is its Location.
    `asked` has method, path, headers and JSON body.
    """

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                service.answer(self, None)

            def do_POST(self) -> None:
                service.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_arguments: object) -> None:
                """Quietly."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, body: Any) -> None:
        """Record the request and answer it."""
        self.asked.append((request.command, request.path, dict(request.headers), body))
        status, content = self.answers.get(request.path, (404, {"error": {"message": f"nothing at {request.path}"}}))
        request.send_response(status)
        if status == http.HTTPStatus.FOUND:
            request.send_header("Location", content)
        if isinstance(content, list):
            request.send_header("Transfer-Encoding", "chunked")
            request.end_headers()
            for chunk in content:
                if chunk is None:
                    request.close_connection = True
                    return
                request.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            request.wfile.write(b"0\r\n\r\n")
            return
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[CannedService]:
    """A fake service at TTS_PORT; the current folder is empty, without .env."""
    canned = CannedService()
    canned.thread.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTS_PORT", str(canned.server.server_port))
    yield canned
    canned.server.shutdown()
    canned.thread.join()
    canned.server.server_close()
