"""Python clients for processes that hold a Serve handle to the service.

    client = ChameleonClient(serve.get_app_handle("chameleon"))
    async for chunk in client.stream("Dear customer,", sampling=SamplingParams(max_tokens=64)):
        print(chunk.text, end="")

`SyncChameleonClient` is the same for code without an event loop. Both raise the errors of
`cluster_router.wire.errors` as the service raised them, with Ray's account as their `__cause__`.
Errors of Ray itself (a full queue, a dead actor) pass through unchanged. Nothing here imports ray:
a handle is whatever has the methods of `Handle`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from typing import Any, Literal, NoReturn, ParamSpec, Protocol, TypedDict, TypeVar, Unpack

from pydantic import ValidationError

from cluster_router.wire.errors import ChameleonError, RequestError
from cluster_router.wire.types import (
    DEFAULT_NAMESPACE,
    Assignment,
    ClusterInfo,
    GenerateRequest,
    GenerateResult,
    Message,
    SamplingParams,
    TokenChunk,
)

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or the messages of a chat."""

AdaptationMode = Literal["auto", "off"] | int
P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Options(TypedDict, total=False):
    """Keywords of a request. What is left out, or None, is as `GenerateRequest` has it.

    Attributes:
        sampling: how tokens are chosen.
        adaptation: `auto`, `off`, or the number of a cluster.
        namespace: the tenant whose clusters are used.
        learn: whether clusters may learn from the prompt.
        timeout_s: longest that the answer may take, in seconds.
        request_id: names the request in the service's log; by default one is made.
    """

    sampling: SamplingParams | None
    adaptation: AdaptationMode
    namespace: str
    learn: bool
    timeout_s: float | None
    request_id: str


class Response(Protocol[T_co]):
    """The part of Serve's DeploymentResponse used here."""

    def __await__(self) -> Generator[Any, None, T_co]: ...
    def result(self, *, timeout_s: float | None = None) -> T_co: ...  # noqa: D102
    def cancel(self) -> None: ...  # noqa: D102


class ResponseStream(Protocol[T_co]):
    """The part of Serve's DeploymentResponseGenerator used here."""

    def __iter__(self) -> Iterator[T_co]: ...
    def __aiter__(self) -> AsyncIterator[T_co]: ...
    def cancel(self) -> None: ...  # noqa: D102


class Method(Protocol[P, T_co]):
    """A method of a deployment."""

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> T_co: ...  # noqa: D102


class Handle(Protocol):
    """The part of Serve's DeploymentHandle used here, for a deployment of ClusterRouter."""

    @property
    def generate(self) -> Method[[GenerateRequest], Response[GenerateResult]]: ...  # noqa: D102
    @property
    def stream(self) -> Method[[GenerateRequest], ResponseStream[TokenChunk]]: ...  # noqa: D102
    @property
    def assign(self) -> Method[[GenerateRequest], Response[Assignment]]: ...  # noqa: D102
    @property
    def clusters(self) -> Method[[str], Response[list[ClusterInfo]]]: ...  # noqa: D102
    def options(self, *, stream: bool) -> Handle: ...  # noqa: D102


class ChameleonClient:
    """Asynchronous client. Cancelling a call, or closing a stream, cancels the request."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> GenerateResult:
        """Answer `prompt` whole.

        Raises:
            ChameleonError: whatever the service raised.
        """
        request = _request(prompt, options)
        return await _wait(self._handle.generate.remote(request))

    async def stream(
        self, prompt: Prompt, **options: Unpack[Options]
    ) -> AsyncGenerator[TokenChunk, None]:
        """Stream the answer to `prompt`.

        To leave before its end, close it (`contextlib.aclosing`): a loop that merely breaks is
        noticed when the generator is collected.

        Raises:
            ChameleonError: whatever the service raised, with the first chunk or later.
        """
        request = _request(prompt, options)
        chunks = self._handle.options(stream=True).stream.remote(request)
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            _raise_own(error)
        except BaseException:  # cancelled, or closed before its end: Serve would run on
            chunks.cancel()
            raise

    async def assign(
        self,
        prompt: Prompt,
        *,
        adaptation: AdaptationMode = "auto",
        namespace: str = DEFAULT_NAMESPACE,
    ) -> Assignment:
        """What `prompt` would run under. Nothing is generated, and nothing learned."""
        request = _dry_run(prompt, adaptation, namespace)
        return await _wait(self._handle.assign.remote(request))

    async def clusters(self, namespace: str = DEFAULT_NAMESPACE) -> list[ClusterInfo]:
        """Every cluster that `namespace` uses now."""
        return await _wait(self._handle.clusters.remote(namespace))


class SyncChameleonClient:
    """Blocking client, for use outside an event loop.

    Args:
        handle: see `Handle`.
        timeout_s: longest wait for a whole answer, in seconds; None waits for ever. A stream has
            no limit.
    """

    def __init__(self, handle: Handle, timeout_s: float | None = None) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> GenerateResult:
        """Answer `prompt` whole.

        Raises:
            ChameleonError: whatever the service raised.
            TimeoutError: the answer took longer than `timeout_s`; the request is cancelled.
        """
        request = _request(prompt, options)
        return self._wait(self._handle.generate.remote(request))

    def stream(
        self, prompt: Prompt, **options: Unpack[Options]
    ) -> Generator[TokenChunk, None, None]:
        """Stream the answer to `prompt`; closing the generator cancels the request.

        Raises:
            ChameleonError: whatever the service raised, with the first chunk or later.
        """
        request = _request(prompt, options)
        chunks = self._handle.options(stream=True).stream.remote(request)
        try:
            yield from chunks
        except Exception as error:
            _raise_own(error)
        except BaseException:  # interrupted, or closed before its end: Serve would run on
            chunks.cancel()
            raise

    def assign(
        self,
        prompt: Prompt,
        *,
        adaptation: AdaptationMode = "auto",
        namespace: str = DEFAULT_NAMESPACE,
    ) -> Assignment:
        """What `prompt` would run under. Nothing is generated, and nothing learned."""
        request = _dry_run(prompt, adaptation, namespace)
        return self._wait(self._handle.assign.remote(request))

    def clusters(self, namespace: str = DEFAULT_NAMESPACE) -> list[ClusterInfo]:
        """Every cluster that `namespace` uses now."""
        return self._wait(self._handle.clusters.remote(namespace))

    def _wait(self, response: Response[T]) -> T:
        try:
            return response.result(timeout_s=self._timeout_s)
        except (TimeoutError, KeyboardInterrupt):
            response.cancel()
            raise
        except Exception as error:
            _raise_own(error)


async def _wait(response: Response[T]) -> T:
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except Exception as error:
        _raise_own(error)


def _raise_own(error: Exception) -> NoReturn:
    """Raise the error of our own that Ray wrapped, once for each hop, in `error`."""
    inner: Any = error
    while (cause := getattr(inner, "cause", None)) is not None:
        inner = cause
    if isinstance(inner, ChameleonError) and inner is not error:
        raise inner from error
    raise error


def _dry_run(prompt: Prompt, adaptation: AdaptationMode, namespace: str) -> GenerateRequest:
    """A request that needs no room for an answer, and teaches nothing."""
    nothing = SamplingParams(max_tokens=0)
    return _request(
        prompt, Options(sampling=nothing, adaptation=adaptation, namespace=namespace, learn=False)
    )


def _request(prompt: Prompt, options: Options) -> GenerateRequest:
    if isinstance(prompt, str):
        field = "prompt"
    else:
        field = "messages" if prompt and isinstance(prompt[0], Message) else "prompt_tokens"
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return GenerateRequest.model_validate({field: prompt, **given})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"{where}: {first['msg']}", str(first["loc"][0])) from None
