"""GET /admin/usage: who has used how much, by day, API key and model, as JSON or CSV."""

import csv
import io
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Final

import msgspec
from litestar import MediaType, Request, Response, get
from litestar.params import QueryParameter

from server.dependencies import EngineDependency, SettingsDependency
from server.http.accept import preferred_type
from server.http.auth import client_of
from server.http.errors import ApiError, documented
from shared.protocol import FindUsage, UsageRow

DEFAULT_DAYS: Final = 30

_TIMEOUT_S: Final = 15.0


class UsageEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The use of one model by one key on one day, UTC. `key` is "" for all clients without one.

    `requests` were taken, `refusals` were not. `failed` and `cancelled` of the requests did not end well.
    """

    date: date
    key: str
    model: str
    requests: int
    characters: int
    audio_seconds: float
    refusals: int
    failed: int
    cancelled: int


class UsageList(msgspec.Struct, frozen=True, kw_only=True):
    """The entries from day `since` to day `until`, the latest first. `has_more`: ask for fewer days to see the rest."""

    object: str = "list"
    since: date
    until: date
    data: list[UsageEntry]
    has_more: bool


@get(
    "/usage",
    operation_id="getUsage",
    summary="Get who has used how much",
    description="By day, API key and model. `Accept: text/csv` gives a whole table for a spreadsheet.",
    tags=["Admin"],
    responses=documented(400, 401, 403, 500, 503),
)
async def get_usage(
    request: Request[Any, Any, Any],
    engine: EngineDependency,
    settings: SettingsDependency,
    since: Annotated[date | None, QueryParameter(name="from", description="The first day, UTC.")] = None,
    until: Annotated[date | None, QueryParameter(name="to", description="The last day, UTC; today if absent.")] = None,
) -> Response[UsageList] | Response[str]:
    """The use from one day to another, by default in the last 30 days."""
    until = until or datetime.now(UTC).date()
    since = since or max(date.min, until - timedelta(days=min(DEFAULT_DAYS - 1, until.toordinal() - 1)))
    if since > until:
        raise ApiError("invalid_value", "from: must not be later than to.", param="from")
    find = FindUsage(since=since, until=until)
    reply = await engine.call(find, client=client_of(settings, request), timeout_s=_TIMEOUT_S)
    entries = [_entry(row) for row in reply.usage]
    if preferred_type(request.headers, ["application/json", "text/csv"]) == "text/csv":
        if reply.has_more:  # a table cannot say that it lacks its end, and a bill would be made of it
            message = f"from: more than {len(entries)} rows are too many for one table; ask for fewer days."
            raise ApiError("invalid_value", message, param="from")
        headers = {"content-disposition": f'attachment; filename="usage-{since}-{until}.csv"'}
        return Response(_table(entries), media_type="text/csv", headers=headers)
    found = UsageList(since=since, until=until, data=entries, has_more=reply.has_more)
    return Response(found, media_type=MediaType.JSON)


def _entry(row: UsageRow) -> UsageEntry:
    return UsageEntry(
        date=row.date,
        key=row.key,
        model=row.model,
        requests=row.requests,
        characters=row.characters,
        audio_seconds=round(row.audio_s, 3),
        refusals=row.refused,
        failed=row.failed,
        cancelled=row.cancelled,
    )


def _table(entries: list[UsageEntry]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(UsageEntry.__struct_fields__)
    writer.writerows(msgspec.structs.astuple(entry) for entry in entries)
    return text.getvalue()
