"""The Serve application: binds the plain parts to each other.

    serve run deploy/config.yaml

Only here are deployments made of classes. Replicas, autoscaling and resources are set under
`deployments:` in the config file; the values below are what holds without it.
"""

# No postponed annotations here: Serve reads the type of `config` to validate the args against it.
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from deploy.affinity import router_config
from deploy.config import AppConfig
from deploy.console import BoardReplica
from deploy.learning import LearnerReplica
from deploy.parts import GeneratorReplica, LMReplica, RouterReplica
from deploy.refining import RefineryReplica

_FULL = BackpressureConfig(status_code=429, retry_after_s=1)
_DRAIN_S = 120
"""How long a replica that is being replaced may take to end the answers that it has begun."""
_HEALTH_S = 2
"""How often Serve looks whether a replica lives, so how long it may miss one that was killed."""


def build(config: AppConfig) -> Application:
    """Bind router, learner, refinery, generator, LM replicas and the console's board.

    Raises:
        pydantic.ValidationError: a setting is unknown or out of range.
        ConfigError: the bundle does not exist.
    """
    board = _board(config)
    generator = learner = refinery = None
    if config.bundle_path is not None:
        generator = (
            serve.deployment(GeneratorReplica)
            .options(
                name="AdapterGenerator",
                health_check_period_s=_HEALTH_S,
                ray_actor_options={"num_cpus": 0.1},
                request_router_config=router_config(config.routing),
            )
            .bind(config, board)
        )
        if config.learner.enabled:
            # Never more than one: it is the only writer of clusters.
            learner = (
                serve.deployment(LearnerReplica)
                .options(
                    name="CentroidLearner",
                    num_replicas=1,
                    health_check_period_s=_HEALTH_S,
                    ray_actor_options={"num_cpus": 0.1},
                )
                .bind(config, board)
            )
        if config.refinement.enabled:
            # Never more than one either, of refined updates.
            refinery = (
                serve.deployment(RefineryReplica)
                .options(
                    name="ClusterRefinery",
                    num_replicas=1,
                    health_check_period_s=_HEALTH_S,
                    ray_actor_options={"num_cpus": 0.1},
                )
                .bind(config)
            )
    # Serve must let every request through to the engine, which has the queues by cluster and says
    # at once when they are full: at its bound for a replica Serve would hold requests back, and try
    # again at growing intervals, which callers see as latency. Its own queues are for moments, or
    # while there is no replica; they are bounded for that.
    capacity = config.engine.max_sequences + config.engine.max_queued
    most = 16 * capacity
    lm = (
        serve.deployment(LMReplica)
        .options(
            name="LMReplica",
            max_ongoing_requests=most,
            max_queued_requests=most,
            backpressure_config=_FULL,
            graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=_DRAIN_S,
            ray_actor_options={"num_cpus": 0.5},
            health_check_period_s=_HEALTH_S,
            request_router_config=router_config(config.routing),
        )
        .bind(config, generator, board)
    )
    router = serve.deployment(serve.ingress()(RouterReplica)).options(
        name="ClusterRouter",
        health_check_period_s=_HEALTH_S,
        max_ongoing_requests=most,
        max_queued_requests=most,
        backpressure_config=_FULL,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=_DRAIN_S,
        ray_actor_options={"num_cpus": 0.1},
    )
    return router.bind(config, lm, generator, learner, refinery, board)


def _board(config: AppConfig) -> Application | None:
    """The console's board, never more than one: what it was told is nowhere else."""
    if not config.console.enabled:
        return None
    return (
        serve.deployment(BoardReplica)
        .options(
            name="StatusBoard",
            num_replicas=1,
            max_ongoing_requests=1000,
            ray_actor_options={"num_cpus": 0.05},
            # Each replica calls it each second, which is worth no line in a log.
            logging_config={"enable_access_log": False},
        )
        .bind()
    )
