"""RequestLog: prompts and answers of the tenants that allow it, as text to train a bundle on.

Each tenant's is a folder of gzipped JSON lines, which `chameleon data` reads as one domain. A
part is rewritten whole until it is full, so a reader never sees half of one, on disk or in an
object store. The oldest parts make room for new ones.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn
from urllib.parse import quote

from cluster_router.files import Folder, digest
from cluster_router.router import Worker
from cluster_router.wire.types import TokenChunk, TokenizedRequest

UNNAMED = "no-namespace"
"""Folder of requests that name no namespace."""
PART_BYTES = 2**20
"""Text of one part, before compression."""

_MOST_NAME = 255  # what file systems take

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Part:
    """The part of a tenant's log that is being filled."""

    folder: Folder
    name: str
    rows: list[bytes] = field(default_factory=list)
    size: int = 0
    saved: int = 0  # rows that the file holds


class RequestLog:
    """Collects rows, and writes them from time to time. For one event loop.

    Args:
        uri: a folder or a URI such as `s3://bucket/requests`; a folder in it for each namespace.
        writer: tells this process's files from those of others.
        allows: whether a namespace is logged.
        decode: text of a prompt's tokens.
        max_bytes: most text of one namespace that is kept, before compression.
    """

    def __init__(
        self,
        uri: str,
        writer: str,
        allows: Callable[[str], bool],
        decode: Callable[[Sequence[int]], str],
        max_bytes: int,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._uri, self._writer = uri.rstrip("/"), writer
        self._allows, self._decode = allows, decode
        self._part_bytes = part_bytes
        self._most_parts = max(1, max_bytes // part_bytes)
        self._filling: dict[str, _Part] = {}
        self._full: list[_Part] = []
        self._failing: set[str] = set()
        self._begun = 0

    def wants(self, request: TokenizedRequest) -> bool:
        """Whether `request` is to be logged."""
        return request.learn and self._allows(request.namespace)

    def add(self, request: TokenizedRequest, answer: str) -> None:
        """Take a prompt and its whole answer."""
        row = {
            "text": self._decode(request.prompt_tokens) + answer,
            "source": request.request_id,
            "cluster": request.assignment.cluster,
        }
        line = json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n"
        part = self._filling.get(request.namespace)
        if part is None:
            part = self._filling[request.namespace] = self._begin(request.namespace)
        part.rows.append(line)
        part.size += len(line)
        if part.size >= self._part_bytes:
            self._full.append(self._filling.pop(request.namespace))
            del self._full[: -self._most_parts]  # of a disk that stays full, memory must not

    async def run(self, interval_s: float) -> NoReturn:
        """Write each `interval_s`, for ever."""
        while True:
            await asyncio.sleep(interval_s)
            await self.flush()

    async def flush(self) -> None:
        """Write what is new. What cannot be written is logged, and tried again next time."""
        full, self._full = self._full, []
        kept = [part for part in full if not await self._save(part)]
        self._full = [*kept, *self._full][-self._most_parts :]
        for part in [*self._filling.values()]:
            await self._save(part)

    async def _save(self, part: _Part) -> bool:
        """Write what is new in `part`. False if it cannot be written: others' parts may still."""
        count, folder = len(part.rows), part.folder.root
        if count == part.saved:
            return True
        try:
            await asyncio.to_thread(self._write, part, b"".join(part.rows))
        except Exception as error:  # whatever the client of an object store raises
            if folder not in self._failing:
                logger.error("requests are not logged: %s", str(error) or repr(error))
            self._failing.add(folder)
            return False
        part.saved = count
        self._failing.discard(folder)
        return True

    def _begin(self, namespace: str) -> _Part:
        self._begun += 1
        file = f"{time.time_ns() // 10**6:013d}-{self._writer}-{self._begun:06d}.jsonl.gz"
        return _Part(Folder(f"{self._uri}/{folder_of(namespace)}", "request_log"), file)

    def _write(self, part: _Part, lines: bytes) -> None:
        part.folder.write(part.name, gzip.compress(lines, compresslevel=6, mtime=0))
        if not part.saved:  # a new file: names begin with the time, so the first are the oldest
            names = sorted(name for name in part.folder.names() if name.endswith(".jsonl.gz"))
            for name in names[: -self._most_parts]:
                part.folder.remove(name)


def folder_of(namespace: str) -> str:
    """Name of a namespace's folder: its own, where that can be a file's name.

    Other characters are written as in URLs. What is too long then ends in `+` and a digest.
    """
    name = quote(namespace, safe="")
    if name.startswith(".") or name == UNNAMED:
        name = f"%{ord(name[0]):X}{name[1:]}"
    if len(name) > _MOST_NAME:  # no other has a `+`: it is written as %2B
        end = f"+{digest(namespace.encode())}"
        name = re.sub("%.?$", "", name[: _MOST_NAME - len(end)]) + end
    return name or UNNAMED


class LoggedWorker:
    """Satisfies Worker: what `worker` answers, shown to a log once it is complete."""

    def __init__(self, worker: Worker, log: RequestLog) -> None:
        self._worker, self._log = worker, log

    async def generate(self, request: TokenizedRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stream the answer to `request`. Raises what the worker raises."""
        wanted = self._log.wants(request)
        texts: list[str] = []
        chunks = self._worker.generate(request)
        try:
            async for chunk in chunks:
                if wanted:
                    texts.append(chunk.text)
                    if chunk.finish_reason is not None:
                        self._log.add(request, "".join(texts))
                yield chunk
        finally:
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()
