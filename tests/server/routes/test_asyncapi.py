"""/asyncapi.json describes every WebSocket, and every message that one sends."""

from typing import Any

import httpx
from litestar.handlers import WebsocketRouteHandler

from server.app import create_app
from shared.settings import Settings
from tests.server.running import SHARED_LOOP
from tests.server.sockets import STREAM, talk

pytestmark = SHARED_LOOP


def references(value: Any) -> set[str]:
    """All references in a part of the document."""
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(references(part) for part in value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


async def test_every_reference_leads_somewhere(client: httpx.AsyncClient) -> None:
    """And the version is the one that tools know."""
    document = (await client.get("/asyncapi.json")).json()
    assert document["asyncapi"] == "3.0.0"
    for reference in references(document):
        part = document
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]
        assert part


async def test_every_socket_is_described(client: httpx.AsyncClient) -> None:
    """By its path, with the messages of both sides."""
    document = (await client.get("/asyncapi.json")).json()
    app = create_app(Settings(worker_url="ipc:///none")).app
    paths = {
        route.path.replace(":str", "")
        for route in app.routes
        if isinstance(getattr(route, "route_handler", None), WebsocketRouteHandler)
    }
    assert {channel["address"] for channel in document["channels"].values()} == paths
    assert len(document["operations"]) == 2 * len(paths)


async def test_what_a_socket_sends_is_described(client: httpx.AsyncClient) -> None:
    """The fields of its messages are those of the schema of their type."""
    document = (await client.get("/asyncapi.json")).json()
    async with talk(client, STREAM) as socket:
        words = {"type": "input.text", "text": "Hello."}
        config = {"type": "session.config", "response_format": "pcm"}
        await socket.say(config, "{", words, {"type": "input.done"}, words, {"type": "input.commit"})
        heard = await socket.until("input.committed")
    names = document["channels"]["v1_audio_speech_stream"]["messages"].keys() & document["components"]["schemas"].keys()
    schemas = [document["components"]["schemas"][name] for name in names - {"SessionConfig"}]
    by_type = {schema["properties"]["type"]["enum"][0]: schema for schema in schemas}
    for message in heard:
        if isinstance(message, dict):
            assert message.keys() == by_type[message["type"]]["properties"].keys()
