"""Logging: one set-up for every process, and the request id that ties their lines together.

What is logged is what happened, never what was said: no text of a request, no key, no token, no recording.
"""

import logging
import sys
from typing import Final

import structlog

MAX_REQUEST_ID: Final = 128
"""Characters of a client's request id that are still taken over."""


def set_up_logging(level: str, form: str, process: str) -> None:
    """Send this process's log lines, and those of the libraries, to stderr as text ("console") or JSON ("json")."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: structlog.typing.Processor
    if form == "json":
        shared.append(structlog.processors.format_exc_info)
        renderer = structlog.processors.JSONRenderer()
    else:
        # The renderer's own tracebacks show local variables, and with them what was said.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        ),
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(process=process)


def sane_request_id(given: str | None) -> str | None:
    """The client's own request id where it is fit for a log line and a header, else None."""
    if given and len(given) <= MAX_REQUEST_ID and given.isascii() and all(c.isalnum() or c in "-_.:" for c in given):
        return given
    return None
