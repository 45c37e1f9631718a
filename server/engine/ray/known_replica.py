"""One replica as a web process knows it: its latest report, and whether it has been lost since."""

import math

import msgspec

from server.engine.outage import RETRY_AFTER_S, unavailable_error
from server.engine.reports import ReplicaReport
from server.http.errors import ApiError
from shared.protocol import SpeechError


class KnownReplica:
    """A replica, as of its latest report."""

    def __init__(self, now: float) -> None:
        self.is_polled = False
        """True while a request for its report is under way."""

        self.made_at = -math.inf
        """The time of its snapshot, or an earlier one."""

        self.heard_at = now
        self.boot_id = ""
        self.report: ReplicaReport | None = None
        self.lost: ApiError | None = None
        self.lost_at = -math.inf

    def lose(self, error: ApiError, now: float) -> None:
        """It takes no requests until it has answered a poll that begins after `now`."""
        self.lost, self.lost_at = error, now

    def current(self) -> ReplicaReport | None:
        """The latest report, with what has become known since."""
        if self.report is None or self.lost is None:
            return self.report
        reason = SpeechError(code=self.lost.code, message=self.lost.message)
        return msgspec.structs.replace(self.report, error=reason, retry_after_s=self.lost.retry_after_s)

    @property
    def is_new(self) -> bool:
        """True until its first report, unless it is lost before."""
        return self.report is None and self.lost is None

    def outage(self, now: float, patience_s: float) -> ApiError | None:
        """Why it takes no requests; None if it does."""
        if self.lost is not None:
            return self.lost
        if self.report is None:
            return unavailable_error("The GPU worker has not reported yet.")
        if self.report.error is not None:
            return unavailable_error(self.report.error.message, self.report.retry_after_s or RETRY_AFTER_S)
        if now - self.heard_at > patience_s:
            return unavailable_error(f"The GPU worker has not answered for {now - self.heard_at:.0f} s.")
        return None
