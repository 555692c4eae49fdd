"""The published schema."""

from __future__ import annotations

import json
from pathlib import Path

PUBLISHED = Path(__file__).parents[3] / "docs/reference/openapi.json"


def test_the_published_schema_is_the_codes(chameleon) -> None:
    printed = json.loads(chameleon("openapi").stdout)
    assert printed == json.loads(PUBLISHED.read_text()), "run: python docs/generate.py"
    assert "/v1/chat/completions" in printed["paths"]
    assert printed["components"]["securitySchemes"]
