"""Refined updates in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster_router.refinements import NewestRefinements, RefinementStore
from cluster_router.wire.errors import BundleError, SetupError


def test_what_is_saved_is_found_by_another_reader(tmp_path: Path) -> None:
    writer = RefinementStore(str(tmp_path / "refined"))
    assert writer.newest() == {}
    assert writer.load(7, 1) is None
    writer.save(7, 1, b"one")
    writer.save(10**9 + 3, 1, b"another")
    reader = RefinementStore(str(tmp_path / "refined"))
    assert reader.newest() == {7: 1, 10**9 + 3: 1}
    assert reader.load(7, 1) == b"one"


def test_the_last_two_of_a_cluster_stay(tmp_path: Path) -> None:
    store = RefinementStore(str(tmp_path))
    for number in (1, 2, 3):
        store.save(7, number, f"{number}".encode())
    store.save(8, 1, b"other")
    assert [store.load(7, number) for number in (1, 2, 3)] == [None, b"2", b"3"]
    assert store.newest() == {7: 3, 8: 1}
    store.forget(7)
    assert store.newest() == {8: 1}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    store = RefinementStore(str(tmp_path))
    store.save(7, 1, b"one")
    [path] = tmp_path.iterdir()
    path.write_bytes(b"two")
    with pytest.raises(BundleError, match=path.name):
        store.load(7, 1)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SetupError, match="another folder for refinements"):
        RefinementStore(str(tmp_path / "file" / "refined")).save(7, 1, b"one")


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "refined-x-000001-0123456789abcdef.safetensors").write_text("?")
    store = RefinementStore(str(tmp_path))
    store.save(7, 1, b"one")
    assert store.newest() == {7: 1}
    assert len(list(tmp_path.iterdir())) == 2


async def test_a_reader_follows_and_keeps_what_it_saw_when_it_cannot_look(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "refined"
    store = RefinementStore(str(folder))
    newest = NewestRefinements(store)
    numbers = newest.numbers
    await newest.refresh()
    assert numbers == {}
    store.save(7, 1, b"one")
    await newest.refresh()
    assert numbers == {7: 1}
    away = folder.rename(tmp_path / "away")
    folder.write_text("in the way")
    for _ in range(2):
        await newest.refresh()
    assert numbers == {7: 1}
    assert len(caplog.records) == 1, "said once"
    folder.unlink()
    away.rename(folder)
    store.forget(7)
    await newest.refresh()
    assert numbers == {}
