"""Hypernetworks: from the statistics of a cluster to its low-rank update.

`CoreHypernetwork` generates the small cores between shared bases, at depths `head` and `full`.
`MemoryHypernetwork` blends cores that were refined on clusters seen in training.
`PaperHypernetwork` is the form of arXiv 2502.04315: both factors of the LM head, out of one MLP.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from adapter_gen.update import HEAD, LoraDelta, UpdateSpec
from cluster_router.wire.errors import ConfigError, DeltaError
from cluster_router.wire.types import AdapterKey


@dataclass(frozen=True, eq=False)
class Generated:
    """Updates of B clusters, evidence gate applied, still differentiable.

    Attributes:
        cores: [B, sites, r, r], g dS.
        shift: [B, hidden], g s.
        lora_a: [B, r, in], the paper's form only.
        lora_b: [B, out, r], the paper's form only.
    """

    cores: Tensor | None = None
    shift: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None

    @classmethod
    def of(cls, delta: LoraDelta) -> Generated:
        """One stored update as a batch of B = 1, in float32."""
        return cls(
            **{
                name: None if array is None else torch.tensor(array, dtype=torch.float32)[None]
                for name in ("cores", "shift", "lora_a", "lora_b")
                for array in (getattr(delta, name),)
            }
        )

    def delta(self, row: int, key: AdapterKey, spec: UpdateSpec) -> LoraDelta:
        """Cluster `row` as the immutable float16 update named `key`.

        Raises:
            DeltaError: a number is NaN or beyond float16, or the shapes do not fit `spec`.
        """
        arrays = {}
        for name in ("cores", "shift", "lora_a", "lora_b"):
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            arrays[name] = tensor[row].detach().to("cpu", torch.float16, copy=True).numpy()
            arrays[name].flags.writeable = False
        delta = LoraDelta(key=key, **arrays)
        delta.check(spec)
        return delta


class EvidenceGate(nn.Module):
    """g = n / (n + kappa): how far support n moves a cluster from the static update.

    Args:
        kappa: the support at which g is one half; 0 keeps the gate open for every n > 0.
        learned: train kappa, kept positive by a softplus.
    """

    raw: Tensor

    def __init__(self, kappa: float, learned: bool) -> None:
        super().__init__()
        if learned and kappa <= 0:
            raise ConfigError("kappa must start above 0 to be learned", param="kappa")
        self.learned = learned
        if learned:
            # The inverse of softplus, in the form that does not overflow for a large kappa.
            self.raw = nn.Parameter(torch.tensor([kappa + math.log(-math.expm1(-kappa))]))
        else:
            self.register_buffer("raw", torch.tensor([kappa]))

    @property
    def kappa(self) -> Tensor:
        """Support [1] at which the gate is half open."""
        return softplus(self.raw) if self.learned else self.raw

    def forward(self, support: Tensor) -> Tensor:
        """[B] supports -> [B] gates in [0, 1); zero support gives zero."""
        return support / (support + self.kappa).clamp_min(torch.finfo(support.dtype).tiny)


class Hypernetwork(nn.Module, ABC):
    """What every hypernetwork offers.

    Attributes:
        spec: shape of the updates it generates.
        conditioning_dim: length c of the vector it is given.
        config: the settings that build it again.
    """

    def __init__(
        self,
        config: CoreConfig | MemoryConfig | PaperConfig,
        spec: UpdateSpec,
        conditioning_dim: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.conditioning_dim = conditioning_dim

    @abstractmethod
    def forward(self, vector: Tensor, support: Tensor) -> Generated:
        """Generate the updates of B clusters.

        Args:
            vector: float32 [B, c], statistics of the clusters.
            support: float32 [B], how many prompts stand behind each.
        """

    def check(self, vector: Tensor, support: Tensor) -> None:
        """Raise DeltaError unless the condition is [B, c] with [B], finite, support >= 0."""
        expected = (len(support), self.conditioning_dim)
        if support.ndim != 1 or tuple(vector.shape) != expected:
            raise DeltaError(
                f"conditioning must be [B, {self.conditioning_dim}] with support [B], "
                f"got {tuple(vector.shape)} with {tuple(support.shape)}"
            )
        if not (torch.isfinite(vector).all() and torch.isfinite(support).all()):
            raise DeltaError("conditioning holds NaN or infinity; recompute the cluster's vector")
        if (support < 0).any():
            raise DeltaError("support must not be negative")


class CoreHypernetwork(Hypernetwork):
    """Generates one core per site and the head shift.

    condition -> trunk [B, w] -> modulated by each site's embedding [B, sites, w] -> one last
    factor for all cores, one for the shift. The last factors alone start at zero: the update is
    exactly zero at step 0 (a static LoRA), and their gradient is not. They have no bias, because
    what all clusters share belongs to S0 and s0. `head` depth is the case of one site.
    """

    config: CoreConfig
    condition_mean: Tensor

    def __init__(self, config: CoreConfig, spec: UpdateSpec, conditioning_dim: int) -> None:
        super().__init__(config, spec, conditioning_dim)
        width = config.width
        self.register_buffer("condition_mean", torch.zeros(conditioning_dim))
        self.trunk = nn.Sequential(
            nn.Linear(conditioning_dim, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
        )
        # Scale and offset of the trunk's output at each site; apart from the start, since the
        # shared last factor can tell sites apart by nothing else.
        self.sites = nn.Parameter(torch.empty(len(spec.sites), 2, width))
        nn.init.normal_(self.sites, std=0.5)
        self.mix = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.cores = nn.Linear(width, spec.rank**2, bias=False)
        self.shift = nn.Linear(width, spec.hidden_size, bias=False)
        self.gate = EvidenceGate(config.kappa, config.learn_kappa)
        nn.init.zeros_(self.cores.weight)
        nn.init.zeros_(self.shift.weight)

    @torch.no_grad()
    def fit_normalisation(self, vectors: Tensor) -> None:
        """Store the mean of training conditions [N, c], which `forward` subtracts."""
        self.condition_mean.copy_(vectors.mean(0))

    def normalise(self, vector: Tensor) -> Tensor:
        """[B, c] -> [B, c] of constant norm sqrt(c) around the mean; the mean itself gives 0."""
        return normalize(vector - self.condition_mean, dim=-1) * math.sqrt(self.conditioning_dim)

    def forward(self, vector: Tensor, support: Tensor) -> Generated:
        """See `Hypernetwork.forward`."""
        trunk = self.trunk(self.normalise(vector))[:, None]  # [B, 1, w]
        scale, offset = self.sites.unbind(1)  # [sites, w] each
        features = self.mix(trunk * (1 + scale) + offset)  # [B, sites, w]
        # One Adam step moves a weight by about its learning rate, hence a sum over w inputs by up
        # to w times that. The factor keeps the first steps comparable at every width.
        features = features * self.config.width**-0.5
        gate = self.gate(support)[:, None]  # [B, 1]
        rank = self.spec.rank
        cores = (gate[:, None] * self.cores(features)).unflatten(-1, (rank, rank))
        return Generated(cores=cores, shift=gate * self.shift(features[:, -1]))


class MemoryHypernetwork(Hypernetwork):
    """Attention over prototypes: clusters seen in training, each with cores refined on its text.

    weights = softmax(beta cos(condition, keys)); cores = g * strength * sum of weighted cores. A
    condition near one prototype gets its cores, one between several a blend (the merging of
    arXiv 2505.14136, by similarity). Prototypes are written by `remember`, not by descent; the
    update is zero until then.
    """

    config: MemoryConfig
    condition_mean: Tensor
    keys: Tensor
    cores: Tensor
    strength: Tensor
    sharpness: Tensor

    def __init__(self, config: MemoryConfig, spec: UpdateSpec, conditioning_dim: int) -> None:
        super().__init__(config, spec, conditioning_dim)
        count, rank = config.prototypes, spec.rank
        self.register_buffer("condition_mean", torch.zeros(conditioning_dim))
        self.register_buffer("keys", torch.zeros(count, conditioning_dim))
        self.register_buffer("cores", torch.zeros(count, len(spec.sites) * rank**2))
        self.register_buffer("strength", torch.ones(1))
        self.register_buffer("sharpness", torch.full((1,), config.sharpness))
        self.gate = EvidenceGate(config.kappa, learned=False)

    @torch.no_grad()
    def remember(self, vectors: Tensor, cores: Tensor, mean: Tensor) -> None:
        """Store prototypes.

        Args:
            vectors: float32 [K, c], their conditions.
            cores: float32 [K, sites, r, r].
            mean: float32 [c], which is subtracted from every condition.
        """
        self.condition_mean.copy_(mean)
        self.keys.copy_(normalize(vectors - mean, dim=-1))
        self.cores.copy_(cores.flatten(1))

    @torch.no_grad()
    def blend(self, sharpness: float, strength: float) -> None:
        """Set how prototypes are blended: the factor on similarities, and that on the result."""
        self.sharpness.fill_(sharpness)
        self.strength.fill_(strength)

    def weights(self, vector: Tensor) -> Tensor:
        """[B, c] -> [B, K], how much each prototype counts; rows sum to 1."""
        similarity = normalize(vector - self.condition_mean, dim=-1) @ self.keys.T
        return (self.sharpness * similarity).softmax(-1)

    def forward(self, vector: Tensor, support: Tensor) -> Generated:
        """See `Hypernetwork.forward`."""
        gate = self.strength * self.gate(support)[:, None]  # [B, 1]
        cores = gate * (self.weights(vector) @ self.cores)
        shape = (len(self.spec.sites), self.spec.rank, self.spec.rank)
        shift = torch.zeros(len(vector), self.spec.hidden_size, device=vector.device)
        return Generated(cores=cores.unflatten(-1, shape), shift=shift)


class PaperHypernetwork(Hypernetwork):
    """The paper's MLP: centroid -> 64 -> 32 -> r * (in + out) numbers, the LM head's A and B.

    The condition is the L2-normalised centroid. GPT-2 small at rank 4 gives 6,786,596 parameters
    where a static LoRA of the same layer has 204,100. There is no evidence gate and nothing is
    shared between clusters. The paper does not state an initialisation; here the rows that
    produce B start at zero and those of A as in LoRA (uniform, +-1/sqrt(in)), so that the update
    is zero at step 0 and trains from there.
    """

    config: PaperConfig

    def __init__(self, config: PaperConfig, spec: UpdateSpec, conditioning_dim: int) -> None:
        super().__init__(config, spec, conditioning_dim)
        site = spec.sites[0]
        first, second = config.hidden_sizes
        self.last = nn.Linear(second, spec.rank * (site.in_features + site.out_features))
        self.trunk = nn.Sequential(
            nn.Linear(conditioning_dim, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU()
        )
        split, bound = spec.rank * site.in_features, site.in_features**-0.5
        with torch.no_grad():
            for parameter in (self.last.weight, self.last.bias):
                parameter[:split].uniform_(-bound, bound)
                parameter[split:].zero_()

    def forward(self, vector: Tensor, support: Tensor) -> Generated:  # noqa: ARG002
        """See `Hypernetwork.forward`; the paper has no use for `support`."""
        site, rank = self.spec.sites[0], self.spec.rank
        numbers = self.last(self.trunk(normalize(vector, dim=-1)))
        a, b = numbers.split([rank * site.in_features, rank * site.out_features], dim=-1)
        return Generated(lora_a=a.unflatten(-1, (rank, -1)), lora_b=b.unflatten(-1, (-1, rank)))


Width = Annotated[int, Field(ge=1, le=65536)]


class CoreConfig(BaseModel):
    """Settings of a CoreHypernetwork.

    Attributes:
        kind: names this form.
        width: of the trunk.
        kappa: support at which the evidence gate is half open (see EvidenceGate).
        learn_kappa: whether kappa is trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["core"] = "core"
    width: Width = 256
    kappa: Annotated[float, Field(ge=0)] = 8.0
    learn_kappa: bool = False

    def build(self, spec: UpdateSpec, conditioning_dim: int) -> CoreHypernetwork:
        """Build the module, its weights drawn from torch's global generator.

        Raises:
            ConfigError: `spec` is the paper's form, or lacks the head site at its end.
        """
        if spec.depth == "paper" or spec.sites[-1].name != HEAD:
            raise ConfigError("a core hypernetwork needs a spec of depth head or full", "depth")
        return CoreHypernetwork(self, spec, conditioning_dim)


class MemoryConfig(BaseModel):
    """Settings of a MemoryHypernetwork.

    Attributes:
        kind: names this form.
        prototypes: how many are stored.
        sharpness: factor on similarities before the softmax.
        kappa: support at which the evidence gate is half open (see EvidenceGate).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["memory"] = "memory"
    prototypes: Annotated[int, Field(ge=1, le=4096)] = 32
    sharpness: Annotated[float, Field(gt=0, le=1000)] = 16.0
    kappa: Annotated[float, Field(ge=0)] = 8.0

    def build(self, spec: UpdateSpec, conditioning_dim: int) -> MemoryHypernetwork:
        """Build the module, with no prototypes yet.

        Raises:
            ConfigError: `spec` is the paper's form, or lacks the head site at its end.
        """
        if spec.depth == "paper" or spec.sites[-1].name != HEAD:
            raise ConfigError("a memory hypernetwork needs a spec of depth head or full", "depth")
        return MemoryHypernetwork(self, spec, conditioning_dim)


class PaperConfig(BaseModel):
    """Settings of a PaperHypernetwork: the two hidden layers, by default the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["paper"] = "paper"
    hidden_sizes: tuple[Width, Width] = (64, 32)

    def build(self, spec: UpdateSpec, conditioning_dim: int) -> PaperHypernetwork:
        """Build the module, its weights drawn from torch's global generator.

        Raises:
            ConfigError: `spec` is not the paper's form.
        """
        if spec.depth != "paper":
            raise ConfigError("the paper's hypernetwork needs a spec of depth paper", "depth")
        return PaperHypernetwork(self, spec, conditioning_dim)


HypernetworkConfig = Annotated[CoreConfig | MemoryConfig | PaperConfig, Field(discriminator="kind")]
"""Any kind, told apart by its `kind` key; a field of this type parses from JSON or YAML."""
