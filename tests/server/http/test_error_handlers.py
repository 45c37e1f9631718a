"""The contract with Litestar: the sentences by which error_handlers.py tells Litestar's own errors apart."""

from typing import Annotated, Any

import litestar
import msgspec
import pytest
from litestar import Request, post
from litestar.datastructures import UploadFile
from litestar.enums import RequestEncodingType
from litestar.exceptions import InternalServerException
from litestar.params import Body
from litestar.testing import TestClient

from server.http.error_handlers import BODY_INCOMPLETE, NOT_A_FILE, TOO_MANY_PARTS


class Form(msgspec.Struct):
    """A form with a file."""

    file: UploadFile


@post("/")
async def take(data: Annotated[Form, Body(media_type=RequestEncodingType.MULTI_PART)]) -> None:
    """Take a form."""


def _changed(actual: object) -> str:
    version = litestar.__version__.formatted()
    return f"Litestar {version} has another sentence than server/http/error_handlers.py expects: {actual!r}"


async def test_a_body_that_ends_too_early() -> None:
    """Litestar raises a server error with this sentence if the client disconnects within a body."""

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    @post("/")
    async def read(request: Request[Any, Any, Any]) -> None:
        with pytest.raises(InternalServerException) as caught:
            await request.body()
        details.append(caught.value.detail)

    async def send(_message: Any) -> None:
        pass

    details: list[str] = []
    scope: Any = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    await litestar.Litestar([read])(scope, receive, send)
    assert details == [BODY_INCOMPLETE], _changed(details)


def test_a_form_of_too_many_parts() -> None:
    """Litestar answers 400 with this sentence."""
    with TestClient(litestar.Litestar([take])) as client:
        answer = client.post("/", files={f"part-{number}": b"x" for number in range(1_200)})
    assert (answer.status_code, answer.json()["detail"]) == (400, TOO_MANY_PARTS), _changed(answer.json())


def test_text_in_the_place_of_a_file() -> None:
    """Litestar names the field as `key`, and its message begins with these words."""
    with TestClient(litestar.Litestar([take])) as client:
        answer = client.post("/", files={"file": (None, b"x")})
    [problem] = answer.json()["extra"]
    assert problem["key"] == "file", _changed(problem)
    assert problem["message"].startswith(NOT_A_FILE), _changed(problem)
