"""Fetch one wheel from the package index that pip is set up for, and pick up where it broke off."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

import certifi
from tqdm import tqdm

from cluster_router.wire.errors import ModelError

if TYPE_CHECKING:  # of no use to the many processes that find what they need
    import httpx

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""How often in a row a download may break off without a single new byte."""
BACKOFF_S = 1.0
TIMEOUT_S, CONNECT_TIMEOUT_S = 30.0, 15.0


def find_wheel(requirement: str) -> str:
    """URL of the wheel that pip would install for `requirement` (`name==version`).

    pip itself is asked, so its index, mirrors, proxy and certificates hold here too.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError("pip is not installed in this environment; run python -m ensurepip")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-input"]
    command += ["--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", "-"]
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    answer = subprocess.run(
        [*command, requirement], capture_output=True, text=True, env=env, check=False
    )
    if answer.returncode != 0:
        raise ModelError(f"pip cannot find {requirement}: {_pip_reason(answer.stderr)}")
    try:
        return str(json.loads(answer.stdout)["install"][0]["download_info"]["url"])
    except (json.JSONDecodeError, LookupError, TypeError) as error:
        raise ModelError(
            f"pip gave no usable report for {requirement}; update it (needs pip 23 or later)"
        ) from error


def _pip_reason(stderr: str) -> str:
    if "connection broken" in stderr:
        return "your package index cannot be reached"
    return (stderr.strip().splitlines() or ["it gave no reason"])[-1]


def download(url: str, target: Path, sha256: str) -> Path:
    """Bring `url` (http, https or file) to `target`; afterwards its SHA-256 is `sha256`.

    Bytes gather in `target` + `.part`, which outlives an interruption: the next call asks only for
    the rest. The caller holds a lock on `target`.

    Raises:
        ModelError: the server cannot be reached, or what it serves is not the pinned file.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    resumed = part.exists()
    _gather(url, part)
    if resumed and file_sha256(part) != sha256:
        # The kept bytes may be the ones at fault: give a clean start one chance.
        part.unlink()
        _gather(url, part)
    found = file_sha256(part)
    if found != sha256:
        part.unlink()
        raise ModelError(
            f"{_shown(url)} has SHA-256 {found}, but {sha256} is pinned; "
            "your index serves another file under this name"
        )
    part.replace(target)
    return target


class _BrokenOffError(Exception):
    """An answer after which another try may succeed."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gather(url: str, part: Path) -> None:
    import httpx

    parts = urlsplit(url)
    if parts.scheme == "file":
        shutil.copyfile(url2pathname(parts.path), part)
        return
    timeout = httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    with httpx.Client(verify=_trust(), timeout=timeout, follow_redirects=True) as client:
        failures = 0
        while True:
            before = _size(part)
            try:
                _stream(client, url, part)
                return
            except (httpx.TransportError, _BrokenOffError) as error:
                failures = 1 if _size(part) > before else failures + 1
                if failures == ATTEMPTS:
                    raise ModelError(
                        f"the download of {_shown(url)} broke off ({error}); start again when the "
                        "network is back, it goes on from where it stopped"
                    ) from error
                logger.warning("download broke off (%s), trying again", error)
                time.sleep(BACKOFF_S * failures)


def _stream(client: httpx.Client, url: str, part: Path) -> None:
    """One request: append the missing bytes to `part`."""
    have = _size(part)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return  # every byte is here already
            part.unlink(missing_ok=True)
            raise _BrokenOffError("the server cannot go on from there")
        if response.is_server_error:
            raise _BrokenOffError(f"the server answered {response.status_code}")
        if not response.is_success:
            raise ModelError(f"{_shown(url)} answered {response.status_code}")
        if not _continues(response, have):
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else 0
        with part.open("ab" if have else "wb") as file, _progress(part.stem, have, total) as bar:
            for chunk in response.iter_raw():
                file.write(chunk)
                bar.update(len(chunk))


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _continues(response: httpx.Response, have: int) -> bool:
    """Whether the body starts at byte `have`; servers without ranges start at 0 with a 200."""
    return response.status_code == HTTPStatus.PARTIAL_CONTENT and response.headers.get(
        "Content-Range", ""
    ).startswith(f"bytes {have}-")


def _trust() -> ssl.SSLContext:
    """The system's trust store, pip's own certificate file where one is set, and certifi's."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    if extra := os.environ.get("PIP_CERT"):
        context.load_verify_locations(extra)
    return context


def _shown(url: str) -> str:
    """The URL without credentials or query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"


class _Bar(Protocol):
    def update(self, n: int) -> bool | None: ...


class _Lines:
    """Progress for logs: one line for each tenth."""

    def __init__(self, name: str, have: int, total: int) -> None:
        self._name, self._done, self._total = name, have, total
        self._tenth = self._now()

    def _now(self) -> int:
        return self._done * 10 // self._total if self._total else 0

    def update(self, n: int) -> bool | None:
        self._done += n
        if self._now() > self._tenth:
            self._tenth = self._now()
            print(f"{self._name}: {self._tenth * 10} %", file=sys.stderr, flush=True)
        return None


@contextmanager
def _progress(name: str, have: int, total: int) -> Iterator[_Bar]:
    if not sys.stderr.isatty():
        yield _Lines(name, have, total)
        return
    with tqdm(
        total=total or None, initial=have, desc=name, unit="B", unit_scale=True, leave=False
    ) as bar:
        yield bar
