"""Parts are built in the process of the test here, where Ray would give each a process."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from deploy.logs import PACKAGES


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """A replica turns its process's loggers to Serve's; this process has other tests to run."""
    found = [logging.getLogger(name) for name in PACKAGES]
    before = [(one.handlers, one.level, one.propagate) for one in found]
    yield
    for logger, (handlers, level, propagate) in zip(found, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
