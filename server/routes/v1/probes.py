"""/v1/test and /v1/readyz: how clients find out what kind of server this is."""

from typing import Any

from litestar import get
from litestar.exceptions import NotFoundException

from server.http.errors import documented
from server.schemas import Status


@get(
    "/test",
    operation_id="getTest",
    summary="Answer the probe of wyoming-openai",
    tags=["Service"],
    responses=documented(401, 403, 500),
)
async def test() -> Status:
    """Always ok."""
    return Status()


@get("/readyz", include_in_schema=False)
async def readyz() -> Any:
    """Always 404: some clients take a server that answers here for another product."""
    raise NotFoundException
