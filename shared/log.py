"""Logging: one set-up for all processes, with structlog.

Log lines tell events and their values. They never have the text of a request, a key, a token or a recording.
"""

import logging
import sys
from typing import Any, Final

import structlog

from shared.redaction import redact

_in_every_line: Final[dict[str, str]] = {}
"""The name of the process. Structlog's own context would be that of one thread."""


def set_log_level(level: str) -> None:
    """Write lines of this level and above from now on; granian's logger has a level of its own."""
    for name in ("", "_granian"):
        logging.getLogger(name).setLevel(level.upper())


def set_up_logging(level: str, log_format: str, process: str) -> None:
    """Write the log lines of this process and of its libraries to stderr, as text ("console") or JSON ("json")."""
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _name_process,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: structlog.typing.Processor
    if log_format == "json":
        processors.append(structlog.processors.format_exc_info)
        renderer = structlog.processors.JSONRenderer()
    else:
        # The renderer's default tracebacks show local variables, and with them the texts of requests.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=processors,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer, _redact],
        ),
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *processors,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    _in_every_line["process"] = process


def _name_process(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    event.update(_in_every_line)
    return event


def _redact(_logger: Any, _method: str, line: Any) -> str:
    """The last processor: also lines of libraries, and tracebacks, have no key in them."""
    return redact(str(line))
