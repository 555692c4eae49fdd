"""Who may call: API keys, kept as hashes in a file, and how often each may."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.strategies import MovingWindowRateLimiter
from limits.storage import storage_from_string
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cluster_router.wire.errors import (
    AuthenticationError,
    ConfigError,
    ForbiddenError,
    OverloadedError,
)
from cluster_router.wire.types import DEFAULT_NAMESPACE, Namespace

_REREAD_S = 2.0
_PATIENCE_S = 1.0
_PAUSE_S = 5.0
_OWN = "memory://"

logger = logging.getLogger(__name__)


class ApiKey(BaseModel):
    """One key, as its file has it: never the key itself.

    Attributes:
        name: whose it is, for logs and messages.
        sha256: of the key, in hex. Keys are random and long, so that no slower hash is needed.
        namespace: the one tenant that it may speak for; None may name any.
        requests_per_minute: most in any minute; None is no limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=128)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    namespace: Namespace | None = None
    requests_per_minute: Annotated[int, Field(gt=0)] | None = None


_KEYS = TypeAdapter(tuple[ApiKey, ...])


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request: name of the key, and the one tenant it speaks for, if only one."""

    name: str
    namespace: str | None = None

    def tenant(self, asked: str | None) -> str:
        """The namespace of a request that asks for `asked`.

        Raises:
            ForbiddenError: it is another's.
        """
        if self.namespace is None:
            return asked or DEFAULT_NAMESPACE
        if asked and asked != self.namespace:
            raise ForbiddenError(
                f"This API key speaks for namespace {self.namespace!r} only; leave namespace out.",
                "namespace",
            )
        return self.namespace


ANYONE = Caller("")
"""Who sends a request where no keys are needed."""


class KeyFile:
    """A YAML list of keys, read anew when it changes: adding and removing keys needs no restart.

    Args:
        path: the file.
        clock: seconds, monotonic.

    Raises:
        ConfigError: it cannot be read, or is no list of keys.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._looked, self._stamp = clock(), self._stamp_now()
        self._keys = read_keys(path)

    def keys(self) -> Sequence[ApiKey]:
        """The keys as of now. While the file cannot be read, the last ones hold."""
        if self._clock() - self._looked >= _REREAD_S:
            self._looked = self._clock()
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._keys = read_keys(self._path)
                except ConfigError as error:
                    logger.error("%s; the keys read last hold", error)
        return self._keys

    def _stamp_now(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size


class Access:
    """Lets callers in by their key, each as often as it may.

    While a shared storage fails, or takes longer than a second, callers are neither turned away nor
    let in without limit: each process counts for itself, and asks the storage again every 5 s.

    Args:
        keys: gives the keys there are.
        storage: where requests are counted: `memory://` counts for this process alone,
            `redis://host:6379` for all that name it (needs the `redis` package).
        clock: seconds, monotonic.

    Raises:
        ConfigError: nothing installed counts there.
    """

    def __init__(
        self,
        keys: Callable[[], Sequence[ApiKey]],
        storage: str = _OWN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys, self._clock = keys, clock
        self._own = _limiter(_OWN)
        self._shared = None if storage == _OWN else _limiter(storage)
        self._failing = False
        self._again = clock()

    async def admit(self, authorization: str) -> Caller:
        """Who sends a request with this `Authorization` header.

        Raises:
            AuthenticationError: no key, or an unknown one.
            OverloadedError: it has been used as often as it may.
        """
        scheme, _, presented = authorization.strip().partition(" ")
        if scheme.lower() != "bearer" or not presented.strip():
            raise AuthenticationError("Send an API key: Authorization: Bearer <key>.")
        key = self._find(presented.strip())
        if key is None:
            raise AuthenticationError("This API key is not known here.")
        if key.requests_per_minute is not None:
            await self._count(key, key.requests_per_minute)
        return Caller(key.name, key.namespace)

    def _find(self, presented: str) -> ApiKey | None:
        """The key, compared with every one in constant time: how long it takes tells nothing."""
        digest = key_hash(presented)
        found = None
        for key in self._keys():
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found

    async def _count(self, key: ApiKey, most: int) -> None:
        item = RateLimitItemPerMinute(most)
        wait_s = await self._wait_s(item, key.sha256)
        if wait_s is not None:
            raise OverloadedError(
                f"API key {key.name!r} is limited to {most} requests a minute.",
                retry_after=max(1.0, wait_s),
            )

    async def _wait_s(self, item: RateLimitItem, name: str) -> float | None:
        """Count one request; where that is one too many, seconds until there may be another."""
        if self._shared is None or self._clock() < self._again:
            return await _hit(self._own, item, name)
        if self._failing:  # one request tries; the others do not wait for it
            self._again = self._clock() + _PAUSE_S
        try:
            async with asyncio.timeout(_PATIENCE_S):
                wait_s = await _hit(self._shared, item, name)
        except Exception as error:  # whatever the storage's client raises
            self._again = self._clock() + _PAUSE_S
            if not self._failing:
                why = str(error) or type(error).__name__
                logger.error("requests are counted by each router for itself: %s", why)
            self._failing = True
            return await _hit(self._own, item, name)
        if self._failing:
            self._again = self._clock()
            logger.warning("requests are counted for all routers together again")
        self._failing = False
        return wait_s


def _limiter(storage: str) -> MovingWindowRateLimiter:
    # Without it, the library asks for another client of Redis than the one that most have.
    client = {"implementation": "redispy"} if storage.startswith("redis") else {}
    try:
        return MovingWindowRateLimiter(storage_from_string(f"async+{storage}", **client))
    except Exception as error:  # the library's, or of the client it asks for
        raise ConfigError(f"cannot count requests in {storage!r}: {error}", "rates") from error


async def _hit(limiter: MovingWindowRateLimiter, item: RateLimitItem, name: str) -> float | None:
    """See `Access._wait_s`."""
    if await limiter.hit(item, name):
        return None
    reset, _ = await limiter.get_window_stats(item, name)
    return reset - time.time()


def key_hash(key: str) -> str:
    """What a file of keys holds of `key`."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys in a file.

    Raises:
        ConfigError: it cannot be read, is no list of keys, or two have one name or hash.
    """
    try:
        found = _KEYS.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")) or ())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read API keys: {error}", "keys") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path} is no list of API keys: {where}: {first['msg']}") from None
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in found]
        if twice := {value for value in values if values.count(value) > 1}:
            raise ConfigError(f"{path} has two API keys of {field} {min(twice)}")
    return found
