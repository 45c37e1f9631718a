"""The settings that the GPU worker takes while it runs: limits of memory and of the queue, timeouts, the log's level.

The web side sends variables; this process reads them as it reads those of its own environment.
"""

from collections.abc import Callable, Mapping

import structlog

from gpu_worker.engines.base import JobError
from shared.settings import Settings, SettingsError, load_settings
from shared.settings_reload import WORKER_LIVE_VARIABLES

log = structlog.get_logger(__name__)


class LiveSettings:
    """Owned by the synthesis thread. `variables` are those that this process began with.

    `apply` makes settings hold, and cannot fail.
    """

    def __init__(self, variables: Mapping[str, str], apply: Callable[[Settings], None]) -> None:
        self._variables = dict(variables)
        self._apply = apply

    def take(self, variables: Mapping[str, str]) -> None:
        """Let these variables hold, all or none; JobError (`invalid_value`) if one is wrong or needs a restart."""
        if other := sorted(variables.keys() - WORKER_LIVE_VARIABLES):
            raise JobError("invalid_value", f"these settings need a restart of the GPU worker: {', '.join(other)}")
        together = {**self._variables, **variables}
        try:
            settings = load_settings(together)
        except SettingsError as error:
            raise JobError("invalid_value", "; ".join(error.problems)) from error
        if together == self._variables:
            return
        self._variables = together
        self._apply(settings)
        log.info("settings_taken", variables=sorted(variables))
