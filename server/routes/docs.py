"""/openapi.json and the two pages that show it, Swagger UI at /docs and ReDoc at /redoc.

The pages and their libraries are served from server/web; the pages' Content-Security-Policy allows no other origin.
Every URL in a page and in the document is relative, so both work below a path that only the proxy in front knows.
"""

import threading
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
from litestar import Litestar, Request, Response, Router, get
from litestar.exceptions import NotFoundException
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Tag
from litestar.params import FromPath

from server.audio import CONTENT_TYPES
from server.http.forwarded import client_view
from server.schemas import ALIASES, SpeechRequest
from server.version import VERSION
from shared.settings import Settings

_WEB: Final = Path(__file__).resolve().parent.parent / "web"
_STATIC_FILES: Final = {
    path.name: path
    for path in (
        _WEB / "docs" / "swagger-start.js",
        _WEB / "vendor" / "swagger-ui-bundle.js",
        _WEB / "vendor" / "swagger-ui.css",
        _WEB / "vendor" / "redoc.standalone.js",
    )
}
_MEDIA_TYPES: Final = {".js": "text/javascript", ".css": "text/css"}
_POLICY: Final = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "worker-src 'self' blob:; media-src 'self' blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_EVENT: Final = {
    "type": "object",
    "properties": {
        "data": {
            "type": "string",
            "description": "JSON of type speech.audio.delta, speech.audio.done or speech.audio.error. "
            "After speech.audio.error the transfer breaks, so that no client takes the part for the whole.",
        }
    },
}
_STATE_EVENT: Final = {
    "type": "object",
    "properties": {
        "data": {
            "type": "string",
            "description": "JSON with `time`, `problem` (null while the GPU worker answers), and `stats`, `vram`, "
            "`performance`, `cleanup` as the operations of these names answer.",
        }
    },
}
_DESCRIPTION: Final = """\
Speech from text, compatible with OpenAI's `POST /v1/audio/speech`.

Every error has OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
What the HTTP layer itself refuses has only a status: 400 for a malformed request line, header or body length,
414 for a URI above 64 KiB, 431 for more than 100 headers or 128 KiB of them, and 400 with a line of plain text
for a WebSocket handshake without its key or version.

This is version 1 of the API: every answer says so in `x-api-version`, and a request that asks for another version, by
its path or in that header, is a 404.
"""


class _SwaggerPage(OpenAPIRenderPlugin):
    """Swagger UI at the root of Litestar's own router for documentation pages."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The page; its script fetches the OpenAPI document."""
        _ = openapi_schema
        return _page("swagger.html", request)


def openapi_config(title: str) -> OpenAPIConfig:
    """Litestar's OpenAPI settings, with Swagger UI at /docs."""
    return OpenAPIConfig(
        title=title,
        version=VERSION,
        description=_DESCRIPTION,
        use_handler_docstrings=True,
        render_plugins=[_SwaggerPage()],
        openapi_router=Router("/docs", route_handlers=[], include_in_schema=False, after_request=_finish_docs_response),
        components=Components(
            security_schemes={
                "apiKey": SecurityScheme(type="http", scheme="bearer", description="Only if keys are configured.")
            }
        ),
        security=[{}, {"apiKey": []}],
        tags=[
            Tag(name="Speech", description="Text in, audio out."),
            Tag(name="ElevenLabs", description="The same for ElevenLabs' clients."),
            Tag(name="Voices", description="Preset voices, and saved voices: list, make and delete them."),
            Tag(name="Models", description="The models that can speak."),
            Tag(name="Service", description="Is the service running, and is it ready?"),
            Tag(
                name="Admin",
                description="Settings, figures and models in memory. If keys are configured, only "
                "an admin key may call these.",
            ),
        ],
    )


@get("/openapi.json", include_in_schema=False, sync_to_thread=True)
def openapi_json(request: Request[Any, Any, Any]) -> dict[str, Any]:
    """The OpenAPI document. It takes 0.3 s to build, beside the event loop, so it is kept until a reload changes it."""
    state = request.app.state
    settings: Settings = state.settings
    with _BUILDING:
        limit, document = state.get("openapi_document", (None, {}))
        if limit != settings.max_input_chars:
            document = openapi_document(request.app, settings.max_input_chars)
            state.openapi_document = settings.max_input_chars, document
    view = client_view(settings, request.scope)
    # The path is relative to the document's own URL.
    return {**document, "servers": [{"url": view.url() or "."}]}


_BUILDING: Final = threading.Lock()
_AUDIO_OPERATIONS: Final = {"elevenlabsConvert", "elevenlabsStream", "getStoredAudio"}


def openapi_document(app: Litestar, max_input_chars: int) -> dict[str, Any]:
    """Litestar's OpenAPI document, completed.

    Litestar's schema of a Struct lacks the limits inside optional fields, which msgspec's schema has.
    It cannot know the limit of the text (a setting), the aliases of fields, the default format,
    and that a speech response has one of several formats or is a stream of events.
    """
    document = app.openapi_schema.to_schema()
    _, components = msgspec.json.schema_components([SpeechRequest], ref_template="#/components/schemas/{name}")
    document["components"]["schemas"].update(components)
    _complete(document["components"]["schemas"]["SpeechRequest"], max_input_chars)
    binary = {"schema": {"type": "string", "format": "binary"}}
    audio = dict.fromkeys(CONTENT_TYPES.values(), binary)
    document["paths"]["/v1/audio/speech"]["post"]["responses"]["200"] = {
        "description": "The speech, in `response_format` (mp3 by default) or as server-sent events.",
        "content": audio | {"text/event-stream": {"schema": _EVENT}},
    }
    document["paths"]["/"]["get"]["responses"]["200"] = {
        "description": "JSON, or for browsers the page.",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Root"}},
            "text/html": {"schema": {"type": "string"}},
        },
    }
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        if operation["operationId"] in _AUDIO_OPERATIONS:
            operation["responses"]["200"] = {"description": "The audio.", "content": audio}
    content = document["paths"]["/admin/events"]["get"]["responses"]["200"]["content"]
    content.clear()
    content["text/event-stream"] = {"schema": _STATE_EVENT}
    captioned = document["paths"]["/dev/captioned_speech"]["post"]["responses"]["200"]["content"]
    captioned["application/x-ndjson"] = captioned["application/json"]
    return document


def _complete(speech: dict[str, Any], max_input_chars: int) -> None:
    """Add to the schema of SpeechRequest the facts that its annotations lack."""
    fields = speech["properties"]
    fields["input"]["maxLength"] = max_input_chars
    fields["response_format"]["default"] = "mp3"
    for alias, field in ALIASES.items():
        fields[alias] = fields[field] | {"description": f"Another name of `{field}`; counts if `{field}` is missing."}
    del speech["required"]
    speech["anyOf"] = [{"required": ["input"]}, {"required": ["text"]}]


@get("/redoc", include_in_schema=False, media_type="text/html")
async def redoc(request: Request[Any, Any, Any]) -> Response[bytes]:
    """The ReDoc page."""
    page = _page("redoc.html", request)
    return Response(page, media_type="text/html", headers={"Content-Security-Policy": _POLICY})


def _page(name: str, request: Request[Any, Any, Any]) -> bytes:
    """A page whose URLs are relative to the path at which the client has asked for the page."""
    # Litestar removes the slash from the path.
    to_root = b"../" if request.scope["raw_path"].endswith(b"/") else b""
    return (_WEB / "docs" / name).read_bytes().replace(b"{to_root}", to_root)


@get("/docs/static/{name:str}", include_in_schema=False, sync_to_thread=True)
def static_file(name: FromPath[str]) -> Response[bytes]:
    """One of the files that the pages load, and no other."""
    path = _STATIC_FILES.get(name)
    if path is None:
        raise NotFoundException
    headers = {"Cache-Control": "public, max-age=86400"}
    return Response(_read(path), media_type=_MEDIA_TYPES[path.suffix], headers=headers)


@cache
def _read(path: Path) -> bytes:
    """A file of `_STATIC_FILES`; any number of responses share its bytes."""
    return path.read_bytes()


def _finish_docs_response(response: Response[Any]) -> Response[Any]:
    """Add the policy to a page; turn Litestar's own HTML answer for unknown pages below /docs into a usual 404."""
    if response.status_code == 404:  # noqa: PLR2004 - Not Found
        raise NotFoundException
    response.headers["Content-Security-Policy"] = _POLICY
    return response
