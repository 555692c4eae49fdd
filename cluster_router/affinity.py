"""Which replica a request should go to, so that few replicas hold each update and none is overrun.

Loading an update costs time, so the requests of a cluster should meet where its update already is.
They may not all meet in one place: traffic is skewed, and the hottest clusters alone can overrun a
replica. So affinity holds up to a soft cap on a replica's load, relative to the mean; past it the
cluster's next replica becomes warm as well, and from then on its requests fill whichever of its
replicas has less to do. Cold updates go by rendezvous hashing (Thaler and Ravishankar, 1998), on
which all routers agree without talking, to replicas that hold no more updates than their share.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class AffinityPolicy(BaseModel):
    """How far requests follow the updates they need.

    Attributes:
        soft_cap: load of a replica, as a multiple of the mean over replicas, up to which requests
            are sent to it for its updates.
        slack: requests that a replica may have above the mean whatever the multiple says, so that
            at little traffic chance does not spread every cluster everywhere.
        memory_s: seconds for which a replica counts as warm for what was sent to it, though it has
            not said so yet; longer than its reports take to arrive.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    soft_cap: Annotated[float, Field(ge=1)] = 1.5
    slack: Annotated[float, Field(ge=0)] = 4
    memory_s: Annotated[float, Field(gt=0)] = 5


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could take the request.

    Attributes:
        name: its id, the same in every router.
        load: requests it has, running and waiting.
        resident: ids of the updates it holds.
    """

    name: str
    load: float
    resident: Collection[str]


def rank(
    key: str | None, candidates: Sequence[Candidate], policy: AffinityPolicy
) -> list[list[str]]:
    """Names of the candidates in tiers, best first; within a tier the least loaded is best.

    Warm replicas under the soft cap are the first tier; cold ones under it follow one by one, the
    next to become warm in front; then all others. A request without a key goes by load alone.

    Args:
        key: id of the update the request runs under, None if it runs unadapted.
        candidates: every replica there is, each name once.
        policy: the soft cap.
    """
    by_load = sorted(candidates, key=lambda one: one.load)
    if key is None:
        return [[one.name for one in by_load]] if by_load else []
    cap = _load_cap(candidates, policy)
    under = [one for one in by_load if one.load < cap]
    warm = [one.name for one in under if key in one.resident]
    cold = _next_warm(key, [one for one in under if key not in one.resident], candidates)
    over = [one.name for one in by_load if one.load >= cap]
    return [tier for tier in [warm, *([name] for name in cold), over] if tier]


def rendezvous(key: str, names: Iterable[str]) -> list[str]:
    """`names` in the order of `key`: a name that leaves or joins does not reorder the others."""
    return sorted(names, key=lambda name: _weight(key, name), reverse=True)


def _load_cap(candidates: Sequence[Candidate], policy: AffinityPolicy) -> float:
    """Load from which affinity ends; above that of the least loaded, whatever the policy."""
    mean = (sum(one.load for one in candidates) + 1) / max(1, len(candidates))
    return max(policy.soft_cap * mean, mean + policy.slack)


def _next_warm(key: str, cold: Sequence[Candidate], candidates: Sequence[Candidate]) -> list[str]:
    """`cold` by rendezvous, behind them those that already hold more updates than their share."""
    share = sum(len(one.resident) for one in candidates) / max(1, len(candidates)) + 1
    roomy = [one.name for one in cold if len(one.resident) <= share]
    laden = [one.name for one in cold if len(one.resident) > share]
    return rendezvous(key, roomy) + rendezvous(key, laden)


def _weight(key: str, name: str) -> bytes:
    return hashlib.blake2b(f"{key}/{name}".encode(), digest_size=8).digest()


class Residency:
    """What every replica holds: what it reports, and what was sent to it since.

    A report is about a second old when it arrives. Without the second part the requests of a cold
    cluster that arrive in that second could be sent to several replicas.

    Args:
        memory_s: see AffinityPolicy.
        clock: seconds, monotonic.
    """

    def __init__(self, memory_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory_s, self._clock = memory_s, clock
        self._held: dict[str, set[str]] = {}
        self._sent: dict[str, dict[str, float]] = {}

    def report(self, held: Mapping[str, Iterable[str]]) -> None:
        """Take in what each replica says it holds; replicas that are not named are forgotten."""
        horizon = self._clock() - self._memory_s
        sent = {
            name: {key: at for key, at in self._sent.get(name, {}).items() if at > horizon}
            for name in held
        }
        self._sent = sent
        self._held = {name: {*keys, *sent[name]} for name, keys in held.items()}

    def send(self, name: str, key: str) -> None:
        """Note that a request under `key` goes to replica `name`."""
        self._sent.setdefault(name, {})[key] = self._clock()
        self._held.setdefault(name, set()).add(key)

    def of(self, name: str) -> Collection[str]:
        """Ids of the updates that replica `name` holds or is about to."""
        return self._held.get(name, frozenset())
