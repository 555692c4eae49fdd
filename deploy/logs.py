"""Log lines of our packages go where Ray Serve's go.

So one section of the config file, `logging_config`, sets level and form of all of them (JSON or
text), and each line written while a request is served has that request's id.
"""

from __future__ import annotations

import logging

PACKAGES = ("adapter_gen", "cluster_router", "deploy", "lm_workers")
_SERVE = "ray.serve"


class _ToServe(logging.Handler):
    """Hands records to Serve's logger, whatever handlers and level that has by then."""

    def emit(self, record: logging.LogRecord) -> None:
        serve = logging.getLogger(_SERVE)
        if serve.isEnabledFor(record.levelno):
            serve.handle(record)


def join_serve() -> None:
    """Have our loggers write to this replica's log. To be called as the replica is built."""
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [_ToServe()]
        logger.setLevel(logging.DEBUG)  # Serve's level decides
        logger.propagate = False
