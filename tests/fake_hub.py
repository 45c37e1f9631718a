"""A Hugging Face hub on the loopback: lists and serves the files of one directory, and records the downloads."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves `directory` as the repository `hf_id`.

    `refuse`: names that answer 403; `sizes`: sizes in the listing that replace the true ones.
    `fetched`: names of the sent files, in order.
    """

    def __init__(self, hf_id: str, directory: Path) -> None:
        self.hf_id = hf_id
        self.directory = directory
        self.refuse: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, with_body=False)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the base class's own name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        """Start serving."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = request.path.partition("?")[0]
        if path.startswith(f"/api/models/{self.hf_id}"):
            _send(request, 200, json.dumps(self._listing()).encode(), {}, with_body=with_body)
            return
        name = path.partition("/resolve/")[2].partition("/")[2]
        file = self.directory / name
        if not path.startswith(f"/{self.hf_id}/resolve/") or not file.is_file():
            _send(request, 404, b"", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
        elif name in self.refuse:
            _send(request, 403, b"", {}, with_body=with_body)
        else:
            body = file.read_bytes()
            if with_body:
                self.fetched.append(name)
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            _send(request, 200, body, headers, with_body=with_body)

    def _listing(self) -> dict[str, Any]:
        files = [file for file in sorted(self.directory.rglob("*")) if file.is_file()]
        names = [str(file.relative_to(self.directory)) for file in files]
        sizes = {name: file.stat().st_size for name, file in zip(names, files, strict=True)} | self.sizes
        siblings = [{"rfilename": name, "size": sizes[name]} for name in names]
        return {"id": self.hf_id, "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}


def _send(
    request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], *, with_body: bool
) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if with_body:
        request.wfile.write(body)
