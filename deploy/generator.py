"""The generator replica: makes the updates of clusters, and archives of them."""

from __future__ import annotations

import asyncio

from ray.serve.handle import DeploymentHandle

from adapter_gen.export import export_peft, zip_files
from adapter_gen.generator import AdapterGenerator
from adapter_gen.update import LoraDelta
from cluster_router.console.reports import GeneratorReport, Place
from cluster_router.wire.errors import BundleError
from cluster_router.wire.forms import ExportForm
from cluster_router.wire.types import AdapterKey, Conditioning
from deploy.affinity import routing_stats
from deploy.config import AppConfig
from deploy.console import RemoteBoard, telling
from deploy.fit import load_bundle
from deploy.logs import join_serve
from deploy.refining import refinement_store
from deploy.reporting import INTERVAL_S, GeneratorReporter, report_every
from lm_workers.models import describe_model, load_lm_head, public_model, resolve_model


class GeneratorReplica:
    """Serves an AdapterGenerator."""

    def __init__(self, config: AppConfig, board: DeploymentHandle | None = None) -> None:
        join_serve()
        self._path = resolve_model(config.model)
        self._base_model, self._base_remark = public_model(config.model)
        bundle = load_bundle(config, describe_model(self._path, config.name))
        if bundle is None:
            raise BundleError("there is no bundle to generate from; set `bundle`")
        self._bundle = bundle
        self._generator = AdapterGenerator(
            bundle,
            config.generator.cache_bytes,
            config.generator.device,
            None if (store := refinement_store(config, bundle)) is None else store.load,
        )
        self._exporting = asyncio.Lock()
        self._reporter = GeneratorReporter()
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(report_every(INTERVAL_S, self._report)),
            *telling(board, self._tell),
        ]

    async def get(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        """See AdapterGenerator.get."""
        return await self._generator.get(key, conditioning)

    async def record_routing_stats(self) -> dict[str, list[str]]:
        """What this replica has at hand, for the request router."""
        return routing_stats(self._generator.resident)

    async def _report(self) -> None:
        self._reporter.report(self._generator.stats())

    async def _tell(self, board: RemoteBoard, place: Place) -> None:
        stats = self._generator.stats()
        report = GeneratorReport(stats.generated, stats.failed, stats.in_flight, stats.entries)
        await board.hear_generator(place, report)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `deploy/autoscaling.py` counts: updates being generated, or waiting to be."""
        return {"misses": self._generator.stats().in_flight}

    async def export(
        self, key: AdapterKey, conditioning: Conditioning | None, form: ExportForm
    ) -> bytes:
        """The update as a zip archive of a PEFT adapter."""
        delta = await self._generator.get(key, conditioning)
        async with self._exporting:  # one at a time: each holds an LM head in float32
            return await asyncio.to_thread(self._archive, delta, form)

    def _archive(self, delta: LoraDelta, form: ExportForm) -> bytes:
        """Seconds of reading, multiplying and packing: not for the event loop."""
        bundle, head = self._bundle, load_lm_head(self._path)
        files = export_peft(
            delta,
            bundle.spec,
            bundle.bases,
            self._base_model,
            head,
            form=form,
            base_remark=self._base_remark,
        )
        return zip_files(files)
