"""Settings from YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapter_gen.update import UpdateSpec
from cluster_router.wire.errors import ConfigError
from training.base import FrozenBase
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


def test_the_budget_baseline_has_at_least_the_numbers_of_the_shipped_recipe(
    default_model: Path,
) -> None:
    full, budget = (load_settings(CONFIGS / f"{name}.yaml") for name in ("full", "budget"))
    same = {"rank": full.rank, "prototypes": full.prototypes}
    assert budget.model_copy(update=same) == full
    assert budget.prototypes.strengths == ()
    spec, wide = (FrozenBase(default_model).spec("full", s.rank) for s in (full, budget))

    def static_numbers(spec: UpdateSpec) -> int:
        return sum(spec.rank * (site.in_features + site.out_features) for site in spec.sites)

    assert full.clusters.count is not None
    cores = full.clusters.count * len(spec.sites) * spec.rank**2
    least = static_numbers(spec) + cores
    assert least <= static_numbers(wide) < 1.05 * least


def test_the_shipped_recipe_trains_on_nothing_its_licence_forbids() -> None:
    excluded = load_settings(CONFIGS / "head.yaml").data.exclude
    assert set(excluded) >= {"instructions", "brown_*"}
