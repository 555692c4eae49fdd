"""Refinement of served clusters: the refinery's deployment, and the routers' side of it.

Routers send the prompts that may be learned from to the one refinery and forget them; it keeps
refined updates in a folder; routers see there which is the newest of a cluster, and generators read
it. So no request ever waits for a refinement.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from functools import partial

from ray.serve.handle import DeploymentHandle

from adapter_gen.bundle import Bundle
from adapter_gen.codec import decode_delta
from adapter_gen.generator import AdapterGenerator
from adapter_gen.refine import Refiner
from adapter_gen.refinery import ClusterRefinery, Offered, last_tokens
from adapter_gen.refinery_worker import RefineryStatus, RefineryWorker
from adapter_gen.update import LoraDelta, UpdateSpec
from cluster_router.outbox import Outbox
from cluster_router.refinements import NewestRefinements, Refinement, RefinementStore
from cluster_router.wire.errors import ConfigError, UnavailableError
from cluster_router.wire.types import AdapterKey, Observation, Place
from deploy.config import AppConfig
from deploy.learning import check_clusters, clusters_name, clusters_uri
from deploy.logs import join_serve
from deploy.reporting import INTERVAL_S, RefineryReporter, report_every
from lm_workers.device import pick_device
from lm_workers.models import describe_model, load_causal_lm, resolve_dtype, resolve_model

_NICENESS = 10
"""To the last there is, 19, from Ray's 15 and below the engine's (`deploy/placement.py`)."""
_BATCH = 16

logger = logging.getLogger(__name__)


def refinement_store(config: AppConfig, bundle: Bundle) -> RefinementStore | None:
    """Where refined updates of a bundle's clusters are; None where nothing is refined.

    Beside the clusters themselves: the ids of one mean nothing without the other.
    """
    if not config.refinement.enabled:
        return None
    return RefinementStore(f"{clusters_uri(config.learner, bundle)}/refined")


class RefineryReplica:
    """Serves a RefineryWorker. On a CPU it runs at low priority, beside the engine."""

    def __init__(self, config: AppConfig) -> None:
        join_serve()
        path = resolve_model(config.model)
        bundle_path = config.bundle_path
        if bundle_path is None:
            raise ConfigError("there is no bundle whose clusters could be refined; set `bundle`")
        bundle = Bundle.load(bundle_path, describe_model(path, config.name).fingerprint)
        self._clusters = clusters_name(bundle)
        store = refinement_store(config, bundle)
        assert store is not None, "bound only where it is enabled"
        refinery = config.refinement.refinery
        device = pick_device(config.refinement.device)
        if device == "cpu":
            os.nice(_NICENESS)
        model = load_causal_lm(path, resolve_dtype("auto", device), device)
        clusters, common = (
            Refiner(model, bundle.spec, bundle.bases, config)
            for config in (refinery.refine, refinery.common.refine)
        )
        self._worker = RefineryWorker(
            ClusterRefinery(
                clusters,
                common,
                AdapterGenerator(bundle).generate,
                partial(_recall, store, bundle.spec),
                refinery,
            ),
            store,
            bundle.spec,
            refinery,
        )
        self._refining = asyncio.get_running_loop().create_task(self._worker.run())
        self._reporter = RefineryReporter()
        self._reporting = asyncio.get_running_loop().create_task(
            report_every(INTERVAL_S, self._report)
        )

    async def offer(self, offered: list[Offered], clusters: str) -> None:
        """See RefineryWorker.offer. `clusters` names those that the prompts were assigned among.

        Raises:
            UnavailableError: they are not this refinery's.
        """
        check_clusters(clusters, self._clusters)
        await self._worker.offer(offered)

    async def status(self) -> RefineryStatus:
        """See RefineryWorker.status."""
        return self._worker.status()

    async def _report(self) -> None:
        self._reporter.report(self._worker.status())

    def check_health(self) -> None:
        """Let Serve replace a refinery that refines no more."""
        if self._refining.done():
            raise UnavailableError("the refinery has stopped")


def _recall(
    store: RefinementStore, spec: UpdateSpec, key: AdapterKey, place: Place
) -> LoraDelta | None:
    """What is kept of a place; None too where that cannot be read, and it is learned anew."""
    try:
        data = store.recall(place)
        return None if data is None else decode_delta(data, key, spec)
    except Exception as error:  # whatever the client of an object store raises
        logger.error("what a tenant's prompts had in common is learned anew: %s", error)
        return None


class RouterRefining:
    """A router's part: prompts go out, numbers of refinements come in. For use on an event loop.

    Args:
        config: the settings.
        bundle: None where nothing can be adapted.
        refinery: None where nothing is refined.
        lead: tokens that the tokenizer puts before any text.

    Attributes:
        outbox: what goes to the refinery; None where nothing is refined.
    """

    def __init__(
        self,
        config: AppConfig,
        bundle: Bundle | None,
        refinery: DeploymentHandle | None,
        lead: Sequence[int],
    ) -> None:
        self._config, self._lead = config.refinement, lead
        self.outbox: Outbox[Offered] | None = None
        self._newest: NewestRefinements | None = None
        store = None if bundle is None else refinement_store(config, bundle)
        if bundle is None or store is None or refinery is None:
            return
        self._newest = NewestRefinements(store)
        clusters = clusters_name(bundle)

        async def send(offered: list[Offered]) -> None:
            await refinery.offer.remote(offered, clusters)

        self.outbox = Outbox(send, "refinery", size=_BATCH)
        loop = asyncio.get_running_loop()
        self._tasks = (
            loop.create_task(self.outbox.run()),
            loop.create_task(self._newest.follow(config.learner.poll_interval_s)),
        )

    def refined(self, namespace: str, cluster: int) -> Refinement | None:
        """The newest refinement of a cluster in a namespace that allows it."""
        if self._newest is None or not self._config.allows(namespace):
            return None
        return self._newest.of(namespace, cluster)

    def observe(self, seen: Observation) -> None:
        """Send a prompt that chose its own cluster to the refinery, if its namespace allows it.

        None that holds an earlier answer: the update would learn from what was sampled under it.
        """
        chosen = seen.assignment
        if self.outbox is None or not self._config.allows(seen.namespace) or seen.answered:
            return
        if chosen.key is None or chosen.conditioning is None or chosen.similarity is None:
            return
        self.outbox.add(
            Offered(
                seen.namespace,
                chosen.key,
                chosen.conditioning,
                last_tokens(seen.prompt_tokens, self._config.refinery.prompt_tokens, self._lead),
            )
        )
