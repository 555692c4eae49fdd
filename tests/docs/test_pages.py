"""Pages as files: their links, their settings, their reference, and the site they make."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fenced import PAGES, ROOT, Block, blocks, links

from deploy.config import AppConfig
from training.config import TrainSettings

DEPLOYMENTS = {
    "ClusterRouter",
    "LMReplica",
    "AdapterGenerator",
    "CentroidLearner",
    "ClusterRefinery",
}
YAML = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        file = (page.parent / target.split("#")[0]).resolve()
        assert file.exists() or page.parent.name == "project", f"{page.name} links to {target}"


@pytest.mark.parametrize("block", YAML, ids=str)
def test_settings_in_the_pages_are_valid(block: Block) -> None:
    for document in yaml.safe_load_all(block.code):
        if block.mark == "training settings":
            TrainSettings.model_validate(document)
        elif isinstance(document, dict):
            applications = document.get("applications", [document])
            for application in applications:
                check_application(application)


def check_application(application: dict[str, Any]) -> None:
    if "args" in application:
        AppConfig.model_validate(application["args"])
    if isinstance(application.get("deployments"), list):
        assert {one["name"] for one in application["deployments"]} <= DEPLOYMENTS


def test_there_are_settings_to_check() -> None:
    assert sum("args:" in block.code for block in YAML) >= 8


@pytest.fixture(scope="module")
def generate() -> Any:
    pytest.importorskip("griffe", reason="needs the test or docs extra")
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says(generate) -> None:
    for name, text in generate.pages().items():
        written = (ROOT / "docs/reference" / name).read_text()
        assert written == text, f"docs/reference/{name} is old; run: python docs/generate.py"


def test_whole_numbers_are_written_in_full(generate) -> None:
    text = generate.pages()
    assert ">= 1048576" in text["settings.md"] and "< 9223372036854775808" in text["http.md"]
    assert ">= 0.001" in text["http.md"]


def test_a_setting_without_a_meaning_is_noticed(generate) -> None:
    class Undescribed(AppConfig):
        """Says nothing of its setting."""

        secret: int = 3

    with pytest.raises(LookupError, match=r"Undescribed\.secret"):
        generate.settings_page("", "", "", Undescribed())


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the test or docs extra")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    page = (tmp_path / "site/index.html").read_text()
    assert "ClusterRouter" in page
    for remote in ("fonts.googleapis", "unpkg.com", "cdn."):
        assert remote not in page, "the site must work offline"
