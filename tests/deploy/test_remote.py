"""What callers are told where a replica is lost, however Serve's calls travel."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
import ray

from cluster_router.wire.errors import UnavailableError
from cluster_router.wire.types import Assignment, SamplingParams, TokenizedRequest
from deploy.remote import RemoteWorker


class Broken:
    """A handle whose streams end in `error`."""

    def __init__(self, error: Exception) -> None:
        self._error, self.cancelled = error, False
        self.generate = self

    def options(self, **_: object) -> Broken:
        return self

    def remote(self, *_: object, **__: object) -> Broken:
        return self

    async def __aiter__(self) -> AsyncIterator[None]:
        raise self._error
        yield

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.ActorDiedError(),
        ray.exceptions.ActorUnavailableError("gone", b"0" * 16),
        grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata()),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_lost_replica_is_told_as_unavailable(error: Exception) -> None:
    handle = Broken(error)
    request = TokenizedRequest("one", (1,), SamplingParams(), Assignment(key=None))
    with pytest.raises(UnavailableError, match="LM replica was lost"):
        async for _ in RemoteWorker(handle, "base").generate(request):
            pass
    assert handle.cancelled
