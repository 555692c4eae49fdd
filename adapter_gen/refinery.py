"""ClusterRefinery: which cluster is refined when, and on which of its recent prompts.

Prompts are held in memory only, the latest of each cluster, and leave no trace but the numbers of
an update.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from adapter_gen.hypernetwork import Generated
from adapter_gen.refine import Prompt, RefineConfig, Refiner
from adapter_gen.update import LoraDelta
from cluster_router.wire.types import AdapterKey, Conditioning, FloatArray

IntArray = NDArray[np.int32]
Place = tuple[str, int]
"""A namespace and the id of a cluster in it."""

Generate = Callable[[AdapterKey, Conditioning], LoraDelta]


def last_tokens(tokens: Sequence[int], most: int, lead: Sequence[int] = ()) -> IntArray:
    """The last tokens of a prompt, int32, at most `most`; after its `lead` if it begins with that.

    A model expects the tokens that its tokenizer puts before any text (BOS) wherever it is cut.
    """
    if len(tokens) > most and tuple(tokens[: len(lead)]) == tuple(lead):
        tokens = [*lead, *tokens[len(lead) - most :]]
    return np.array(tokens[-most:], np.int32)


class RefineryConfig(BaseModel):
    """What is kept of a cluster's prompts, and when they are learned from.

    Attributes:
        prompt_tokens: tokens kept of a prompt, its last: many chats begin alike.
        buffer: prompts kept of a cluster, the latest.
        every: new prompts after which a cluster is refined; as many as it had learned from, if
            that is more, up to `buffer`.
        max_clusters: clusters whose prompts and refinements are kept; the one longest without any
            makes room.
        refine: how a refinement is done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: Annotated[int, Field(ge=16)] = 128
    buffer: Annotated[int, Field(ge=8)] = 64
    every: Annotated[int, Field(ge=8)] = 16
    max_clusters: Annotated[int, Field(ge=1)] = 256
    refine: RefineConfig = RefineConfig(steps=8, batch=12, learning_rate=0.045)


@dataclass(frozen=True, eq=False)
class Offered:
    """A prompt that may be learned from.

    Attributes:
        namespace: the tenant it came from; prompts of one never teach another's clusters.
        key: of the update that the prompt ran under.
        conditioning: of its cluster.
        embedding: float32 [d], of the prompt.
        tokens: int32 [T], the prompt.
    """

    namespace: str
    key: AdapterKey
    conditioning: Conditioning
    embedding: FloatArray
    tokens: Prompt


@dataclass(eq=False)
class _Cluster:
    key: AdapterKey
    conditioning: Conditioning
    prompts: deque[Prompt]
    embeddings: deque[FloatArray]
    fresh: int = 0
    learned: int = 0
    refined: Generated | None = field(default=None, repr=False)


class ClusterRefinery:
    """Refines clusters one after the other. Not thread-safe: one thread offers and refines.

    Args:
        refiner: does the descent.
        generate: the update that a key names, where the first refinement here starts.
        config: bounds.
    """

    def __init__(self, refiner: Refiner, generate: Generate, config: RefineryConfig) -> None:
        self._refiner = refiner
        self._generate = generate
        self._config = config
        self._clusters: OrderedDict[Place, _Cluster] = OrderedDict()

    def offer(self, offered: Offered) -> None:
        """Keep a prompt for its cluster; one without a cluster is let go, and one that it has.

        A prompt that comes again and again would be both learned from and held back, and so gain
        by being known by heart.
        """
        if offered.key.cluster is None:
            return
        place = (offered.namespace, offered.key.cluster)
        config = self._config
        if place not in self._clusters:
            self._clusters[place] = _Cluster(
                offered.key,
                offered.conditioning,
                deque(maxlen=config.buffer),
                deque(maxlen=config.buffer),
            )
            if len(self._clusters) > config.max_clusters:
                self._clusters.popitem(last=False)
        self._clusters.move_to_end(place)
        kept = self._clusters[place]
        kept.key, kept.conditioning = offered.key, offered.conditioning
        prompt = offered.tokens[-config.prompt_tokens :].astype(np.int32)
        if any(np.array_equal(prompt, one) for one in kept.prompts):
            return
        kept.prompts.append(prompt)
        kept.embeddings.append(offered.embedding)
        kept.fresh += 1

    def held(self) -> list[Place]:
        """Clusters whose prompts are kept."""
        return list(self._clusters)

    def due(self) -> Place | None:
        """The cluster with most new prompts among those that have enough; None if none has."""
        found = [
            (kept.fresh, place)
            for place, kept in self._clusters.items()
            if kept.fresh >= max(self._config.every, min(kept.learned, self._config.buffer))
        ]
        return max(found)[1] if found else None

    def refine(self, place: Place) -> tuple[AdapterKey, Generated] | None:
        """Refine a cluster on its prompts, and where they are few on those most like them.

        Returns:
            The key it was served under, and the refined update (B = 1); None where nothing was
            gained, and what was there stays.

        Raises:
            DeltaError: the loss or a gradient is NaN or infinite.
        """
        kept = self._clusters[place]
        prompts = [*self._borrowed(place), *kept.prompts]
        kept.learned, kept.fresh = kept.learned + kept.fresh, 0  # also where the rest fails
        start = kept.refined or Generated.of(self._generate(kept.key, kept.conditioning))
        refined = self._refiner.refine(prompts, start)
        if refined.scale == 0:
            return None
        kept.refined = refined.generated
        return kept.key, refined.generated

    def _borrowed(self, place: Place) -> list[Prompt]:
        """Prompts of the tenant's other clusters most like this one's, as many as there is room.

        Each but once, and none that it has itself.
        """
        kept = self._clusters[place]
        room = self._config.buffer - len(kept.prompts)
        centre = np.mean(np.stack(kept.embeddings), axis=0)
        others = [
            (float(embedding @ centre), prompt)
            for other, its in self._clusters.items()
            if other != place and other[0] == place[0]
            for prompt, embedding in zip(its.prompts, its.embeddings, strict=True)
        ]
        others.sort(key=lambda pair: -pair[0])
        taken = {prompt.tobytes() for prompt in kept.prompts}
        borrowed: list[Prompt] = []
        for _, prompt in others:
            if len(borrowed) == room:
                break
            if (content := prompt.tobytes()) not in taken:
                taken.add(content)
                borrowed.append(prompt)
        return borrowed
