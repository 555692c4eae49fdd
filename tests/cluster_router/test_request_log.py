import asyncio
import gzip
import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from cluster_router.files import Folder
from cluster_router.request_log import UNNAMED, LoggedWorker, RequestLog, folder_of
from cluster_router.wire.errors import OverloadedError
from cluster_router.wire.types import Assignment, SamplingParams, TokenizedRequest


def asked(namespace: str = "a", learn: bool = True, id: str = "r") -> TokenizedRequest:
    assignment = Assignment(None, cluster=3)
    sampling = SamplingParams(max_tokens=2)
    return TokenizedRequest(id, (7, 8), sampling, assignment, namespace=namespace, learn=learn)


def log(folder: Path, writer: str = "w", **options: Any) -> RequestLog:
    settings = {"max_bytes": 2**20, "part_bytes": 1000} | options
    decode = lambda tokens: " ".join(f"t{token}" for token in tokens) + " "  # noqa: E731
    return RequestLog(str(folder), writer, lambda name: name != "closed", decode, **settings)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [gzip.decompress(path.read_bytes()) for path in sorted(folder.glob("*.jsonl.gz"))]
    return [json.loads(line) for part in lines for line in part.splitlines()]


async def test_complete_answers_of_those_who_allow_it(tmp_path: Path, worker: Any) -> None:
    own = log(tmp_path)
    logged = LoggedWorker(worker, own)
    for request in (asked(), asked("closed"), asked(learn=False), asked("", id="r2")):
        assert len([chunk async for chunk in logged.generate(request)]) == 2
    left = logged.generate(asked())
    await anext(left)
    await left.aclose()
    worker.fails_after, worker.failure = 1, OverloadedError("full")
    with pytest.raises(OverloadedError):
        _ = [chunk async for chunk in logged.generate(asked())]
    assert worker.closed == 6
    await own.flush()
    assert {path.name for path in tmp_path.iterdir()} == {"a", UNNAMED}
    assert rows(tmp_path / "a") == [{"text": "t7 t8 w0 w1 ", "source": "r", "cluster": 3}]
    assert rows(tmp_path / UNNAMED)[0]["source"] == "r2"


async def test_parts_are_rotated_and_bounded(tmp_path: Path) -> None:
    own = log(tmp_path, max_bytes=4000)
    for number in range(100):
        own.add(asked(id=f"r{number:03}"), "x" * 100)
        await own.flush()
        await asyncio.sleep(0.001)
    found = rows(tmp_path / "a")
    assert len(list((tmp_path / "a").iterdir())) == 4
    assert sum(len(row["text"]) for row in found) < 4000
    ids = [row["source"] for row in found]
    assert ids == sorted(ids) and ids[-1] == "r099", "the oldest made room"
    other = log(tmp_path, writer="another", max_bytes=4000)
    other.add(asked(), "x")
    await other.flush()
    assert len(list((tmp_path / "a").iterdir())) == 4


async def test_a_namespace_cannot_be_a_path(tmp_path: Path) -> None:
    own = log(tmp_path / "log")
    for name in ("../up", "..", "a/b", "."):
        own.add(asked(name), "x")
    await own.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert len(list((tmp_path / "log").iterdir())) == 4


def test_folders_are_named_as_their_namespaces_are() -> None:
    names = ["a", "..", UNNAMED, f"%6E{UNNAMED[1:]}", "a/b", "naïve", "x" * 128]
    assert [unquote(folder_of(name)) for name in names] == names
    assert folder_of("") == UNNAMED
    assert len({folder_of(name) for name in ["", *names]}) == len(names) + 1


async def test_a_namespace_of_any_length_has_a_folder(tmp_path: Path) -> None:
    own = log(tmp_path)
    names = ["\U0001f642" * 127 + last for last in "ab"]
    for name in [*names, "a"]:
        own.add(asked(name), "x")
    await own.flush()
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {folder_of(name) for name in [*names, "a"]}
    assert all(len(name) <= 255 for name in found) and len(found) == 3


async def test_one_that_cannot_be_written_hinders_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").write_text("in the way")
    own = log(tmp_path)
    for namespace in "ab":
        for number in range(20):
            own.add(asked(namespace, id=str(number)), "x" * 100)
    for _ in range(2):
        await own.flush()
    assert len(rows(tmp_path / "b")) == 20
    assert caplog.text.count("requests are not logged") == 1
    (tmp_path / "a").unlink()
    await own.flush()
    assert len(rows(tmp_path / "a")) == 20


async def test_it_goes_on_whatever_a_stores_client_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no credentials")

    own = log(tmp_path)
    own.add(asked(), "x")
    with monkeypatch.context() as broken:
        broken.setattr(Folder, "write", fail)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await own.run(0.01)
    assert caplog.text.count("no credentials") == 1
    await own.flush()
    assert len(rows(tmp_path / "a")) == 1


async def test_what_cannot_be_written_is_kept_and_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").write_text("in the way")
    own = log(tmp_path)
    for number in range(20):
        own.add(asked(id=str(number)), "x" * 100)
    await own.flush()
    await own.flush()
    assert caplog.text.count("requests are not logged") == 1
    (tmp_path / "a").unlink()
    await own.flush()
    assert sorted(int(row["source"]) for row in rows(tmp_path / "a")) == list(range(20))


async def test_memory_is_bounded_while_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("in the way")
    own = log(tmp_path, max_bytes=3000)
    for number in range(500):
        own.add(asked(id=str(number)), "x" * 100)
        if number % 50 == 0:
            await own.flush()
    (tmp_path / "a").unlink()
    await own.flush()
    assert 14 <= len(rows(tmp_path / "a")) <= 24, "three parts at most"
