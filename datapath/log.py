# SPDX-License-Identifier: Apache-2.0
"""Logs: structured events named `noun_verbed`, for people on a terminal and as JSON otherwise."""

from __future__ import annotations

import logging
import os
import sys

import structlog

#: syslog(3) priorities.
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def configure(*, verbose: bool = False) -> None:
    """Send logs to standard error, so that standard output stays for results."""
    level = logging.DEBUG if verbose else logging.INFO
    on_terminal = sys.stderr.isatty()
    renderer: structlog.typing.Processor
    if on_terminal:
        renderer = structlog.dev.ConsoleRenderer()
    elif "JOURNAL_STREAM" in os.environ:
        renderer = _render_for_journal
    else:
        renderer = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _render_for_journal(
    logger: structlog.typing.WrappedLogger, name: str, event: structlog.typing.EventDict
) -> str:
    """The prefix of sd-daemon(3) becomes the PRIORITY of the line; the rest stays one JSON document."""
    text = structlog.processors.JSONRenderer()(logger, name, event)
    return f"<{_PRIORITIES.get(name, 6)}>{text if isinstance(text, str) else text.decode()}"


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """The logger of this program."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
