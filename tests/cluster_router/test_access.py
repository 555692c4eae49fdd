"""Keys, whom they let in, as whom, and how often."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from limits.aio.storage import MemoryStorage
from limits.aio.storage.memory import Entry

from cluster_router.access import ANYONE, Access, ApiKey, Caller, KeyFile, key_hash, read_keys
from cluster_router.wire.errors import (
    AuthenticationError,
    ConfigError,
    ForbiddenError,
    OverloadedError,
)

OPEN = ApiKey(name="open", sha256=key_hash("secret-1"))
BOUND = ApiKey(name="bound", sha256=key_hash("secret-2"), namespace="a", requests_per_minute=3)


def access(keys: Sequence[ApiKey] = (OPEN, BOUND)) -> Access:
    return Access(lambda: keys)


async def test_a_known_key_lets_in() -> None:
    assert await access().admit("Bearer secret-1") == Caller("open")
    assert await access().admit("  bearer   secret-2 ") == Caller("bound", "a")


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "secret-1", "Basic secret-1", "Bearer secret-3", "Bearer secret-1 x"],
)
async def test_everything_else_does_not(header: str) -> None:
    with pytest.raises(AuthenticationError):
        await access().admit(header)


async def test_bytes_that_are_no_text_are_no_key() -> None:
    with pytest.raises(AuthenticationError):
        await access().admit("Bearer \udcff\xff")


async def test_a_key_may_be_used_so_often_and_others_go_on() -> None:
    door = access()
    for _ in range(3):
        await door.admit("Bearer secret-2")
    with pytest.raises(OverloadedError, match="'bound' is limited to 3 requests") as caught:
        await door.admit("Bearer secret-2")
    assert 1 <= caught.value.retry_after <= 60
    for _ in range(5):
        await door.admit("Bearer secret-1")


def test_rates_are_counted_where_something_counts() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Access(lambda: (), "nowhere://x")


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "rediss://127.0.0.1:1"])
def test_redis_needs_the_package_that_the_settings_name(url: str) -> None:
    pytest.importorskip("redis")
    Access(lambda: (), url)


class SharedStorage(MemoryStorage):
    """What all processes name `shared://`, and what is wrong with it at this moment."""

    STORAGE_SCHEME: ClassVar[list[str]] = ["async+shared"]
    kept: ClassVar[dict[str, list[Entry]]] = {}
    failure: Exception | None = None
    hangs = False
    asked = 0

    def __init__(self, uri: str | None = None, **options: str) -> None:
        super().__init__(uri, **options)
        self.events = self.kept

    async def acquire_entry(self, *args: object, **options: object) -> bool:
        SharedStorage.asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure
        return await super().acquire_entry(*args, **options)


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedStorage, "kept", {})
    monkeypatch.setattr(SharedStorage, "asked", 0)


async def test_a_shared_storage_counts_for_all_who_name_it() -> None:
    doors = [Access(lambda: (BOUND,), "shared://") for _ in range(2)]
    for door in (*doors, doors[0]):
        await door.admit("Bearer secret-2")
    for door in doors:
        with pytest.raises(OverloadedError, match="'bound' is limited to 3 requests") as caught:
            await door.admit("Bearer secret-2")
        assert 1 <= caught.value.retry_after <= 60


async def test_each_counts_for_itself_while_a_shared_storage_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    door = Access(lambda: (BOUND,), "shared://", lambda: now)
    monkeypatch.setattr(SharedStorage, "failure", RuntimeError("connection refused"))
    for _ in range(3):
        await door.admit("Bearer secret-2")
    with pytest.raises(OverloadedError):
        await door.admit("Bearer secret-2")
    assert SharedStorage.asked == 1, "not at each request"
    now = 5.0
    with pytest.raises(OverloadedError):
        await door.admit("Bearer secret-2")
    assert SharedStorage.asked == 2
    assert caplog.text.count("connection refused") == 1, "said once"
    monkeypatch.setattr(SharedStorage, "failure", None)
    now = 10.0
    for _ in range(3):
        await door.admit("Bearer secret-2")
    assert "together again" in caplog.text
    with pytest.raises(OverloadedError):
        await door.admit("Bearer secret-2")
    assert SharedStorage.asked == 6


async def test_a_storage_that_does_not_answer_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster_router.access._PATIENCE_S", 0.05)
    monkeypatch.setattr(SharedStorage, "hangs", True)
    door = Access(lambda: (BOUND,), "shared://")
    async with asyncio.timeout(5):
        await door.admit("Bearer secret-2")
    assert "TimeoutError" in caplog.text


def test_a_bound_key_speaks_for_its_tenant_alone() -> None:
    bound = Caller("bound", "a")
    assert [bound.tenant(asked) for asked in (None, "", "a")] == ["a"] * 3
    with pytest.raises(ForbiddenError, match="'a' only"):
        bound.tenant("b")
    assert [ANYONE.tenant(asked) for asked in (None, "", "b")] == ["", "", "b"]


def write(path: Path, *keys: ApiKey) -> None:
    path.write_text(yaml.safe_dump([key.model_dump(exclude_none=True) for key in keys]))


def test_a_file_of_keys_is_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, now = tmp_path / "keys.yaml", 0.0
    write(path, OPEN)
    file = KeyFile(path, lambda: now)
    assert file.keys() == (OPEN,)
    write(path, OPEN, BOUND)
    assert file.keys() == (OPEN,), "not at each request"
    now = 2.0
    assert file.keys() == (OPEN, BOUND)
    for content in ("- name: x", None):
        path.unlink() if content is None else path.write_text(content)
        now += 2
        with caplog.at_level(logging.ERROR):
            assert file.keys() == (OPEN, BOUND)
            assert file.keys() == (OPEN, BOUND)
    assert len(caplog.records) == 2, "each change is said once"
    write(path, BOUND)
    now += 2
    assert file.keys() == (BOUND,)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("- name: x\n  sha256: abc", "0.sha256"),
        ("- name: x\n  key: secret", "0.sha256"),
        ("name: x", "no list"),
        ("- [", "cannot read"),
        (yaml.safe_dump([OPEN.model_dump(), OPEN.model_dump()]), "two API keys of name open"),
        (
            yaml.safe_dump([OPEN.model_dump(), OPEN.model_dump() | {"name": "other"}]),
            "two API keys of sha256",
        ),
    ],
)
def test_a_file_that_is_none_of_keys(tmp_path: Path, content: str, word: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=word):
        read_keys(path)


def test_no_file_no_service(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read API keys"):
        KeyFile(tmp_path / "nothing.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_keys(tmp_path / "empty.yaml") == (), "nobody may call: that is allowed"
