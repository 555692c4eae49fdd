"""The KubeRay files: Kubernetes' own schemas for pods and volumes, KubeRay's rules for the rest.

The models below are the part of KubeRay's RayService (ray.io/v1) that the files use.
"""

# ruff: noqa: N815  (names of fields are Kubernetes')
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
import pytest
import ray
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from deploy.autoscaling import LoadPolicy
from deploy.config import AppConfig
from deploy.environment import SETTINGS

FOLDER = Path(__file__).parents[2] / "deploy/kuberay"
KUBERNETES = "1.30"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: dict[str, Any]
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"


class WorkerGroup(Strict):
    groupName: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    numOfHosts: Annotated[int, Field(ge=1)] = 1
    rayStartParams: dict[str, str]
    template: dict[str, Any]

    @model_validator(mode="after")
    def _bounds(self) -> WorkerGroup:
        assert self.minReplicas <= self.replicas <= self.maxReplicas
        return self


class AutoscalerOptions(Strict):
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    idleTimeoutSeconds: Count


class RayCluster(Strict):
    rayVersion: str
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "None"]


class Spec(Strict):
    serveConfigV2: str
    upgradeStrategy: UpgradeStrategy
    rayClusterConfig: RayCluster


class Metadata(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: Spec


def documents(name: str) -> dict[str, Any]:
    found = yaml.safe_load_all((FOLDER / name).read_text())
    return {one["kind"]: one for one in found}


def service(name: str) -> RayService:
    return RayService.model_validate(documents(name)["RayService"])


def groups(one: RayService) -> list[HeadGroup | WorkerGroup]:
    cluster = one.spec.rayClusterConfig
    return [cluster.headGroupSpec, *cluster.workerGroupSpecs]


def check_pod(template: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, **template}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def resources(group: HeadGroup | WorkerGroup) -> dict[str, float]:
    [container] = group.template["spec"]["containers"]
    requests = container["resources"]["requests"]
    assert requests == container["resources"]["limits"]
    return {"CPU": float(requests["cpu"]), "GPU": float(requests.get("nvidia.com/gpu", 0))}


def test_there_is_one_for_cpus_and_one_for_gpus() -> None:
    assert FILES == ["cpu.yaml", "multi_gpu.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_kubernetes_and_kuberay_accept_it(name: str) -> None:
    kubernetes_validate.validate(documents(name)["PersistentVolumeClaim"], KUBERNETES, strict=True)
    for group in groups(service(name)):
        check_pod(group.template)


@pytest.mark.parametrize("name", FILES)
def test_serve_and_we_accept_the_application_in_it(name: str, tmp_path: Path) -> None:
    config = yaml.safe_load(service(name).spec.serveConfigV2)
    [application] = ServeDeploySchema.model_validate(config).applications
    settings = AppConfig.model_validate(application.args)
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}
    assert config["controller_options"] == {"runtime_env": {"env_vars": SETTINGS}}
    scaled = set()
    for one in config["applications"][0]["deployments"]:
        scaling = AutoscalingConfig.model_validate(one["autoscaling_config"])
        scaled.add(one["name"])
        if "LoadPolicy" in str(scaling.policy.policy_function):
            LoadPolicy(**scaling.policy.policy_kwargs)
    assert scaled == {"ClusterRouter", "AdapterGenerator", "LMReplica"}
    # What the learner writes has to be where every worker mounts the volume.
    claim = documents(name)["PersistentVolumeClaim"]
    for group in service(name).spec.rayClusterConfig.workerGroupSpecs:
        spec = group.template["spec"]
        [volume] = spec["volumes"]
        [mount] = spec["containers"][0]["volumeMounts"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert volume["name"] == mount["name"]
        assert str(settings.learner.uri).startswith(f"{mount['mountPath']}/")


@pytest.mark.parametrize("name", FILES)
def test_the_most_replicas_of_each_deployment_fit_on_the_most_workers(name: str) -> None:
    one = service(name)
    workers = one.spec.rayClusterConfig.workerGroupSpecs
    have = {
        kind: sum(g.maxReplicas * resources(g)[kind] for g in workers) for kind in ("CPU", "GPU")
    }
    need = {"CPU": 0.3, "GPU": 0.0}  # learner, refinery and proxies besides
    for deployment in yaml.safe_load(one.spec.serveConfigV2)["applications"][0]["deployments"]:
        asked = deployment.get("ray_actor_options", {"num_cpus": 0.1})
        count = deployment["autoscaling_config"]["max_replicas"]
        need["CPU"] += count * asked.get("num_cpus", 0)
        need["GPU"] += count * asked.get("num_gpus", 0)
    assert need["CPU"] <= have["CPU"]
    assert need["GPU"] <= have["GPU"]
    assert (need["GPU"] > 0) == (name == "multi_gpu.yaml")


@pytest.mark.parametrize("name", FILES)
def test_it_names_the_version_of_ray_that_is_tested(name: str) -> None:
    assert service(name).spec.rayClusterConfig.rayVersion == ray.__version__


def test_mistakes_are_seen() -> None:
    one = documents("cpu.yaml")["RayService"]
    cluster = one["spec"]["rayClusterConfig"]
    cluster["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(ValidationError, match="maxReplica"):
        RayService.model_validate(one)
    template = cluster["headGroupSpec"]["template"]
    template["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="resource"):
        check_pod(template)
