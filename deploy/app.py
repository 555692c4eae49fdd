"""The Serve application: binds the plain parts to each other.

    serve run deploy/config.yaml

Only here are deployments made of classes; each is in a module of its own, so that a process imports
no more than it runs. Replicas, autoscaling and resources are set under
`deployments:` in the config file; the values below are what holds without it.
"""

# No postponed annotations here: Serve reads the type of `config` to validate the args against it.
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import BackpressureConfig

from deploy.affinity import router_config
from deploy.config import AppConfig
from deploy.console import BoardReplica
from deploy.fit import check_bundle
from deploy.generator import GeneratorReplica
from deploy.learning import LearnerReplica
from deploy.lm import LMReplica
from deploy.placement import lm_resources
from deploy.refining import RefineryReplica
from deploy.router import RouterReplica

_DRAIN_S = 120
"""How long a replica that is being replaced may take to end the answers that it has begun."""

_HEALTH_S = 2
"""How often Serve looks whether a replica lives, so how long it may miss one that was killed."""

_FRONT: dict[str, Any] = {
    "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
    "graceful_shutdown_wait_loop_s": 0.5,
    "graceful_shutdown_timeout_s": _DRAIN_S,
    "health_check_period_s": _HEALTH_S,
}
"""Of the deployments that hold callers' requests."""


def build(config: AppConfig) -> Application:
    """Bind router, learner, refinery, generator, LM replicas and the console's board.

    Raises:
        pydantic.ValidationError: a setting is unknown or out of range.
        ConfigError: the bundle does not exist.
        BundleError: it is damaged, or not that of the base model.
    """
    check_bundle(config)
    board = _board().bind() if config.console.enabled else None
    generator = learner = refinery = None
    if config.bundle is not None:
        generator = _generator(config).bind(config, board)
        if config.learner.enabled:
            # Never more than one: it is the only writer of clusters.
            learner = _single(LearnerReplica, "CentroidLearner").bind(config, board)
        if config.refinement.enabled:
            # Never more than one either, of refined updates.
            refinery = _single(RefineryReplica, "ClusterRefinery").bind(config)
    lm = _lm(config).bind(config, generator, board)
    return _router(config).bind(config, lm, generator, learner, refinery, board)


def _single(replica: Callable[..., Any], name: str) -> Deployment:
    return serve.deployment(replica).options(
        name=name,
        num_replicas=1,
        health_check_period_s=_HEALTH_S,
        ray_actor_options={"num_cpus": 0.1},
    )


def _generator(config: AppConfig) -> Deployment:
    return serve.deployment(GeneratorReplica).options(
        name="AdapterGenerator",
        health_check_period_s=_HEALTH_S,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=router_config(config.routing),
    )


def _board() -> Deployment:
    """The console's board, never more than one: what it was told is nowhere else."""
    return serve.deployment(BoardReplica).options(
        name="StatusBoard",
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.05},
        # Each replica calls it each second, which is worth no line in a log.
        logging_config={"enable_access_log": False},
    )


def _most(config: AppConfig) -> int:
    """Requests that Serve lets through to a replica, and as many again that it may hold.

    It must let every request through to the engine, which has the queues by cluster and says at
    once when they are full: at its bound for a replica Serve would hold requests back, and try
    again at growing intervals, which callers see as latency. Its own queues are for moments, or
    while there is no replica; they are bounded for that.
    """
    return 16 * (config.engine.max_sequences + config.engine.max_queued)


def _lm(config: AppConfig) -> Deployment:
    return serve.deployment(LMReplica).options(
        name="LMReplica",
        max_ongoing_requests=_most(config),
        max_queued_requests=_most(config),
        ray_actor_options=lm_resources(config.engine),
        request_router_config=router_config(config.routing),
        **_FRONT,
    )


def _router(config: AppConfig) -> Deployment:
    return serve.deployment(serve.ingress()(RouterReplica)).options(
        name="ClusterRouter",
        max_ongoing_requests=_most(config),
        max_queued_requests=_most(config),
        ray_actor_options={"num_cpus": 0.1},
        **_FRONT,
    )
