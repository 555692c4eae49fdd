"""The stream bench's tables."""

from __future__ import annotations

from stream import OFFLINE, summary


def test_a_novel_domain_that_never_settled_is_a_dash() -> None:
    row = {"nmi": 0.5, "purity": 0.9}
    reaction = {
        "settled_after": None,
        "clusters_most": 60,
        "regenerated_share_of_clusters": 0.25,
    }
    result = {
        "plan": {"novel_domain": "sql", "seed": 2},
        "table": {OFFLINE: row, "ours": row},
        "reaction": reaction,
    }
    lines = summary([result])
    assert "| settled_after | - |" in lines
    assert "| clusters_most | 60 |" in lines
