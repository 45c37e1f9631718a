"""GET /asyncapi.json: the WebSockets and their messages, as an AsyncAPI 3.0 document; /openapi.json cannot have them.

The schemas are those of the Structs that the sockets read and write.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import msgspec
from litestar import Response, get

from server.routes.elevenlabs_websocket import ContextInput, StreamError, StreamInput, StreamOutput
from server.routes.v1.nari_websocket import (
    InputTextAck,
    RequestConfigured,
    RequestStart,
    ResponseDone,
    ResponseError,
    ResponseStarted,
    SessionCreated,
)
from server.routes.v1.speech_websocket import (
    AudioDone,
    AudioStart,
    InputCancelled,
    InputCommitted,
    SessionConfig,
    SessionConfigured,
    SessionDone,
    SocketError,
)
from server.version import VERSION

Message = type | Mapping[str, Any]
"""A Struct, or the schema of a message that has none."""


def _event(kind: str, **fields: Any) -> dict[str, Any]:
    """The schema of a message of the client with that type."""
    properties = {"type": {"const": kind}, **fields}
    return {"title": kind, "type": "object", "properties": properties, "required": list(properties)}


_TEXT: Final = {"type": "string"}
_SEQUENCE: Final = {"type": "integer", "minimum": 0, "description": "0, and one more with each message of the input."}
_AUDIO: Final = {"title": "audio", "type": "string", "format": "binary", "description": "A binary frame."}

_KINDS: Final[dict[type, str]] = {SessionConfig: "session.config", RequestStart: "request.start"}
"""The types of messages whose Structs have none."""

_CHANNELS: Final[dict[str, tuple[str, list[Message], list[Message]]]] = {
    "/v1/audio/speech/stream": (
        "Text in as it is written, audio out as it is made.",
        [
            SessionConfig,
            _event("input.text", text=_TEXT),
            *(_event(kind) for kind in ("input.commit", "input.done", "input.cancel", "session.close")),
        ],
        [SessionConfigured, AudioStart, _AUDIO, AudioDone, InputCommitted, SessionDone, InputCancelled, SocketError],
    ),
    "/v1/audio/speech/ws": (
        "One text, as pcm: the subprotocol nari.speech.v1.",
        [
            RequestStart,
            _event("input_text.append", sequence=_SEQUENCE, text=_TEXT),
            _event("input_text.end", sequence=_SEQUENCE),
            _event("response.cancel"),
        ],
        [SessionCreated, RequestConfigured, InputTextAck, ResponseStarted, _AUDIO, ResponseDone, ResponseError],
    ),
    "/v1/text-to-speech/{voice_id}/stream-input": (
        "ElevenLabs: one text in pieces.",
        [StreamInput],
        [StreamOutput, StreamError],
    ),
    "/v1/text-to-speech/{voice_id}/multi-stream-input": (
        "ElevenLabs: several texts in pieces, each with a context_id.",
        [ContextInput],
        [StreamOutput, StreamError],
    ),
}
"""By path: what it is for, the messages of the client, and ours."""


@get("/asyncapi.json", include_in_schema=False)
async def asyncapi_json() -> Response[dict[str, Any]]:
    """The document."""
    return Response(_document())


@cache
def _document() -> dict[str, Any]:
    structs = [message for _, ours, theirs in _CHANNELS.values() for message in (*ours, *theirs)]
    _, schemas = msgspec.json.schema_components(
        list(dict.fromkeys(one for one in structs if isinstance(one, type))), ref_template="#/components/schemas/{name}"
    )
    channels, operations, messages = {}, {}, {}
    for path, (summary, received, sent) in _CHANNELS.items():
        name = path.strip("/").replace("/", "_").replace("{", "").replace("}", "")
        parameters = {"voice_id": {"description": "A voice's id or name."}} if "{voice_id}" in path else {}
        channel: dict[str, Any] = {"address": path, "description": summary, "parameters": parameters, "messages": {}}
        for action, listed in (("receive", received), ("send", sent)):
            for message in listed:
                title, payload = _named(message)
                messages[title] = {"name": title, "payload": payload}
                channel["messages"][title] = {"$ref": f"#/components/messages/{title}"}
            operations[f"{action}_{name}"] = {
                "action": action,
                "channel": {"$ref": f"#/channels/{name}"},
                "messages": [{"$ref": f"#/channels/{name}/messages/{_named(message)[0]}"} for message in listed],
            }
        channels[name] = channel
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "WebSockets", "version": VERSION},
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": schemas},
    }


def _named(message: Message) -> tuple[str, dict[str, Any]]:
    """The name of a message, and the schema of its payload."""
    if not isinstance(message, type):
        return message["title"], dict(message)
    payload: dict[str, Any] = {"$ref": f"#/components/schemas/{message.__name__}"}
    if kind := _KINDS.get(message):
        payload = {"allOf": [payload, _event(kind)]}
    return message.__name__, payload
