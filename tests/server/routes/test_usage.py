"""GET /admin/usage: the days that are asked for, as JSON and as CSV."""

from datetime import UTC, date, datetime, timedelta

import httpx
import pytest

from shared.protocol import Call, FindUsage, Reply, UsageRow
from tests.fakes import FakeWorker
from tests.server.running import SHARED_LOOP, Serve

pytestmark = SHARED_LOOP

ROW = UsageRow(date(2026, 11, 29), "alice", "espeak-ng", 4, 80, 2.00004, 1, 0, 2)


def _answer_with(worker: FakeWorker, *rows: UsageRow, has_more: bool = False) -> None:
    worker.on_call = lambda call, _payload: Reply(id=call.id, usage=list(rows), has_more=has_more)


def _asked(worker: FakeWorker) -> list[FindUsage]:
    return [call.action for call in worker.of(Call) if isinstance(call.action, FindUsage)]


async def test_json(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """A row is an object; the worker is asked for the days."""
    _answer_with(worker, ROW, has_more=True)
    answer = await client.get("/admin/usage?from=2026-11-01&to=2026-11-30")
    assert answer.json() == {
        "object": "list",
        "since": "2026-11-01",
        "until": "2026-11-30",
        "data": [
            {
                "date": "2026-11-29",
                "key": "alice",
                "model": "espeak-ng",
                "requests": 4,
                "characters": 80,
                "audio_seconds": 2.0,
                "refusals": 1,
                "failed": 0,
                "cancelled": 2,
            }
        ],
        "has_more": True,
    }
    assert _asked(worker) == [FindUsage(since=date(2026, 11, 1), until=date(2026, 11, 30))]


@pytest.mark.parametrize("accept", ["text/csv", "text/csv; charset=utf-8", "application/json;q=0.5, text/csv"])
async def test_csv(client: httpx.AsyncClient, worker: FakeWorker, accept: str) -> None:
    """The same as a table."""
    _answer_with(worker, ROW)
    answer = await client.get("/admin/usage?from=2026-11-01&to=2026-11-30", headers={"accept": accept})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert 'filename="usage-2026-11-01-2026-11-30.csv"' in answer.headers["content-disposition"]
    assert answer.text == (
        "date,key,model,requests,characters,audio_seconds,refusals,failed,cancelled\r\n"
        "2026-11-29,alice,espeak-ng,4,80,2.0,1,0,2\r\n"
    )


async def test_a_table_that_would_lack_its_end(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """It is refused: JSON can say that there is more, and a table cannot."""
    _answer_with(worker, ROW, has_more=True)
    answer = await client.get("/admin/usage", headers={"accept": "text/csv"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", "from")
    assert "ask for fewer days" in error["message"]


async def test_the_last_thirty_days(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    """Without days, up to today; with the last one, up to that."""
    _answer_with(worker)
    days = {datetime.now(UTC).date()}
    await client.get("/admin/usage")
    days.add(datetime.now(UTC).date())
    await client.get("/admin/usage?to=0001-01-05")
    first, second = _asked(worker)
    assert first.until in days
    assert first.since == first.until - timedelta(days=29)
    assert second == FindUsage(since=date.min, until=date(1, 1, 5))


@pytest.mark.parametrize(
    ("query", "param"), [("from=2026-11-30&to=2026-11-29", "from"), ("from=soon", "from"), ("to=2026-02-30", "to")]
)
async def test_wrong_days(client: httpx.AsyncClient, worker: FakeWorker, query: str, param: str) -> None:
    """The error names the wrong one."""
    answer = await client.get(f"/admin/usage?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not _asked(worker)


async def test_admins_only(serve: Serve) -> None:
    """Only admins see the usage of all keys."""
    client = await serve(api_keys=["user-1", "user-2"], admin_keys=["boss"])
    for key, status in (("user-1", 403), ("wrong", 401), ("boss", 200)):
        answer = await client.get("/admin/usage", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code in {status, 400 if status == 200 else status}
