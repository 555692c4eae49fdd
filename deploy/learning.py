"""Clusters that follow the traffic: the learner's deployment, and the routers' side of it.

Routers send embeddings to the one learner and forget them; the learner publishes snapshots in a
folder; routers read them from there. So neither ever waits for the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from ray.serve.handle import DeploymentHandle

from adapter_gen.bundle import Bundle
from cluster_router.clusters import Assigner
from cluster_router.console.reports import LearnerReport, Place
from cluster_router.learning.tenants import TenantLearners, newer
from cluster_router.learning.worker import Batches, LearnerStatus, LearnerWorker, by_namespace
from cluster_router.outbox import Outbox
from cluster_router.tenants import TenantAssigners
from cluster_router.wire.errors import ConfigError, UnavailableError
from cluster_router.wire.types import FloatArray, Observation
from deploy.config import AppConfig, LearningConfig
from deploy.console import RemoteBoard, telling
from deploy.logs import join_serve
from deploy.reporting import INTERVAL_S, LearnerReporter, report_every
from lm_workers.models.source import default_cache


def clusters_uri(config: LearningConfig, bundle: Bundle) -> str:
    """Where the clusters of a bundle are kept: what one bundle learned is of no use to another.

    Nor where only its clusters differ: ids would name others, or prompts be embedded otherwise.
    """
    root = config.uri or str(default_cache() / "clusters")
    return f"{root.rstrip('/')}/{clusters_name(bundle)}"


def clusters_name(bundle: Bundle) -> str:
    """Names the clusters of a bundle, and so of a base model."""
    return f"{bundle.hypernetwork_id}-{bundle.clusters_id}"


def check_clusters(theirs: str, ours: str) -> None:
    """Refuse what a router of another bundle sends, as there are while one is being replaced.

    Raises:
        UnavailableError: the names differ.
    """
    if theirs != ours:
        raise UnavailableError(
            f"prompts of the clusters {theirs} are not for {ours}: the application's bundle or "
            "base model is being replaced; if this goes on, two services share one application"
        )


class LearnerReplica:
    """Serves a LearnerWorker. What was published before is where it goes on from."""

    def __init__(self, config: AppConfig, board: DeploymentHandle | None = None) -> None:
        join_serve()
        path = config.bundle_path
        if path is None:
            raise ConfigError("there is no bundle whose clusters could move; set `bundle`")
        bundle = Bundle.load(path, None)  # whether it fits the base model, the others check
        if bundle.snapshot.conditioning.shape[1] != bundle.snapshot.dim:
            raise ConfigError(
                "this bundle's hypernetwork is not conditioned on centroids, so its clusters "
                "cannot move; set `learner: {enabled: false}`",
                "learner",
            )
        learning = config.learner
        self._clusters = clusters_name(bundle)
        self._worker = LearnerWorker(
            TenantLearners(
                bundle.snapshot,
                clusters_uri(learning, bundle),
                learning.clusters,
                learning.max_namespaces,
            )
        )
        self._publishing = asyncio.get_running_loop().create_task(
            self._worker.publish_every(learning.publish_interval_s)
        )
        self._reporter = LearnerReporter()
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(report_every(INTERVAL_S, self._report)),
            *telling(board, self._tell),
        ]

    async def learn(self, batches: Batches, clusters: str) -> None:
        """See LearnerWorker.learn. `clusters` names those that the prompts were assigned among.

        Raises:
            UnavailableError: they are not this learner's.
        """
        check_clusters(clusters, self._clusters)
        await self._worker.learn(batches)

    async def status(self) -> LearnerStatus:
        """See LearnerWorker.status."""
        return self._worker.status()

    async def _report(self) -> None:
        self._reporter.report(self._worker.status())

    async def _tell(self, board: RemoteBoard, place: Place) -> None:
        status = self._worker.status()
        published = max((one.at for one in status.published.values()), default=None)
        failing = len(status.failures)
        report = LearnerReport(status.learned, status.refused, failing, published)
        await board.hear_learner(place, report)

    def check_health(self) -> None:
        """Let Serve replace a learner that publishes no more. A full disk is no reason to."""
        if self._publishing.done():
            raise UnavailableError("the learner's publishing has ended")


class RemoteLearner:
    """The learner, seen through its handle; `clusters` names the bundle's that it learns of."""

    def __init__(self, handle: DeploymentHandle, clusters: str) -> None:
        self._handle, self._clusters = handle, clusters

    async def learn(self, embeddings: list[tuple[str, FloatArray]]) -> None:
        """Have the learner learn from embeddings [d] of prompts, each with its namespace.

        Cancelling the call takes it back.
        """
        response = self._handle.learn.remote(by_namespace(embeddings), self._clusters)
        try:
            await response
        except asyncio.CancelledError:
            response.cancel()
            raise


class RouterLearning:
    """A router's part: embeddings go out, published snapshots come in. For use on an event loop.

    Args:
        config: the settings.
        bundle: None where nothing can be adapted.
        learner: None where nothing is learned; clusters then stay as `make` gives them.
        make: an Assigner for a namespace, over the bundle's clusters.

    Attributes:
        outbox: what goes to the learner; None where nothing is learned.
    """

    def __init__(
        self,
        config: LearningConfig,
        bundle: Bundle | None,
        learner: DeploymentHandle | None,
        make: Callable[[str], Assigner],
    ) -> None:
        self.outbox: Outbox[tuple[str, FloatArray]] | None = None
        if bundle is None or learner is None:
            self.assigners = TenantAssigners(make, None, config.max_namespaces)
            return
        published = partial(newer, clusters_uri(config, bundle))
        self.assigners = TenantAssigners(make, published, config.max_namespaces)
        self.assigners.load()
        self.outbox = Outbox(
            RemoteLearner(learner, clusters_name(bundle)).learn,
            "learner",
            config.batch_size,
            config.batch_interval_s,
            config.buffer_size,
        )
        loop = asyncio.get_running_loop()
        self._tasks = (
            loop.create_task(self.outbox.run()),
            loop.create_task(self.assigners.follow(config.poll_interval_s)),
        )

    def observe(self, seen: Observation) -> None:
        """Send the embedding of a prompt, and nothing else of it, to the learner."""
        if self.outbox is not None:
            self.outbox.add((seen.namespace, seen.embedding))
