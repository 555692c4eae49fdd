"""What the config file tells Serve of its environment reaches every process that it starts."""

from __future__ import annotations

import pytest
from reliability.processes import PROXY, replica, titled

from deploy.environment import SETTINGS

pytestmark = pytest.mark.serve

APP = "chameleon"


@pytest.mark.parametrize(
    "title",
    [PROXY, "ray::ServeController", *(replica(APP, one) for one in ("ClusterRouter", "LMReplica"))],
)
def test_serve_runs_in_our_environment(service, title: str) -> None:
    found = [process.environ() for process in titled(title)]
    assert found
    for variables in found:
        assert {name: variables.get(name) for name in SETTINGS} == SETTINGS
