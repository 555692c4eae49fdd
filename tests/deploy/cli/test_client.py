"""Commands that call a service, where there is none or a strange one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster_router.wire.errors import EngineError, RequestError
from deploy.cli.service import check, event_of

NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize("words", [["clusters"], ["chat", "Hello"], ["bench"]], ids=" ".join)
def test_nothing_answers(chameleon, words: list[str]) -> None:
    result = chameleon(*words, "--url", NOWHERE)
    assert result.exit_code == 1
    assert "chameleon serve" in result.stderr and NOWHERE in result.stderr


@pytest.mark.parametrize("words", [["clusters"], ["chat", "Hello"], ["bench"]], ids=" ".join)
def test_no_url(chameleon, words: list[str]) -> None:
    result = chameleon(*words, "--url", "localhost:8000")
    assert result.exit_code == 2 and "http://127.0.0.1:8000" in result.stderr


def test_wrong_choices(chameleon, tmp_path: Path) -> None:
    result = chameleon("chat", "Hello", "--adaptation", "often")
    assert result.exit_code == 2 and "'often'" in result.stderr
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    from cluster_router.wire.errors import ConfigError
    from deploy.cli.bench import read_prompts

    for file in (empty, tmp_path / "missing.txt"):
        with pytest.raises(ConfigError, match="prompts"):
            read_prompts(file)


def test_answers_that_are_errors() -> None:
    check(200, b"")
    with pytest.raises(RequestError, match=r"404: no such"):
        check(404, b'{"error": {"message": "no such"}}')
    with pytest.raises(RequestError, match="CHAMELEON_API_KEY"):
        check(401, b'{"error": {"message": "Send an API key."}}')
    with pytest.raises(EngineError, match="<html>"):
        check(503, b"<html>")
    with pytest.raises(EngineError, match="is it a ChameleonLLM"):
        check(500, b"")


def test_events() -> None:
    assert event_of('data: {"choices": []}') == {"choices": []}
    assert event_of("data: [DONE]") is None and event_of("") is None and event_of(": hi") is None
    with pytest.raises(EngineError, match="gone"):
        event_of('data: {"error": {"message": "gone"}}')
