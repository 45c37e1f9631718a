"""/openapi.json and the pages that show it."""

import re
from urllib.parse import urljoin

import httpx
import pytest

from tests.server.running import SHARED_LOOP

pytestmark = SHARED_LOOP


@pytest.mark.parametrize("path", ["/docs", "/docs/", "/redoc", "/redoc/"])
async def test_pages_load_nothing_from_elsewhere(client: httpx.AsyncClient, path: str) -> None:
    """Every URL of a page is relative and leads to a file of ours; the page's policy allows no other origin."""
    answer = await client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "http" not in answer.text.replace("<!doctype html>", "")
    named = re.findall(r'(?:src|href|spec-url)="(?!data:)([^"]+)"', answer.text)
    assert named
    for url in named:
        assert not url.startswith("/")
        found = await client.get(urljoin(path, url))
        assert found.status_code == 200
        kinds = {"text/javascript", "text/css", "application/json"}
        assert found.headers["content-type"].split(";")[0] in kinds


async def test_swagger_finds_the_document_beside_docs(client: httpx.AsyncClient) -> None:
    """Its script names the document relative to itself, so that no prefix of a proxy is missing."""
    script = "/docs/static/swagger-start.js"
    (url,) = re.findall(r'new URL\("([^"]+)", document.currentScript.src\)', (await client.get(script)).text)
    assert urljoin("/tts" + script, url) == "/tts/openapi.json"


@pytest.mark.parametrize(
    ("headers", "url"),
    [
        ({}, "."),
        ({"x-forwarded-prefix": "/tts"}, "."),
        (
            {"x-forwarded-proto": "https", "x-forwarded-host": "a.example", "x-forwarded-prefix": "/tts"},
            "https://a.example/tts",
        ),
    ],
)
async def test_the_servers_of_the_document(client: httpx.AsyncClient, headers: dict[str, str], url: str) -> None:
    """The client's URL if the proxy has sent all of it, else a path relative to the document's own."""
    assert (await client.get("/openapi.json", headers=headers)).json()["servers"] == [{"url": url}]


async def test_openapi(client: httpx.AsyncClient) -> None:
    """Every operation has an id, a summary and errors of its shape; the limits of fields are in the schemas."""
    document = (await client.get("/openapi.json")).json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations) >= 19
    for operation in operations:
        assert operation["summary"]
        for status, answer in operation["responses"].items():
            if status != "200":
                schema = answer["content"]["application/json"]["schema"]
                shape = "ElevenLabsErrorBody" if operation["tags"] == ["ElevenLabs"] else "ErrorEnvelope"
                assert schema == {"$ref": f"#/components/schemas/{shape}"}
    fields = document["components"]["schemas"]["SpeechRequest"]["properties"]
    assert {"type": "number", "minimum": 0.25, "maximum": 4.0} in fields["speed"]["anyOf"]
    assert (fields["input"]["maxLength"], fields["response_format"]["default"]) == (4096, "mp3")
    either = document["components"]["schemas"]["SpeechRequest"]["anyOf"]
    assert either == [{"required": ["input"]}, {"required": ["text"]}]
    assert fields["text"]["maxLength"] == 4096
    spoken = document["paths"]["/v1/audio/speech"]["post"]["responses"]["200"]["content"]
    assert {"audio/mpeg", "audio/ogg", "audio/aac", "audio/flac", "audio/wav", "audio/pcm"} < spoken.keys()
