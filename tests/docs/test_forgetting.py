"""The lines of docs/guides/security.md that list what is kept of a tenant, run on such a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fenced import ROOT, blocks

from cluster_router.learning.config import LearnerConfig
from cluster_router.learning.tenants import TenantLearners
from cluster_router.refinements import RefinementStore
from cluster_router.wire.snapshot import ClusterSnapshot

DIM = 8
NAMED = "tenant-a"
OTHERS = ["", "tenant-b", "tenant-a2", f"{NAMED}\n"]
LINES = [one for one in blocks(ROOT / "docs/guides/security.md") if "sha256sum" in one.code]


class Kept:
    """The folder in `learner.uri`, as a service with refinement fills it."""

    def __init__(self, uri: Path) -> None:
        eye = np.eye(DIM, dtype=np.float32)[:2]
        ids, sizes, versions = np.array([0, 1]), np.full(2, 50), np.ones(2, int)
        start = ClusterSnapshot(1, ids, eye, sizes, versions, eye, eye.mean(0), 0.7)
        self.uri = uri
        self.learners = TenantLearners(start, str(uri), LearnerConfig(window=64, interval=16))
        self.refinements = RefinementStore(f"{uri}/refined")  # as deploy/refining.py has it

    def keep(self, namespace: str) -> set[Path]:
        """Publish of a tenant twice, and refine its clusters; returns what was written."""
        before = set(self.uri.rglob("*"))
        for seed in range(2):
            embeddings = np.random.default_rng(seed).normal(size=(32, DIM)).astype(np.float32)
            self.learners.learn(namespace, embeddings)
            for cluster in self.learners.publish(namespace).ids[:2]:
                self.refinements.save((namespace, int(cluster)), f"{namespace} {seed}".encode())
        return set(self.uri.rglob("*")) - before - {self.uri / "refined"}


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs GNU coreutils")
def test_what_is_listed_of_a_tenant_is_all_of_it_and_nothing_of_others(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "clusters")
    kept.keep(OTHERS[0])
    own = kept.keep(NAMED)
    for other in OTHERS[1:]:
        assert len(kept.keep(other)) == len(own)
    assert len({path.parent for path in own}) == 3, "its folder, snapshots in it, and refinements"
    [lines] = LINES
    assert NAMED in lines.code
    listed = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines.code],
        env={**os.environ, "URI": str(kept.uri)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = listed.stdout.splitlines()
    assert sorted(map(Path, found)) == sorted(own)
