"""Settings from YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster_router.wire.errors import ConfigError
from training.config import load_settings

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranks: 4", "ranks: Extra inputs"),
        ("hyper: {droput: 0.1}", r"hyper\.droput: Extra inputs"),
        ("static: {learning_rate: -1}", r"static\.learning_rate"),
        ("rank: .nan", "rank"),
        ("- a list", "must be a mapping"),
        ("rank: [", "cannot read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_settings(tmp_path / "none.yaml")


def test_overrides_reach_into_sections(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1")
    settings = load_settings(path, **{"seed": 7, "data.holdout": ["a"]})
    assert (settings.seed, settings.data.holdout) == (7, ("a",))


def test_the_shipped_recipe_trains_on_nothing_its_licence_forbids() -> None:
    excluded = load_settings(CONFIGS / "head.yaml").data.exclude
    assert set(excluded) >= {"instructions", "brown_*"}
