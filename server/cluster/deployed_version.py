"""The version of a deployment that Serve is to run."""

import asyncio
from typing import Final

import structlog
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

_PERIOD_S: Final = 5.0

log = structlog.get_logger(__name__)


def deployed_version(deployment: str, application: str) -> str:
    """The latest version of a deployment; Serve's public status does not have it. Blocks.

    Raises RayError or RayServeException.
    """
    info, _ = _get_global_client().get_deployment_info(deployment, application)
    return str(info.version)


async def until_replaced(deployment: str, application: str, version: str) -> None:
    """Return once Serve is to run another version. While it runs none, or says nothing, it runs no other one."""
    while True:
        try:
            if await asyncio.to_thread(deployed_version, deployment, application) != version:
                return
        except (RayError, RayServeException) as error:
            log.warning("version_unknown", deployment=deployment, reason=str(error).strip().partition("\n")[0])
        await asyncio.sleep(_PERIOD_S)
