"""Generators and LM replicas as others see them: through their Serve handles."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import ray
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from adapter_gen.update import LoraDelta
from cluster_router.wire.errors import UnavailableError
from cluster_router.wire.forms import ExportForm
from cluster_router.wire.types import (
    AdapterKey,
    Conditioning,
    TokenChunk,
    TokenizedRequest,
)

_LOST = (
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ReplicaUnavailableError,
    grpc.RpcError,
)
"""What a call raises whose replica is gone, or out of reach."""


class RemoteGenerator:
    """The generators, seen through their handle. Satisfies AdapterSource and Exporter.

    Calls for one update go to one generator, so that replicas which miss on it together share its
    generation.

    Without a bundle there is none, and no request is ever assigned an update.
    """

    def __init__(self, handle: DeploymentHandle | None) -> None:
        self._handle = handle

    async def get(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        """See AdapterGenerator.get."""
        handle = self._deployed().options(session_id=key.id)
        return await handle.get.remote(key, conditioning)

    async def export(
        self, key: AdapterKey, conditioning: Conditioning | None, form: ExportForm
    ) -> bytes:
        """See GeneratorReplica.export."""
        handle = self._deployed().options(session_id=key.id)
        return await handle.export.remote(key, conditioning, form)

    def _deployed(self) -> DeploymentHandle:
        if self._handle is None:
            raise UnavailableError("this service runs without a bundle; set `bundle` to adapt")
        return self._handle


class RemoteWorker:
    """The LM replicas, seen through their handle. Satisfies Worker.

    Args:
        handle: theirs.
        base: content id of the base model that requests are tokenised for; no other answers them.
    """

    def __init__(self, handle: DeploymentHandle, base: str) -> None:
        self._handle, self._base = handle, base
        # What passes here is of importable classes: the plain pickle is the quicker one.
        self._streaming = handle.options(
            stream=True, request_serialization="pickle", response_serialization="pickle"
        )

    async def generate(self, request: TokenizedRequest) -> AsyncIterator[TokenChunk]:
        """Stream from a replica that has the update, where one has room; closing cancels there."""
        key = request.assignment.key
        # Serve's router finds the key and the base model here: see deploy/affinity.py.
        handle = self._streaming.options(session_id="" if key is None else key.id)
        chunks = handle.generate.remote(request, base=self._base)
        try:
            async for chunk in chunks:
                yield chunk
        except _LOST as error:
            raise UnavailableError("An LM replica was lost; send the request again.") from error
        finally:
            chunks.cancel()  # of no effect once the stream has ended

    async def ready(self) -> bool:
        """Whether a replica answers."""
        return await self._handle.ready.remote()
