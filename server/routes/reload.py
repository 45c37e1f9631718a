"""POST /admin/reload: the settings are read anew, as at SIGHUP."""

from typing import Final

import msgspec
from litestar import post
from litestar.datastructures import State

from server.http.errors import ApiError, documented
from server.reload import AskReload
from shared.settings_reload import LIVE_VARIABLES

_DESCRIPTION: Final = (
    "Reads `.env`, the file of keys and that of pronunciations again, as the signal SIGHUP does. "
    "Every process has the new settings before the answer comes; no request and no stream ends for it. "
    "A mistake changes nothing, and the answer names all of them. "
    f"A reload takes {', '.join(f'`{name}`' for name in sorted(LIVE_VARIABLES))}; every other setting needs a restart. "
    "A renewed certificate at the same paths is served by new web workers; the old ones end with their connections. "
    "In a cluster, settings come with a deployment: there it is a 404."
)


class ReloadReport(msgspec.Struct, frozen=True, kw_only=True):
    """Variables: those that hold from now on, and those that have changed and keep their old value until a restart.

    The name of a file stands for its contents, too.
    """

    changed: list[str]
    needs_restart: list[str]


@post(
    "/reload",
    operation_id="reloadSettings",
    summary="Read the settings again",
    description=_DESCRIPTION,
    tags=["Admin"],
    status_code=200,
    responses=documented(400, 401, 403, 404, 500, 503),
)
async def reload_settings(state: State) -> ReloadReport:
    """Take what has changed in the settings and in the files that they name."""
    ask: AskReload = state.ask_reload
    outcome = await ask()
    if outcome.problems:
        raise ApiError("invalid_value", f"Nothing was changed. {'; '.join(outcome.problems)}.")
    return ReloadReport(changed=outcome.changed, needs_restart=outcome.needs_restart)
