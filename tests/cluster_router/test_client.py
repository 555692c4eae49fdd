"""The clients over a stand-in for a Serve handle: calls run on an event loop in another thread."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from cluster_router.client import ChameleonClient, SyncChameleonClient
from cluster_router.router import ClusterRouter
from cluster_router.wire.errors import (
    ContextLengthError,
    EngineError,
    OverloadedError,
    RequestError,
    UnknownClusterError,
)
from cluster_router.wire.types import Message, SamplingParams

END = object()


class RemoteError(Exception):
    """As Ray does: what failed elsewhere arrives inside another exception."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"remote: {cause}")
        self.cause = cause


class LocalResponse:
    def __init__(self, future: Future[Any]) -> None:
        self.future = future
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self.future).__await__()

    def result(self, *, timeout_s: float | None = None) -> Any:
        return self.future.result(timeout_s)

    def cancel(self) -> None:
        self.cancelled = True
        self.future.cancel()


class LocalStream:
    def __init__(self, items: queue.Queue[Any], future: Future[Any]) -> None:
        self.items = items
        self.future = future
        self.cancelled = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = self.items.get(timeout=10)
        if item is END:
            raise StopIteration
        if isinstance(item, Exception):
            raise item
        return item

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        item = await asyncio.to_thread(self.items.get, timeout=10)
        if item is END:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True
        self.future.cancel()


class LocalMethod:
    def __init__(self, remote: Callable[..., Any]) -> None:
        self.remote = remote


class LocalHandle:
    """Runs a ClusterRouter's methods as a deployment would. `calls` are the responses so far."""

    def __init__(self, router: ClusterRouter, loop: asyncio.AbstractEventLoop) -> None:
        self.router = router
        self.loop = loop
        self.calls: list[Any] = []

    def options(self, *, stream: bool) -> LocalHandle:
        assert stream
        return self

    def __getattr__(self, name: str) -> LocalMethod:
        return LocalMethod(self._stream if name == "stream" else self._unary(name))

    def _unary(self, name: str) -> Callable[..., LocalResponse]:
        async def call(*args: Any) -> Any:
            try:
                result = getattr(self.router, name)(*args)
                return await result if isinstance(result, Coroutine) else result
            except Exception as error:
                raise RemoteError(RemoteError(error)) from None

        def remote(*args: Any) -> LocalResponse:
            future = asyncio.run_coroutine_threadsafe(call(*args), self.loop)
            self.calls.append(LocalResponse(future))
            return self.calls[-1]

        return remote

    def _stream(self, *args: Any) -> LocalStream:
        items: queue.Queue[Any] = queue.Queue()

        async def call() -> None:
            try:
                async for chunk in self.router.stream(*args):
                    items.put(chunk)
                items.put(END)
            except Exception as error:
                items.put(RemoteError(error))

        self.calls.append(LocalStream(items, asyncio.run_coroutine_threadsafe(call(), self.loop)))
        return self.calls[-1]


@pytest.fixture
def handle(router: ClusterRouter) -> Iterator[LocalHandle]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield LocalHandle(router, loop)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(params=["async", "sync"])
def ask(request: pytest.FixtureRequest, handle: LocalHandle) -> Callable[..., Coroutine]:
    """Call a client method by name, on either client; a stream is read to its end."""

    async def call(method: str, *args: Any, **options: Any) -> Any:
        if request.param == "async":
            answer = getattr(ChameleonClient(handle), method)(*args, **options)
            return [c async for c in answer] if method == "stream" else await answer
        answer = getattr(SyncChameleonClient(handle), method)(*args, **options)
        return list(answer) if method == "stream" else answer

    return call


async def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_generate(ask: Callable[..., Coroutine], worker: Any) -> None:
    sampling = SamplingParams(max_tokens=2, seed=4)
    result = await ask("generate", "judge law", sampling=sampling, request_id="mine")
    assert (result.text, result.request_id) == ("w0 w1 ", "mine")
    assert result.adaptation.cluster == 20
    assert worker.requests[0].sampling == sampling


async def test_stream(ask: Callable[..., Coroutine], handle: LocalHandle) -> None:
    chunks = await ask("stream", "judge law", sampling=SamplingParams(max_tokens=4))
    assert "".join(chunk.text for chunk in chunks) == "w0 w1 w2 w3 "
    assert not handle.calls[0].cancelled


async def test_a_prompt_may_be_text_tokens_or_messages(
    ask: Callable[..., Coroutine], tokenizer: Any
) -> None:
    text = await ask("assign", "sail wind")
    tokens = await ask("assign", tokenizer.encode("sail wind"))
    messages = await ask("assign", [Message(role="user", content="sail wind")])
    assert text.cluster == tokens.cluster == messages.cluster == 10
    assert text.similarity == tokens.similarity == messages.similarity


async def test_adaptation_is_passed_on(ask: Callable[..., Coroutine]) -> None:
    assert (await ask("assign", "sail wind", adaptation=20)).cluster == 20
    assert (await ask("generate", "sail wind", adaptation="off")).adaptation.mode == "off"


async def test_namespace_and_learn_are_passed_on(
    ask: Callable[..., Coroutine], observed: list[Any]
) -> None:
    await ask("generate", "law", namespace="a")
    await ask("stream", "law", learn=False)
    await ask("stream", "law", namespace="b")
    await ask("assign", "law", namespace="c")
    assert [seen.namespace for seen in observed] == ["a", "b"]
    assert [info.id for info in await ask("clusters", "a")] == [10, 20]
    with pytest.raises(RequestError, match="namespace must be at most 128 printable") as caught:
        await ask("generate", "law", namespace="\n")
    assert caught.value.param == "namespace"


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_the_deadline_is_passed_on(
    ask: Callable[..., Coroutine], worker: Any, method: str
) -> None:
    await ask(method, "law", timeout_s=2.5)
    await ask(method, "law")
    sent = [(request.timeout_s, request.whole) for request in worker.requests]
    assert sent == [(2.5, method == "generate"), (None, method == "generate")]


async def test_clusters(ask: Callable[..., Coroutine]) -> None:
    assert [info.id for info in await ask("clusters")] == [10, 20]


async def test_a_dry_run_needs_no_room_for_an_answer(ask: Callable[..., Coroutine]) -> None:
    assert (await ask("assign", [2] * 32)).key is not None


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize(
    ("prompt", "options", "error", "param"),
    [
        ("law", {"adaptation": 99}, UnknownClusterError, "adaptation"),
        ("law " * 40, {}, ContextLengthError, "prompt"),
        ([], {}, RequestError, "prompt"),
        ([-1], {}, RequestError, "prompt_tokens"),
        ("law", {"adaptation": "maybe"}, RequestError, "adaptation"),
    ],
)
async def test_errors_arrive_as_they_were_raised(
    ask: Callable[..., Coroutine],
    method: str,
    prompt: Any,
    options: dict[str, Any],
    error: type[RequestError],
    param: str,
) -> None:
    with pytest.raises(error) as caught:
        await ask(method, prompt, **options)
    assert type(caught.value) is error
    assert caught.value.param == param


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_errors_of_the_worker_keep_their_fields(
    ask: Callable[..., Coroutine], worker: Any, method: str
) -> None:
    worker.fails_after, worker.failure = 1, OverloadedError("full", retry_after=7)
    with pytest.raises(OverloadedError) as caught:
        await ask(method, "law")
    assert caught.value.retry_after == 7
    assert isinstance(caught.value.__cause__, RemoteError)


async def test_other_errors_pass_through(ask: Callable[..., Coroutine], worker: Any) -> None:
    worker.fails_after, worker.failure = 0, ZeroDivisionError("elsewhere")
    with pytest.raises(RemoteError, match="elsewhere"):
        await ask("generate", "law")


async def test_a_cut_off_stream_is_an_error(ask: Callable[..., Coroutine], worker: Any) -> None:
    worker.cut_after = 1
    with pytest.raises(EngineError):
        await ask("generate", "law")


async def test_closing_an_asynchronous_stream_cancels_it(handle: LocalHandle, worker: Any) -> None:
    stream = ChameleonClient(handle).stream("law", sampling=SamplingParams(max_tokens=20))
    assert (await anext(stream)).text == "w0 "
    await stream.aclose()
    assert handle.calls[0].cancelled


def test_closing_a_blocking_stream_cancels_it(handle: LocalHandle) -> None:
    stream = SyncChameleonClient(handle).stream("law", sampling=SamplingParams(max_tokens=20))
    assert next(stream).text == "w0 "
    stream.close()
    assert handle.calls[0].cancelled


async def test_cancelling_a_call_cancels_the_request(handle: LocalHandle, worker: Any) -> None:
    worker.stall = asyncio.Event()
    task = asyncio.create_task(ChameleonClient(handle).generate("law"))
    await wait_until(lambda: bool(worker.requests))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.calls[0].cancelled
    await wait_until(lambda: worker.closed == 1)


def test_a_blocking_call_that_takes_too_long_is_cancelled(handle: LocalHandle, worker: Any) -> None:
    worker.stall = asyncio.Event()
    with pytest.raises(TimeoutError):
        SyncChameleonClient(handle, timeout_s=0.1).generate("law")
    assert handle.calls[0].cancelled
