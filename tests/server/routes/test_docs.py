"""/openapi.json and the pages that show it."""

import httpx
import pytest

from tests.server.running import SHARED_LOOP

pytestmark = SHARED_LOOP


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_pages_load_nothing_from_elsewhere(client: httpx.AsyncClient, path: str) -> None:
    """The server serves every script and style sheet of a page, and the page's policy allows no other origin."""
    answer = await client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "http" not in answer.text.replace("<!doctype html>", "")
    names = [part.split('"')[0] for part in answer.text.split('"/docs/static/')[1:]]
    assert names
    for name in names:
        script = await client.get(f"/docs/static/{name}")
        assert script.status_code == 200
        assert script.headers["content-type"].split(";")[0] in {"text/javascript", "text/css"}


async def test_openapi(client: httpx.AsyncClient) -> None:
    """Every operation has an id, a summary and errors of OpenAI's shape; the limits of fields are in the schemas."""
    document = (await client.get("/openapi.json")).json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations) >= 19
    for operation in operations:
        assert operation["summary"]
        for status, answer in operation["responses"].items():
            if status != "200":
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}
    fields = document["components"]["schemas"]["SpeechRequest"]["properties"]
    assert {"type": "number", "minimum": 0.25, "maximum": 4.0} in fields["speed"]["anyOf"]
    assert (fields["input"]["maxLength"], fields["response_format"]["default"]) == (4096, "mp3")
    either = document["components"]["schemas"]["SpeechRequest"]["anyOf"]
    assert either == [{"required": ["input"]}, {"required": ["text"]}]
    assert fields["text"]["maxLength"] == 4096
    spoken = document["paths"]["/v1/audio/speech"]["post"]["responses"]["200"]["content"]
    assert {"audio/mpeg", "audio/ogg", "audio/aac", "audio/flac", "audio/wav", "audio/pcm"} < spoken.keys()
