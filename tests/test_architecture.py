"""Rules that hold for the whole tree."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster_router", "adapter_gen", "lm_workers", "training", "deploy")
MAY_IMPORT = {
    "cluster_router.wire": set(),
    "cluster_router": {"cluster_router.wire"},
    "adapter_gen": {"cluster_router.wire"},
    "lm_workers": {"cluster_router.wire", "adapter_gen"},
    "training": {"cluster_router.wire", "cluster_router", "adapter_gen", "lm_workers"},
    "deploy": {"cluster_router.wire", "cluster_router", "adapter_gen", "lm_workers", "training"},
}
WITH_RAY = {"training", "deploy"}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def owner(module: str) -> str:
    if module.startswith("cluster_router.wire"):
        return "cluster_router.wire"
    return module.split(".", maxsplit=1)[0]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_point_down(path: Path) -> None:
    here = owner(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imports(path):
        there = owner(module)
        if there in MAY_IMPORT and there != here:
            assert there in MAY_IMPORT[here], f"{here} must not import {module}"
        if module.split(".")[0] == "ray":
            assert here in WITH_RAY, f"{here} must not know of ray"
        if here == "cluster_router.wire":
            allowed = {"numpy", "pydantic", "cluster_router", *sys.stdlib_module_names}
            assert module.split(".")[0] in allowed, f"{here} must not import {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_nothing_is_left_to_do() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    assert [str(path) for path in SOURCES if marks.search(path.read_text())] == []


def test_no_pickle_is_ever_read() -> None:
    unsafe = re.compile(r"\b(pickle\.load|torch\.load|np\.load)\b")
    allowed = re.compile(r"torch\.load\(.*weights_only=True|np\.load\(.*allow_pickle=False")
    for path in SOURCES:
        for line in path.read_text().splitlines():
            assert not unsafe.search(line) or allowed.search(line), f"{path}: {line.strip()}"


def test_ci_runs_the_command_that_the_readme_gives() -> None:
    readme = (ROOT / "README.md").read_text()
    [command] = re.findall(r"<!-- test command -->\n```bash\n(.+)\n```", readme)
    assert "pytest" in command and ".[cpu,test]" in command
    assert "<!-- test command -->" in (ROOT / ".ci/run").read_text()
