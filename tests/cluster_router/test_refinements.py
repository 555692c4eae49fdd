"""Refined updates in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster_router.refinements import NewestRefinements, RefinementStore, sealed
from cluster_router.wire.errors import BundleError, SetupError

A, B = ("a", 7), ("../b", 7)


def number(store: RefinementStore, place: tuple[str, int]) -> int:
    return store.newest()[sealed(place[0]), place[1]].number


def newest_data(store: RefinementStore, place: tuple[str, int]) -> bytes | None:
    return store.load(store.newest()[sealed(place[0]), place[1]].id)


def test_what_is_saved_is_found_by_another_reader(tmp_path: Path) -> None:
    writer = RefinementStore(str(tmp_path / "refined"))
    assert writer.newest() == {}
    assert writer.load("0" * 16) is None
    writer.save(A, b"one")
    writer.save(B, b"another")
    reader = RefinementStore(str(tmp_path / "refined"))
    assert len(reader.newest()) == 2
    assert newest_data(reader, A) == b"one"
    assert newest_data(reader, B) == b"another", "the same cluster, another tenant"
    assert len(list(tmp_path.glob("refined/refined-*"))) == 2, "no name leads out of the folder"


def test_what_is_common_to_a_tenant_is_a_place_of_its_own(tmp_path: Path) -> None:
    store = RefinementStore(str(tmp_path))
    assert store.recall(("a", -1)) is None
    store.save(("a", -1), b"all")
    store.save(("a", -1), b"all of it")
    store.save(("a", 1), b"one cluster")
    assert store.recall(("a", -1)) == b"all of it"
    assert store.recall(("a", 1)) == b"one cluster"
    assert store.recall(("b", -1)) is None


def test_the_last_two_of_a_cluster_stay(tmp_path: Path) -> None:
    store = RefinementStore(str(tmp_path))
    ids = []
    for data in (b"1", b"2", b"3"):
        store.save(A, data)
        ids.append(store.newest()[sealed("a"), 7].id)
    store.save(B, b"other")
    assert [store.load(id) for id in ids] == [None, b"2", b"3"]
    assert (number(store, A), number(store, B)) == (3, 1)


def test_those_of_clusters_that_nobody_holds_make_room(tmp_path: Path) -> None:
    store = RefinementStore(str(tmp_path))
    places = [("a", cluster) for cluster in range(5)]
    for place in places:
        store.save(place, b"one of it")
        store.save(place, b"another of it")
    store.trim(5, [])
    assert len(store.newest()) == 5
    store.trim(3, [("a", 0), ("b", 1)])
    assert set(store.newest()) == {(sealed("a"), cluster) for cluster in (0, 3, 4)}
    store.trim(0, places)
    assert len(store.newest()) == 3, "what is held stays"
    assert len(list(tmp_path.iterdir())) == 6


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    store = RefinementStore(str(tmp_path))
    store.save(A, b"one")
    [path] = tmp_path.iterdir()
    path.write_bytes(b"two")
    with pytest.raises(BundleError, match=path.name):
        newest_data(store, A)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SetupError, match="file/refined"):
        RefinementStore(str(tmp_path / "file" / "refined")).save(A, b"one")


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "refined-x-7-000001-0123456789abcdef.safetensors").write_text("?")
    store = RefinementStore(str(tmp_path))
    store.save(A, b"one")
    store.trim(0, [])
    assert store.newest() == {}
    assert len(list(tmp_path.iterdir())) == 1


async def test_a_reader_follows_and_keeps_what_it_saw_when_it_cannot_look(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "refined"
    store = RefinementStore(str(folder))
    newest = NewestRefinements(store)
    await newest.refresh()
    assert newest.of(*A) is None
    store.save(A, b"one")
    assert newest.of(*A) is None
    await newest.refresh()
    found = newest.of(*A)
    assert found is not None
    assert (found.number, store.load(found.id)) == (1, b"one")
    assert newest.of(*B) is None
    away = folder.rename(tmp_path / "away")
    folder.symlink_to(folder)
    for _ in range(2):
        await newest.refresh()
    assert newest.of(*A) == found
    assert len(caplog.records) == 1, "said once"
    folder.unlink()
    away.rename(folder)
    store.trim(0, [])
    await newest.refresh()
    assert newest.of(*A) is None
