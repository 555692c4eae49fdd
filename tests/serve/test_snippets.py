"""What README and docs show is run: blocks under `<!-- run -->`, against the running service."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest
from fenced import PAGES, ROOT, Block, blocks

pytestmark = pytest.mark.serve

RUN = [block for page in PAGES for block in blocks(page) if block.mark == "run"]
ADDRESS = "localhost:8000"


@pytest.mark.parametrize("block", [one for one in RUN if one.language == "python"], ids=str)
def test_python(block: Block, service, capsys) -> None:
    code = block.code.replace(f"http://{ADDRESS}", service.url)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, str(block), "exec"), names)
    assert capsys.readouterr().out.strip(), "a snippet shows something"


@pytest.mark.parametrize("block", [one for one in RUN if one.language == "bash"], ids=str)
def test_bash(block: Block, service) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    host = service.url.removeprefix("http://")
    code = re.sub(r"\bcurl\b", "curl --fail-with-body -sS", block.code.replace(ADDRESS, host))
    run = subprocess.run(
        ["bash", "-euc", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip()


def test_marks_are_understood() -> None:
    assert len(RUN) >= 7
    assert {block.language for block in RUN} <= {"python", "bash"}
    assert all(ADDRESS in block.code or "connect" in block.code for block in RUN)
