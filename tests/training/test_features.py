"""The feature cache: what it holds, and that it survives interruption and damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster_router.wire.errors import SetupError
from training.base import FrozenBase
from training.config import DataSettings
from training.data import Window, WindowCutter, open_reader
from training.features import FeatureCache


class CountingEncoder:
    """The real encoder, counting the documents that pass through; stops at `limit`."""

    def __init__(self, base: FrozenBase, limit: int = 10_000) -> None:
        self.base, self.limit, self.documents = base, limit, 0

    def __call__(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.documents >= self.limit:
            raise KeyboardInterrupt
        self.documents += len(tokens)
        return self.base.encode(tokens, mask)


@pytest.fixture(scope="module")
def windows(base: FrozenBase, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Window]:
    reader = open_reader(data, DataSettings(), tmp_path_factory.mktemp("inventory"))
    cutter = WindowCutter(base.tokenizer, 16, 12)
    return cutter.cut_split(reader, "train", ["animals", "numbers"], 10)


def _cache(folder: Path, encoder: CountingEncoder, shard: int = 4) -> FeatureCache:
    return FeatureCache(folder, encoder.base.fingerprint, encoder, batch=3, shard=shard)


def test_each_state_is_the_one_that_predicts_its_target(
    base: FrozenBase, windows: list[Window], tmp_path: Path
) -> None:
    features = _cache(tmp_path, CountingEncoder(base)).features(windows)
    for index in (0, 7, 19):
        window = windows[index]
        tokens = torch.from_numpy(window.tokens.astype("int64"))[None]
        alone = base.encode(tokens, torch.ones_like(tokens))[0]
        expected = alone[window.context - 1 : -1].to(torch.bfloat16)  # as shards keep them
        torch.testing.assert_close(features.hidden(index), expected, atol=0.05, rtol=0.05)
        assert features.targets(index).tolist() == window.targets.tolist()
    assert features.tokens == sum(window.scored for window in windows)


def test_a_second_run_computes_nothing(
    base: FrozenBase, windows: list[Window], tmp_path: Path
) -> None:
    first = _cache(tmp_path, CountingEncoder(base)).features(windows)
    encoder = CountingEncoder(base, limit=0)
    second = _cache(tmp_path, encoder).features(windows)
    assert all(torch.equal(first.hidden(i), second.hidden(i)) for i in range(len(first)))


def test_an_interrupted_run_resumes(
    base: FrozenBase, windows: list[Window], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _cache(tmp_path, CountingEncoder(base, limit=8)).features(windows)
    encoder = CountingEncoder(base)
    _cache(tmp_path, encoder).features(windows)
    assert encoder.documents == len(windows) - 8


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_shard_is_computed_again(
    base: FrozenBase, windows: list[Window], tmp_path: Path, damage: str
) -> None:
    first = _cache(tmp_path, CountingEncoder(base)).features(windows[:4])
    original = first.hidden(2).clone()
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 0xFF
    path.unlink()
    path.write_bytes({"flip": content, "truncate": content[:-64], "empty": b""}[damage])
    encoder = CountingEncoder(base)
    again = _cache(tmp_path, encoder).features(windows[:4])
    assert encoder.documents == 4
    assert torch.equal(again.hidden(2), original)


def test_another_base_model_finds_nothing(
    base: FrozenBase, windows: list[Window], tmp_path: Path
) -> None:
    _cache(tmp_path, CountingEncoder(base)).features(windows)
    encoder = CountingEncoder(base)
    FeatureCache(tmp_path, "another", encoder, batch=3, shard=4).features(windows)
    assert encoder.documents == len(windows)


def test_adding_a_domain_keeps_the_shards_of_the_others(
    base: FrozenBase, windows: list[Window], tmp_path: Path
) -> None:
    _cache(tmp_path, CountingEncoder(base)).features(windows[10:])
    encoder = CountingEncoder(base)
    _cache(tmp_path, encoder).features(windows)
    assert encoder.documents == 10


def test_a_folder_that_cannot_be_written_is_named(
    base: FrozenBase, windows: list[Window], tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(SetupError, match="--cache"):
        _cache(blocked / "cache", CountingEncoder(base)).features(windows[:2])
