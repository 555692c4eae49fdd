"""ClusterRefinery: what is refined when, and on which recent prompts.

A tenant's prompts, of all its clusters, teach first what is common to them; each cluster is refined
from there on its own. Prompts are held in memory only, the latest, and leave no trace but the
numbers of an update.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from adapter_gen.hypernetwork import Generated
from adapter_gen.refine import Prompt, RefineConfig, Refiner
from adapter_gen.update import LoraDelta
from cluster_router.wire.types import COMMON, AdapterKey, Conditioning, Place

IntArray = NDArray[np.int32]
Generate = Callable[[AdapterKey, Conditioning], LoraDelta]
Recall = Callable[[AdapterKey, Place], LoraDelta | None]
Updates = dict[Place, tuple[AdapterKey, Generated]]
"""New updates (B = 1), each with the key that names its base model and hypernetwork."""


def last_tokens(tokens: Sequence[int], most: int, lead: Sequence[int] = ()) -> IntArray:
    """The last tokens of a prompt, int32, at most `most`; after its `lead` if it begins with that.

    A model expects the tokens that its tokenizer puts before any text (BOS) wherever it is cut.
    """
    if len(tokens) > most and tuple(tokens[: len(lead)]) == tuple(lead):
        tokens = [*lead, *tokens[len(lead) - most :]]
    return np.array(tokens[-most:], np.int32)


class CommonConfig(BaseModel):
    """How what a tenant's prompts have in common is learned.

    Attributes:
        every: new prompts of a tenant after which it is refined; as many as it had learned from, if
            that is more, up to `buffer`.
        buffer: prompts kept of a tenant, the latest.
        refine: how a refinement is done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: Annotated[int, Field(ge=8)] = 64
    buffer: Annotated[int, Field(ge=8)] = 1024
    refine: RefineConfig = RefineConfig(
        steps=96, passes=1, batch=12, learning_rate=0.03, held_back=0.15
    )


class RefineryConfig(BaseModel):
    """What is kept of prompts, and when and how they are learned from.

    Attributes:
        prompt_tokens: tokens kept of a prompt, its last: many chats begin alike.
        buffer: prompts kept of a cluster, the latest.
        every: new prompts after which a cluster is refined; as many as it had learned from, if that
            is more, up to `buffer`.
        max_clusters: clusters whose prompts and refinements are kept; the one longest without any
            makes room.
        refine: how the refinement of a cluster is done.
        common: what is learned of all clusters of a tenant together, and where theirs begin.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: Annotated[int, Field(ge=16)] = 128
    buffer: Annotated[int, Field(ge=8)] = 64
    every: Annotated[int, Field(ge=8)] = 16
    max_clusters: Annotated[int, Field(ge=1)] = 256
    refine: RefineConfig = RefineConfig(steps=8, passes=2, batch=12, learning_rate=0.02)
    common: CommonConfig = CommonConfig()


@dataclass(frozen=True, eq=False)
class Offered:
    """A prompt that may be learned from.

    Attributes:
        namespace: the tenant it came from; prompts of one never teach another's clusters.
        key: of the update that the prompt ran under.
        conditioning: of its cluster.
        tokens: int32 [T], the prompt.
    """

    namespace: str
    key: AdapterKey
    conditioning: Conditioning
    tokens: Prompt


@dataclass(eq=False)
class _Cluster:
    """A cluster's latest prompts.

    Attributes:
        key: that it was served under last.
        conditioning: what the hypernetwork is given.
        prompts: int32 token ids of each.
        fresh: prompts since it was refined.
        learned: prompts before that.
        begun: what was common to its tenant when its update was made; None if there was nothing.
            Taken for granted of one that an earlier process made.
    """

    key: AdapterKey
    conditioning: Conditioning
    prompts: deque[Prompt]
    fresh: int = 0
    learned: int = 0
    begun: Generated | None = field(default=None, repr=False)


@dataclass(eq=False)
class _Tenant:
    """A tenant's latest prompts, by content, and what they have in common."""

    key: AdapterKey
    common: Generated | None = field(repr=False)
    prompts: OrderedDict[bytes, Prompt] = field(default_factory=OrderedDict, repr=False)
    fresh: int = 0
    learned: int = 0


class ClusterRefinery:
    """Refines tenants and clusters, one after the other.

    Not thread-safe: one thread offers and refines.

    Args:
        clusters: does the descent of a cluster.
        common: does it for all of a tenant.
        generate: what the hypernetwork makes of a cluster.
        recall: what was kept of a place before, by an earlier process too.
        config: bounds.
    """

    def __init__(
        self,
        clusters: Refiner,
        common: Refiner,
        generate: Generate,
        recall: Recall,
        config: RefineryConfig,
    ) -> None:
        self._refiner = clusters
        self._common = common
        self._generate = generate
        self._recall = recall
        self._config = config
        self._clusters: OrderedDict[Place, _Cluster] = OrderedDict()
        self._tenants: dict[str, _Tenant] = {}

    def offer(self, offered: Offered) -> None:
        """Keep a prompt for its cluster; one without a cluster is let go, and one that it has.

        A prompt that comes again and again would be both learned from and held back, and so gain
        by being known by heart.
        """
        if offered.key.cluster is None:
            return
        place = (offered.namespace, offered.key.cluster)
        config, tenant = self._config, self._tenant(offered)
        if place not in self._clusters:
            self._clusters[place] = _Cluster(
                offered.key,
                offered.conditioning,
                deque(maxlen=config.buffer),
                begun=tenant.common if offered.key.refinement else None,
            )
            if len(self._clusters) > config.max_clusters:
                self._forget()
        self._clusters.move_to_end(place)
        kept = self._clusters[place]
        kept.key, kept.conditioning = offered.key, offered.conditioning
        prompt = offered.tokens[-config.prompt_tokens :].astype(np.int32)
        if any(np.array_equal(prompt, one) for one in kept.prompts):
            return
        kept.prompts.append(prompt)
        kept.fresh += 1
        content = prompt.tobytes()
        if content not in tenant.prompts:
            tenant.prompts[content] = prompt
            tenant.fresh += 1
            if len(tenant.prompts) > config.common.buffer:
                tenant.prompts.popitem(last=False)

    def held(self) -> list[Place]:
        """Places whose refinements are of use."""
        return [*((namespace, COMMON) for namespace in self._tenants), *self._clusters]

    def due(self) -> Place | None:
        """What is to be refined next; None if nothing is.

        First clusters that were made before what is common to their tenant was known, those used
        last before others: else busy tenants would be refined again and again, and no cluster would
        get any of it. Then the tenant, then the cluster with most new prompts.
        """
        for place, kept in reversed(self._clusters.items()):
            if kept.begun is not self._tenants[place[0]].common:
                return place
        every, buffer = self._config.common.every, self._config.common.buffer
        tenants = [
            (tenant.fresh, (namespace, COMMON))
            for namespace, tenant in self._tenants.items()
            if tenant.fresh >= max(every, min(tenant.learned, buffer))
        ]
        every, buffer = self._config.every, self._config.buffer
        clusters = [
            (kept.fresh, place)
            for place, kept in self._clusters.items()
            if kept.fresh >= max(every, min(kept.learned, buffer))
        ]
        found = tenants or clusters
        return max(found)[1] if found else None

    def refine(self, place: Place) -> Updates:
        """Refine what is due.

        Returns:
            What is new thereby; empty where nothing was gained, and what was there stays.

        Raises:
            DeltaError: the loss or a gradient is NaN or infinite.
        """
        if place[1] == COMMON:
            return self._refine_common(place)
        kept, common = self._clusters[place], self._tenants[place[0]].common
        moved = kept.begun is not common
        enough = kept.learned > 0 or kept.fresh >= self._config.every
        kept.begun = common  # this and the next also where the rest fails
        if enough:
            kept.learned, kept.fresh = kept.learned + kept.fresh, 0
        start = Generated.of(self._generate(replace(kept.key, refinement=""), kept.conditioning))
        if common is not None:
            start = _sum(start, common)
        refined = self._refiner.refine(list(kept.prompts), start) if enough else None
        if refined is not None and refined.scale:
            return {place: (kept.key, refined.generated)}
        return {place: (kept.key, start)} if moved else {}

    def _refine_common(self, place: Place) -> Updates:
        tenant = self._tenants[place[0]]
        tenant.learned, tenant.fresh = tenant.learned + tenant.fresh, 0  # also where the rest fails
        refined = self._common.refine(list(tenant.prompts.values()), tenant.common)
        if not refined.scale:
            return {}
        tenant.common = refined.generated
        return {place: (tenant.key, refined.generated)}

    def _tenant(self, offered: Offered) -> _Tenant:
        namespace = offered.namespace
        if namespace not in self._tenants:
            key = replace(offered.key, cluster=None, version=0, refinement="")
            found = self._recall(key, (namespace, COMMON))
            common = None if found is None else Generated.of(found)
            self._tenants[namespace] = _Tenant(key, common)
        return self._tenants[namespace]

    def _forget(self) -> None:
        """Make room for a cluster."""
        (namespace, _), _ = self._clusters.popitem(last=False)
        if all(other != namespace for other, _ in self._clusters):
            del self._tenants[namespace]


def _sum(generated: Generated, common: Generated) -> Generated:
    assert generated.cores is not None
    assert common.cores is not None
    return replace(generated, cores=generated.cores + common.cores)
