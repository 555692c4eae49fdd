"""The snapshot store on a real folder, on fsspec's memory file system, and on full disks."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster_router.snapshots import Checkpoint, SnapshotStore
from cluster_router.wire.errors import BundleError, ConfigError, SetupError
from cluster_router.wire.snapshot import ClusterSnapshot

MakeSnapshot = Callable[..., ClusterSnapshot]


@pytest.fixture(params=["folder", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / "deep" / "clusters"
    return str(folder) if request.param == "folder" else f"memory://{folder}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "clusters"


@pytest.fixture
def make(make_snapshot: MakeSnapshot) -> Callable[[int], Checkpoint]:
    def checkpoint(version: int) -> Checkpoint:
        centroids = np.random.default_rng(version).normal(size=(5, 16))
        state = {"weights": np.arange(5, dtype=np.float32), "clock": np.array([version])}
        return Checkpoint(make_snapshot(centroids, version=version), state)

    return checkpoint


def assert_same(loaded: Checkpoint | None, saved: Checkpoint) -> None:
    assert loaded is not None
    for mine, theirs in (
        (loaded.snapshot.arrays(), saved.snapshot.arrays()),
        (loaded.state, saved.state),
    ):
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def newest(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


def test_round_trip_keeps_the_newest(uri: str, make: Callable[[int], Checkpoint]) -> None:
    store = SnapshotStore(uri, keep=2)
    assert store.latest_version() is None
    assert store.load() is None
    for version in (2, 3, 11):
        store.save(make(version))
        assert store.latest_version() == version
    assert_same(SnapshotStore(uri).load(), make(11))
    SnapshotStore(uri, keep=2).save(make(11))  # again, as after a lost answer
    assert store.latest_version() == 11


def test_only_the_last_few_stay(folder: Path, make: Callable[[int], Checkpoint]) -> None:
    store = SnapshotStore(str(folder), keep=2)
    for version in range(1, 6):
        store.save(make(version))
    assert [int(path.name[9:21]) for path in sorted(folder.iterdir())] == [4, 5]


def test_an_empty_snapshot_survives(uri: str) -> None:
    store = SnapshotStore(uri)
    store.save(Checkpoint(ClusterSnapshot.empty(16)))
    loaded = store.load()
    assert loaded is not None
    assert len(loaded.snapshot) == 0
    assert loaded.state == {}


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "text"])
def test_the_last_good_one_stands_in_for_a_damaged_one(
    folder: Path,
    make: Callable[[int], Checkpoint],
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = SnapshotStore(str(folder))
    store.save(make(1))
    store.save(make(2))
    path = newest(folder)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    contents = {"flip": bytes(data), "truncate": bytes(data[:-9]), "empty": b"", "text": b"{}"}
    path.write_bytes(contents[damage])
    with caplog.at_level(logging.ERROR):
        assert_same(store.load(), make(1))
    assert "snapshot-000000000002" in caplog.text
    store.save(make(3))
    assert_same(store.load(), make(3))


def test_nothing_but_damage_is_an_error(folder: Path, make: Callable[[int], Checkpoint]) -> None:
    store = SnapshotStore(str(folder))
    store.save(make(1))
    newest(folder).write_bytes(b"gone")
    with pytest.raises(BundleError, match=r"every snapshot.*stop the service.*refined-"):
        store.load()


def test_a_full_disk_leaves_what_was_there(
    make: Callable[[int], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")

    def write(_folder: Path, _name: str, data: bytes) -> None:
        """Where no byte fits."""
        with full.open("wb", buffering=0) as file:
            file.write(data)

    store = SnapshotStore(str(tmp_path))
    store.save(make(1))
    with monkeypatch.context() as patched:
        patched.setattr("cluster_router.files._write_local", write)
        with pytest.raises(SetupError, match=r"No space left.*free some space"):
            store.save(make(2))
    assert_same(store.load(), make(1))
    store.save(make(2))
    assert_same(store.load(), make(2))


def test_an_unwritable_folder_is_named(tmp_path: Path, make: Callable[[int], Checkpoint]) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SetupError, match="file"):
        SnapshotStore(str(tmp_path / "file" / "below")).save(make(1))


def test_a_second_writer_is_refused(folder: Path, make: Callable[[int], Checkpoint]) -> None:
    SnapshotStore(str(folder)).save(make(7))
    with pytest.raises(SetupError, match="one learner"):
        SnapshotStore(str(folder)).save(make(6))
    with pytest.raises(SetupError, match="one learner"):
        other = make(6).snapshot
        SnapshotStore(str(folder)).save(
            Checkpoint(ClusterSnapshot.from_arrays(other.arrays() | {"version": np.array([7])}))
        )


def test_files_that_are_not_snapshots_are_ignored(
    folder: Path, make: Callable[[int], Checkpoint]
) -> None:
    store = SnapshotStore(str(folder))
    store.save(make(1))
    (folder / "README.md").write_text("hands off")
    (folder / ".snapshot-000000000009-0123456789abcdef.safetensors.1.tmp").write_bytes(b"half")
    assert store.latest_version() == 1
    assert_same(store.load(), make(1))


@pytest.mark.parametrize(("uri", "keep"), [("nosuch://bucket", 3), ("memory://x", 0)])
def test_bad_settings_are_refused(uri: str, keep: int) -> None:
    with pytest.raises(ConfigError):
        SnapshotStore(uri, keep)


def test_readers_see_whole_snapshots_while_one_writes(
    folder: Path, make: Callable[[int], Checkpoint], caplog: pytest.LogCaptureFixture
) -> None:
    SnapshotStore(str(folder), keep=1).save(make(1))
    done = threading.Event()
    failures: list[BaseException] = []
    seen: list[set[int]] = [set(), set()]

    def read(versions: set[int]) -> None:
        store = SnapshotStore(str(folder))
        while not done.is_set():
            try:
                loaded = store.load()
                assert loaded is not None
                assert_same(loaded, make(loaded.snapshot.version))
                versions.add(loaded.snapshot.version)
            except BaseException as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=read, args=[versions]) for versions in seen]
    for reader in readers:
        reader.start()
    writer = SnapshotStore(str(folder), keep=1)
    version, deadline = 1, time.monotonic() + 60
    while version < 60 or (min(map(len, seen)) < 3 and time.monotonic() < deadline):
        version += 1
        writer.save(make(version))
    done.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert min(map(len, seen)) >= 3
    assert not caplog.records, "no half of one was passed over"
