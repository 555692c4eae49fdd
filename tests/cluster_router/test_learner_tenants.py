"""Namespaces share nothing but the bundle they began with."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from cluster_router.files import Folder
from cluster_router.learning.config import LearnerConfig
from cluster_router.learning.tenants import TenantLearners, newer, reader
from cluster_router.wire.errors import OverloadedError, SetupError
from cluster_router.wire.snapshot import ClusterSnapshot

DIM = 24
CONFIG = LearnerConfig(window=256, interval=64, split_gain=0.05, centre_after=128)


def prompts(number: int, count: int = 128) -> np.ndarray:
    noise = np.random.default_rng(number).normal(size=(count, DIM)) * 0.04
    return (np.eye(DIM)[number] + noise).astype(np.float32)


@pytest.fixture
def bundle() -> ClusterSnapshot:
    centroids = np.eye(DIM, dtype=np.float32)[:2]
    sizes = np.full(2, 50)
    ids = np.array([0, 1])
    return ClusterSnapshot(
        1, ids, centroids, sizes, np.ones(2, int), centroids, centroids.mean(0), 0.7
    )


@pytest.fixture
def learners(bundle: ClusterSnapshot, tmp_path: Path) -> TenantLearners:
    return TenantLearners(bundle, str(tmp_path), CONFIG)


def same(first: ClusterSnapshot, second: ClusterSnapshot) -> bool:
    return all(np.array_equal(v, second.arrays()[n]) for n, v in first.arrays().items())


def test_one_tenants_prompts_change_nothing_for_another(
    learners: TenantLearners, bundle: ClusterSnapshot, tmp_path: Path
) -> None:
    alone = TenantLearners(bundle, str(tmp_path / "alone"), CONFIG)
    for number in (0, 5, 1):
        alone.learn("a", prompts(number))
        learners.learn("a", prompts(number))
        learners.learn("b", prompts(number + 7))
        learners.learn("", prompts(number + 9))
    mine = learners.publish("a")
    assert same(mine, alone.publish("a"))
    assert len(mine) > len(bundle)
    theirs = [learners.publish(name) for name in ("b", "")]
    assert all((mine.centroids @ other.centroids[2:].T).max() < 0.6 for other in theirs)


def test_no_cluster_id_means_something_in_two_namespaces(learners: TenantLearners) -> None:
    names = ["", "a", "b"]
    for name in names:
        for number in (0, 5):
            learners.learn(name, prompts(number))
    ids = [set(learners.publish(name).ids.tolist()) for name in names]
    assert {0, 1} < ids[0]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])


def test_every_namespace_survives_a_restart(
    learners: TenantLearners, bundle: ClusterSnapshot, tmp_path: Path
) -> None:
    for name, number in (("a", 4), ("b", 6)):
        learners.learn(name, prompts(number))
    published = {name: learners.publish(name) for name in ("a", "b")}
    restarted = TenantLearners(bundle, str(tmp_path), CONFIG)
    restarted.learn("c", prompts(3))  # a newcomer, before the others are heard of again
    for name, before in published.items():
        assert same(restarted.publish(name), before)
        store = reader(str(tmp_path), name)
        assert store is not None
        assert store.latest_version() == before.version
    newcomer = set(restarted.publish("c").ids.tolist())
    assert all(not newcomer & set(before.ids.tolist()) for before in published.values())


def taught(learners: TenantLearners, namespace: str, *numbers: int) -> ClusterSnapshot:
    for number in numbers:
        learners.learn(namespace, prompts(number))
    return learners.publish(namespace)


def folders(root: Path) -> list[str]:
    """Blocks of the folders of namespaces, each with its digest."""
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("learned_first", [False, True])
def test_learners_that_share_a_folder_give_no_block_twice(
    bundle: ClusterSnapshot, tmp_path: Path, learned_first: bool
) -> None:
    """As after a redeployment: both were there before the other gave a block away."""
    first, second = (TenantLearners(bundle, str(tmp_path), CONFIG) for _ in range(2))
    if learned_first:
        second.learn("b", prompts(6))
    mine, theirs = taught(first, "a", 5), taught(second, "b", 6)
    assert not set(mine.ids.tolist()) & set(theirs.ids.tolist())
    again = taught(second, "a", 7)
    assert set(mine.ids.tolist()) <= set(again.ids.tolist())
    assert len(folders(tmp_path)) == 2
    found = newer(str(tmp_path), "a", mine.version)
    assert found is not None
    assert same(found, again)


def test_a_block_taken_at_the_same_moment_is_given_up(
    bundle: ClusterSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Folder.write

    def both_write(folder: Folder, name: str, data: bytes) -> None:
        (tmp_path / f"1-{'f' * 32}").mkdir(exist_ok=True)
        write(folder, name, data)

    monkeypatch.setattr(Folder, "write", both_write)
    learners = TenantLearners(bundle, str(tmp_path), CONFIG)
    mine = taught(learners, "a", 5)
    assert set(mine.ids.tolist()) >= {2 * 10**9, 2 * 10**9 + 1}
    found = newer(str(tmp_path), "a", 0)
    assert found is not None
    assert same(found, mine)
    assert same(TenantLearners(bundle, str(tmp_path), CONFIG).publish("a"), mine)


def test_where_others_always_take_the_same_block_nothing_is_lost(
    bundle: ClusterSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Folder.write

    def both_write(folder: Folder, name: str, data: bytes) -> None:
        block = Path(folder.root).name.partition("-")[0]
        (tmp_path / f"{block}-{'f' * 32}").mkdir(exist_ok=True)
        write(folder, name, data)

    learners = TenantLearners(bundle, str(tmp_path), CONFIG)
    learners.learn("a", prompts(5))
    with monkeypatch.context() as patched:
        patched.setattr(Folder, "write", both_write)
        with pytest.raises(SetupError, match="try again"):
            learners.publish("a")
    assert newer(str(tmp_path), "a", 0) is None
    published = learners.publish("a")
    assert published.centroids[:, 5].max() > 0.9
    blocks = [int(name.partition("-")[0]) for name in folders(tmp_path)]
    assert blocks.count(max(blocks)) == 1
    assert published.ids.min() == max(blocks) * 10**9


@pytest.mark.parametrize("backwards", [False, True])
def test_of_two_folders_of_a_namespace_all_take_the_newer(
    learners: TenantLearners,
    bundle: ClusterSnapshot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backwards: bool,
) -> None:
    """Earlier learners could make two. In which order they are listed is up to the store."""
    old = taught(learners, "a", 5)
    [name] = folders(tmp_path)
    shutil.copytree(tmp_path / name, tmp_path / name.replace("1-", "7-", 1))
    new = taught(learners, "a", 6)
    assert new.version > old.version
    names = Folder.names
    monkeypatch.setattr(Folder, "names", lambda folder: sorted(names(folder), reverse=backwards))
    found = newer(str(tmp_path), "a", 0)
    assert found is not None
    assert same(found, new)
    restarted = TenantLearners(bundle, str(tmp_path), CONFIG)
    assert same(restarted.publish("a"), new)
    taught(restarted, "a", 7)
    with pytest.raises(SetupError, match="another learner"):
        taught(learners, "a", 8)


def test_nothing_is_published_that_is_not_saved(bundle: ClusterSnapshot, tmp_path: Path) -> None:
    learners = TenantLearners(bundle, str(tmp_path / "state"), CONFIG)
    learners.learn("", prompts(5))
    (tmp_path / "state").write_text("in the way")
    with pytest.raises(SetupError):
        learners.publish()
    assert learners.namespaces() == [""]
    (tmp_path / "state").unlink()
    snapshot = learners.publish()
    store = reader(str(tmp_path / "state"))
    assert store is not None
    assert store.latest_version() == snapshot.version


def test_before_a_namespace_has_learned_there_is_nothing_to_read(
    learners: TenantLearners, tmp_path: Path
) -> None:
    assert reader(str(tmp_path), "a") is None
    learners.learn("a", prompts(0))
    learners.publish("a")
    assert reader(str(tmp_path), "a") is not None
    assert reader(str(tmp_path), "b") is None


def test_names_cannot_lead_out_of_the_folder(bundle: ClusterSnapshot, tmp_path: Path) -> None:
    learners = TenantLearners(bundle, str(tmp_path / "state"), CONFIG)
    for name in ("../../escape", "/etc", "a/b", "\x00"):
        learners.learn(name, prompts(0))
        learners.publish(name)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert len(list((tmp_path / "state").iterdir())) == 4


def test_the_number_of_namespaces_is_bounded(bundle: ClusterSnapshot, tmp_path: Path) -> None:
    learners = TenantLearners(bundle, str(tmp_path), CONFIG, max_namespaces=2)
    learners.learn("a", prompts(0))
    learners.learn("b", prompts(0))
    with pytest.raises(OverloadedError, match="max_namespaces"):
        learners.learn("c", prompts(0))
    learners.learn("a", prompts(1))
    learners.learn("", prompts(0))  # has a place of its own
