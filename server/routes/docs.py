"""/openapi.json and the two pages that show it, with every script served from here.

The pages' Content-Security-Policy lets them load nothing from anywhere else.
"""

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
from server.schemas import ALIASES, SpeechRequest
from server.version import VERSION

_STATIC: Final = Path(__file__).resolve().parent.parent / "web"
_SERVED: Final = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "swagger-start.js": "text/javascript",
    "redoc.standalone.js": "text/javascript",
}
_POLICY: Final = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_EVENT: Final = {
    "type": "object",
    "properties": {
        "data": {
            "type": "string",
            "description": "JSON of type speech.audio.delta, speech.audio.done or speech.audio.error.",
        }
    },
}
_DESCRIPTION: Final = """\
Speech from text, compatible with OpenAI's `POST /v1/audio/speech`.

Every error has OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
"""


class _SwaggerPage(OpenAPIRenderPlugin):
    """Swagger UI at the root of Litestar's own router for such pages."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The page; the schema is fetched by its script."""
        _ = request, openapi_schema
        return _page("swagger.html")


def openapi_config(title: str) -> OpenAPIConfig:
    """What Litestar is told about the OpenAPI, and where it serves Swagger UI."""
    return OpenAPIConfig(
        title=title,
        version=VERSION,
        description=_DESCRIPTION,
        use_handler_docstrings=True,
        render_plugins=[_SwaggerPage()],
        openapi_router=Router("/docs", route_handlers=[], include_in_schema=False, after_request=_refine),
        components=Components(
            security_schemes={
                "apiKey": SecurityScheme(type="http", scheme="bearer", description="If keys are configured.")
            }
        ),
        security=[{}, {"apiKey": []}],
        tags=[
            Tag(name="Speech", description="Text in, audio out."),
            Tag(name="Voices", description="What to speak with, and voices of one's own."),
            Tag(name="Models", description="What there is to speak with."),
            Tag(name="Service", description="Is it there, is it well?"),
            Tag(name="Admin", description="What it does and holds; with keys configured, for admin keys only."),
        ],
    )


@get("/openapi.json", include_in_schema=False)
async def openapi_json(request: Request[Any, Any, Any]) -> dict[str, Any]:
    """The OpenAPI document."""
    return openapi_document(request.app)


def openapi_document(app: Litestar) -> dict[str, Any]:
    """What Litestar makes of the handlers, with the things that it cannot know.

    The limits inside optional fields, which its own schema of a Struct leaves out (msgspec's has them),
    the limit of the text, which is a setting, the names that other servers have for fields, the format that null means,
    and that an answer of speech comes in six formats or as events.
    """
    document = app.openapi_schema.to_schema()
    _, components = msgspec.json.schema_components([SpeechRequest], ref_template="#/components/schemas/{name}")
    document["components"]["schemas"].update(components)
    _complete(document["components"]["schemas"]["SpeechRequest"], app.state.settings.max_input_chars)
    sound = {"schema": {"type": "string", "format": "binary"}}
    content = dict.fromkeys(CONTENT_TYPES.values(), sound) | {"text/event-stream": {"schema": _EVENT}}
    document["paths"]["/v1/audio/speech"]["post"]["responses"]["200"] = {
        "description": "The speech, in `response_format` (mp3 by default) or as server-sent events.",
        "content": content,
    }
    return document


def _complete(speech: dict[str, Any], max_input_chars: int) -> None:
    """What the schema of a request for speech does not say by itself."""
    fields = speech["properties"]
    fields["input"]["maxLength"] = max_input_chars
    fields["response_format"]["default"] = "mp3"
    for alias, field in ALIASES.items():
        fields[alias] = fields[field] | {"description": f"The same as `{field}`, where that is missing."}
    del speech["required"]
    speech["anyOf"] = [{"required": ["input"]}, {"required": ["text"]}]


@get("/redoc", include_in_schema=False, media_type="text/html")
async def redoc() -> Response[bytes]:
    """ReDoc."""
    return Response(_page("redoc.html"), media_type="text/html", headers={"Content-Security-Policy": _POLICY})


@get("/docs/static/{name:str}", include_in_schema=False, sync_to_thread=True)
def static_file(name: FromPath[str]) -> Response[bytes]:
    """One of the files that the pages need, and no other."""
    if name not in _SERVED:
        raise NotFoundException
    return Response(_page(name), media_type=_SERVED[name], headers={"Cache-Control": "public, max-age=86400"})


def _refine(response: Response[Any]) -> Response[Any]:
    """Litestar answers an unknown page below /docs in HTML of its own; here it is a 404 like any other."""
    if response.status_code == 404:  # noqa: PLR2004 - Not Found
        raise NotFoundException
    response.headers["Content-Security-Policy"] = _POLICY
    return response


def _page(name: str) -> bytes:
    return (_STATIC / name).read_bytes()
