from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from adapter_gen.apply import apply_head, init_bases
from adapter_gen.hypernetwork import (
    CoreConfig,
    EvidenceGate,
    Generated,
    Hypernetwork,
    HypernetworkConfig,
    PaperConfig,
)
from adapter_gen.update import HEAD, Site, UpdateSpec
from cluster_router.wire.errors import ConfigError, DeltaError
from cluster_router.wire.types import AdapterKey

KEY = AdapterKey("base", "hyper", 1, 1)
MakeHypernetwork = Callable[..., Hypernetwork]


def outputs(generated: Generated) -> list[torch.Tensor]:
    return [value for value in vars(generated).values() if value is not None]


def config_for(spec: UpdateSpec) -> CoreConfig | PaperConfig:
    return PaperConfig() if spec.depth == "paper" else CoreConfig(width=16)


def test_paper_form_on_gpt2_small_has_the_papers_parameter_counts() -> None:
    site = Site("lm_head", 768, 50257)
    spec = UpdateSpec("paper", 4, 768, (site,))
    module = PaperConfig().build(spec, 768)
    assert sum(parameter.numel() for parameter in module.parameters()) == 6_786_596
    assert spec.numbers_per_cluster == 204_100
    delta = module(torch.randn(1, 768), torch.ones(1)).delta(0, KEY, spec)
    assert delta.lora_a is not None
    assert delta.lora_b is not None
    assert delta.lora_a.size + delta.lora_b.size == 204_100


@pytest.mark.parametrize("sites", [1, 211])
def test_core_form_is_small_at_both_depths(sites: int) -> None:
    names = [f"layer.{index}" for index in range(sites - 1)] + [HEAD]
    spec = UpdateSpec(
        "full" if sites > 1 else "head", 16, 576, tuple(Site(name, 576, 576) for name in names)
    )
    module = CoreConfig().build(spec, 2048)
    assert 2 * sum(parameter.numel() for parameter in module.parameters()) < 5e6
    generated = module(torch.randn(2, 2048), torch.ones(2))
    assert [tuple(tensor.shape) for tensor in outputs(generated)] == [
        (2, sites, 16, 16),
        (2, 576),
    ]


def test_step_zero_changes_nothing_but_has_a_gradient(spec: UpdateSpec) -> None:
    torch.manual_seed(0)
    module = config_for(spec).build(spec, 12)
    generated = module(torch.randn(3, 12), torch.full((3,), 5.0))
    products = (
        [generated.lora_b @ generated.lora_a]
        if generated.lora_a is not None and generated.lora_b is not None
        else outputs(generated)
    )
    assert all(not product.any() for product in products)
    sum(product.sum() for product in products).backward()
    weights = (
        [module.last.weight]
        if spec.depth == "paper"
        else [
            module.cores.weight,
            module.shift.weight,
        ]
    )
    for weight in weights:
        assert weight.grad is not None
        assert weight.grad.any()


def test_training_moves_the_update_towards_its_cluster() -> None:
    """Two clusters with opposite targets: only a conditional update can fit both."""
    spec = UpdateSpec("head", 3, 12, (Site(HEAD, 12, 12),))
    torch.manual_seed(0)
    module, bases = CoreConfig(width=32).build(spec, 12), init_bases(spec, seed=0)
    vector, h = torch.randn(2, 12), torch.randn(2, 6, 12)
    target = h + torch.tensor([0.5, -0.5])[:, None, None]
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)

    def loss_of() -> torch.Tensor:
        generated = module(vector, torch.full((2,), 100.0))
        out = apply_head(h, bases, generated.cores[:, 0], generated.shift)
        return (out - target).square().mean()

    first = loss_of().item()
    for _ in range(60):
        optimiser.zero_grad()
        loss_of().backward()
        optimiser.step()
    assert loss_of().item() < 0.05 * first


def test_rows_are_independent_and_differ_by_cluster(
    spec: UpdateSpec, make_hypernetwork: MakeHypernetwork
) -> None:
    module = make_hypernetwork(spec).eval()
    vector, support = torch.randn(4, 12), torch.tensor([1.0, 3.0, 9.0, 27.0])
    together = outputs(module(vector, support))
    for row in range(4):
        alone = outputs(module(vector[row : row + 1], support[row : row + 1]))
        for one, all_rows in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_rows[row])
    assert all((tensor[0] - tensor[1]).abs().max() > 1e-3 for tensor in together)


def test_sites_get_different_cores(make_hypernetwork: MakeHypernetwork) -> None:
    spec = UpdateSpec("full", 3, 12, (Site("a", 12, 12), Site("b", 12, 12), Site(HEAD, 12, 12)))
    cores = make_hypernetwork(spec)(torch.randn(1, 12), torch.ones(1)).cores[0]
    assert (cores[0] - cores[1]).abs().max() > 1e-3


def test_condition_is_centred_and_of_constant_norm(make_hypernetwork: MakeHypernetwork) -> None:
    spec = UpdateSpec("head", 3, 12, (Site(HEAD, 12, 12),))
    module = make_hypernetwork(spec)
    vectors = 5 + torch.randn(40, 12)
    module.fit_normalisation(vectors)
    normalised = module.normalise(vectors)
    torch.testing.assert_close(normalised.norm(dim=1), torch.full((40,), 12**0.5))
    assert not module.normalise(vectors.mean(0, keepdim=True)).abs().max() > 1e-5
    assert "condition_mean" in module.state_dict()


def test_paper_form_sees_the_direction_of_the_centroid_only(
    make_hypernetwork: MakeHypernetwork,
) -> None:
    spec = UpdateSpec("paper", 2, 12, (Site("lm_head", 12, 20),))
    module, vector = make_hypernetwork(spec), torch.randn(1, 12)
    once = module(vector, torch.ones(1))
    twice = module(2 * vector, torch.full((1,), 50.0))
    torch.testing.assert_close(once.lora_b, twice.lora_b)


@given(
    kappa=st.floats(0.01, 1e4),
    low=st.floats(0, 1e5),
    more=st.floats(0, 1e5),
    learned=st.booleans(),
)
def test_gate_grows_from_zero_to_one_with_support(
    kappa: float, low: float, more: float, learned: bool
) -> None:
    gate = EvidenceGate(kappa, learned)
    values = gate(torch.tensor([0.0, low, low + more, kappa])).tolist()
    assert values[0] == 0
    assert 0 <= values[1] <= values[2] + 1e-6 <= 1 + 1e-6
    assert values[3] == pytest.approx(0.5, rel=1e-3)
    assert values[1] == pytest.approx(low / (low + kappa), rel=1e-3, abs=1e-6)


def test_gate_with_kappa_zero_is_open_for_any_support() -> None:
    gate = EvidenceGate(0.0, learned=False)
    assert gate(torch.tensor([0.0, 1.0, 50.0])).tolist() == [0.0, 1.0, 1.0]


def test_gate_scales_cores_and_shift(make_hypernetwork: MakeHypernetwork) -> None:
    spec = UpdateSpec("head", 3, 12, (Site(HEAD, 12, 12),))
    module = make_hypernetwork(spec)
    vector = torch.randn(1, 12).repeat(3, 1)
    kappa = float(module.gate.kappa)
    generated = module(vector, torch.tensor([0.0, kappa, 1e9]))
    for tensor in outputs(generated):
        assert not tensor[0].any()
        torch.testing.assert_close(2 * tensor[1], tensor[2])


def test_learned_kappa_is_trained() -> None:
    spec = UpdateSpec("head", 3, 12, (Site(HEAD, 12, 12),))
    module = CoreConfig(learn_kappa=True).build(spec, 12)
    assert "gate.raw" in dict(module.named_parameters())
    fixed = CoreConfig(learn_kappa=False).build(spec, 12)
    assert "gate.raw" not in dict(fixed.named_parameters())
    with pytest.raises(ConfigError, match="above 0"):
        CoreConfig(kappa=0, learn_kappa=True).build(spec, 12)


def test_delta_is_the_row_in_float16_and_read_only(
    spec: UpdateSpec, make_hypernetwork: MakeHypernetwork
) -> None:
    generated = make_hypernetwork(spec)(torch.randn(3, 12), torch.ones(3))
    delta = generated.delta(1, KEY, spec)
    delta.check(spec)
    back = Generated.of(delta)
    for ours, theirs in zip(outputs(back), outputs(generated), strict=True):
        assert torch.equal(ours[0], theirs[1].half().float())
    for name in ("cores", "shift", "lora_a", "lora_b"):
        array = getattr(delta, name)
        assert array is None or not array.flags.writeable


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_delta_refuses_numbers_beyond_float16(bad: float) -> None:
    spec = UpdateSpec("head", 2, 4, (Site(HEAD, 4, 4),))
    generated = Generated(cores=torch.full((1, 1, 2, 2), bad), shift=torch.zeros(1, 4))
    with pytest.raises(DeltaError, match="NaN or infinity"):
        generated.delta(0, KEY, spec)


@pytest.mark.parametrize(
    ("vector", "support", "message"),
    [
        (torch.zeros(1, 11), torch.ones(1), r"must be \[B, 12\]"),
        (torch.zeros(2, 12), torch.ones(1), r"must be \[B, 12\]"),
        (torch.zeros(1, 12), torch.ones(1, 1), r"must be \[B, 12\]"),
        (torch.full((1, 12), float("nan")), torch.ones(1), "NaN"),
        (torch.zeros(1, 12), torch.full((1,), float("inf")), "NaN"),
        (torch.zeros(1, 12), -torch.ones(1), "negative"),
    ],
)
def test_check_refuses_bad_conditions(
    spec: UpdateSpec,
    make_hypernetwork: MakeHypernetwork,
    vector: torch.Tensor,
    support: torch.Tensor,
    message: str,
) -> None:
    with pytest.raises(DeltaError, match=message):
        make_hypernetwork(spec).check(vector, support)


def test_configs_parse_by_kind_and_refuse_unknown_keys() -> None:
    adapter: TypeAdapter[CoreConfig | PaperConfig] = TypeAdapter(HypernetworkConfig)
    assert adapter.validate_python({"kind": "core", "width": 8}) == CoreConfig(width=8)
    assert adapter.validate_python({"kind": "paper"}) == PaperConfig(hidden_sizes=(64, 32))
    for bad in ({"kind": "core", "wide": 8}, {"kind": "core", "width": 0}, {"kind": "other"}):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)


def test_configs_refuse_the_other_depth() -> None:
    head = UpdateSpec("head", 3, 12, (Site(HEAD, 12, 12),))
    with pytest.raises(ConfigError):
        PaperConfig().build(head, 12)
    with pytest.raises(ConfigError):
        CoreConfig().build(UpdateSpec("paper", 3, 12, (Site("lm_head", 12, 30),)), 12)
