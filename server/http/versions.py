"""The versions of the API: each is a package of server/routes, and its paths begin with /v and its number.

ElevenLabs' API has versions of its own (/v2/voices), which its routes follow.
"""

import re
from typing import Final

from litestar.datastructures import Headers

from server.http.errors import ApiError

API_VERSION: Final = "1"
"""The only one. A client may ask for it in the header VERSION_HEADER, and every answer has it there."""

VERSION_HEADER: Final = "x-api-version"

_VERSIONED: Final = re.compile(r"/v(\d{1,3})(?:/|\Z)")
_ONLY: Final = f"the only version of this API is {API_VERSION}, and its paths begin with /v{API_VERSION}"


def refuse_other_version(headers: Headers) -> ApiError | None:
    """The error for a request whose header asks for a version that there is not."""
    asked = headers.get(VERSION_HEADER, "").strip().lower().removeprefix("v")
    if asked in {"", API_VERSION}:
        return None
    return ApiError("not_found", f"{VERSION_HEADER}: {_ONLY}.", param=VERSION_HEADER)


def version_hint(path: str) -> str | None:
    """The hint for a path that leads nowhere but begins with another version; None for other paths."""
    found = _VERSIONED.match(path)
    return None if found is None or found[1] == API_VERSION else _ONLY
