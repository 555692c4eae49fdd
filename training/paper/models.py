"""The paper's two adapters of the LM head, and how many parameters each has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, autograd, nn, ones, zeros

from adapter_gen.hypernetwork import PaperConfig
from adapter_gen.sites import discover_sites
from adapter_gen.update import UpdateSpec
from training.paper.settings import PaperSettings


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update of the LM head: A [r, d] and B [V, r]."""

    a: Tensor
    b: Tensor

    def leaf(self) -> LowRank:
        """A copy that gathers gradients by itself, over as many backward passes as it takes."""
        return LowRank(self.a.detach().requires_grad_(), self.b.detach().requires_grad_())

    def continue_from(self, leaf: LowRank) -> None:
        """Send the gradients that `leaf` gathered into what made this update."""
        assert leaf.a.grad is not None
        assert leaf.b.grad is not None
        autograd.backward([self.a, self.b], [leaf.a.grad, leaf.b.grad])


class StaticLora(nn.Module):
    """One update for every batch. A starts as in LoRA (uniform, +-1/sqrt(d)), B at zero."""

    def __init__(self, spec: UpdateSpec) -> None:
        super().__init__()
        site = spec.sites[0]
        self.a = nn.Parameter(zeros(spec.rank, site.in_features))
        self.b = nn.Parameter(zeros(site.out_features, spec.rank))
        nn.init.uniform_(self.a, -(site.in_features**-0.5), site.in_features**-0.5)

    def forward(self, condition: Tensor) -> LowRank:  # noqa: ARG002
        """The update; the condition has no part in it."""
        return LowRank(self.a, self.b)


class BatchHypernetwork(nn.Module):
    """The paper's MLP, with the dropout of the authors' code between its layers."""

    def __init__(self, spec: UpdateSpec, dropout: float) -> None:
        super().__init__()
        self.network = PaperConfig().build(spec, spec.hidden_size)
        first, relu, second, last_relu = self.network.trunk
        self.network.trunk = nn.Sequential(
            first, relu, nn.Dropout(dropout), second, last_relu, nn.Dropout(dropout)
        )

    def forward(self, condition: Tensor) -> LowRank:
        """The update for a batch whose mean embedding is `condition` [d]."""
        generated = self.network(condition[None], ones(1))
        return LowRank(generated.lora_a[0], generated.lora_b[0])


Adapter = StaticLora | BatchHypernetwork


def paper_spec(model: nn.Module, settings: PaperSettings) -> UpdateSpec:
    """The LM head as the only site, scaled so that the update is alpha B A h."""
    return discover_sites(model, "paper", settings.rank, settings.alpha * settings.rank)


def build_adapters(spec: UpdateSpec, dropout: float) -> dict[str, Adapter]:
    """The LoRA and the hypernetwork, their weights drawn from torch's global generator."""
    return {"lora": StaticLora(spec), "hyper": BatchHypernetwork(spec, dropout)}


def parameter_counts(model: nn.Module, settings: PaperSettings) -> dict[str, int]:
    """Parameters of the frozen model, of the LoRA and of the hypernetwork."""
    adapters = build_adapters(paper_spec(model, settings), settings.dropout)
    return {name: _count(module) for name, module in {"base": model, **adapters}.items()}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
