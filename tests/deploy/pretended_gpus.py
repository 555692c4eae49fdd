"""Places LM replicas of config files on four GPUs that are not there; prints what each was given.

    python tests/deploy/pretended_gpus.py deploy/multi_gpu.yaml:5 deploy/tensor_parallel.yaml:3

No engine can run on such GPUs, so a class that only tells what it sees takes the place of
LMReplica, with exactly the `ray_actor_options` that Serve would use: the built application's,
replaced by the config's where that has some. The number is that of replicas: one more than there is
room for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve

from deploy.app import build
from deploy.serving import Overrides, read_config

GPUS = 4


class Seer:
    def devices(self) -> list[str]:
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")


def options(path: Path) -> dict[str, Any]:
    lm = build(read_config(path, Overrides()).settings)._bound_deployment.init_args[1]
    found = lm._bound_deployment.ray_actor_options
    [application] = yaml.safe_load(path.read_text())["applications"]
    [own] = [one for one in application["deployments"] if one["name"] == "LMReplica"]
    return own.get("ray_actor_options", found)


def place(name: str, replicas: int, asked: dict[str, Any]) -> dict[str, Any]:
    """The devices of each replica that runs, once Serve says that one does not."""
    one = serve.deployment(Seer).options(
        name="LMReplica", num_replicas=replicas, ray_actor_options=asked
    )
    serve._run(one.bind(), name=name, route_prefix=None, _blocking=False)
    fitting = int(GPUS // asked["num_gpus"])
    deadline = time.monotonic() + 120
    while True:
        status = serve.status().applications[name].deployments.get("LMReplica")
        running = 0 if status is None else status.replica_states.get("RUNNING", 0)
        if running == fitting and "resources" in status.message.lower():
            break
        assert time.monotonic() < deadline, status
        time.sleep(0.2)
    seen = serve.get_deployment_handle("LMReplica", name).broadcast("devices").results(timeout_s=60)
    serve.delete(name)
    return {"options": asked, "devices": seen, "message": status.message}


def main() -> None:
    os.environ["RAY_SERVE_SLOW_STARTUP_WARNING_S"] = "1"  # for what Serve says of a pending replica
    ray.init(
        address="local", num_cpus=8, num_gpus=GPUS, include_dashboard=False, log_to_driver=False
    )
    serve.start(proxy_location="Disabled")
    for number, word in enumerate(sys.argv[1:]):
        path, _, replicas = word.partition(":")
        print(json.dumps(place(f"app{number}", int(replicas), options(Path(path)))), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
