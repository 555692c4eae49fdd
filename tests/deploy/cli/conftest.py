"""The command line, run in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from deploy.cli import app

Run = Callable[..., Result]


@pytest.fixture
def chameleon(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `chameleon WORDS...`, and fail on anything but an orderly end."""
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: object, input: str | None = None) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words], input=input)
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        return result

    return run
