"""Products with weights in 8 bits: beside the same in plain torch, and in an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from traffic_cases import CONFIG, Asked, answers, mixed, request, update_of

from cluster_router.wire.errors import ConfigError
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.engine import Engine
from lm_workers.layers import compiler
from lm_workers.layers.choose import choose_layout
from lm_workers.layers.panels import ByteProduct, HalfByteProduct

has_bytes = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_vnni"), reason="no AVX-512 VNNI here"
)
LAYOUTS = pytest.mark.parametrize("layout", [ByteProduct, HalfByteProduct])


def spread(rows: torch.Tensor) -> torch.Tensor:
    """Rows [N, K] as they are rounded: 64 inputs at a time by a Hadamard matrix, where they fit.

    Its own inverse.
    """
    if rows.shape[1] % 64:
        return rows.float()
    hadamard = torch.ones(1, 1)
    for _ in range(6):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    return (rows.float().unflatten(1, (-1, 64)) @ (hadamard / 8)).flatten(1)


def in_bytes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, K] as whole numbers, and what one of their units is [N, 1]."""
    size = rows.abs().amax(1, keepdim=True)
    per_unit = torch.where(size > 0, torch.full_like(size, 127) / size, 0)  # rounded once
    return (rows * per_unit).round().double(), (size / 127).double()


def plain_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What the layout gives, before it is rounded to its dtype."""
    (rows, row_unit), (columns, column_unit) = in_bytes(spread(x)), in_bytes(spread(weight))
    return rows @ columns.T * row_unit * column_unit.T + bias.double()


def whole_numbers(*shape: int) -> torch.Tensor:
    """Small ones: whatever order they are spread in, no sum is rounded."""
    return torch.randint(-8, 9, shape)


@has_bytes
@torch.inference_mode()
@LAYOUTS
@pytest.mark.parametrize("shape", [(576, 960), (1536, 576), (33, 65), (6, 5), (35, 4100)])
def test_bytes_give_the_numbers_that_whole_numbers_give_and_the_same_for_any_number_of_rows(
    cxx: str, shape: tuple[int, int], layout: type[ByteProduct]
) -> None:
    torch.manual_seed(0)
    weight = whole_numbers(shape[1], shape[0]).to(layout.dtype)
    bias = torch.randn(shape[1]).to(layout.dtype)
    x = whole_numbers(600, shape[0] + 3).to(layout.dtype)[:, : shape[0]]
    expected = plain_product(x, weight, bias)
    product = layout(weight, bias)
    found = product(x)
    assert found.dtype == layout.dtype
    half_unit = 2**-8 if layout.dtype == torch.bfloat16 else 2**-22
    error = (found.double() - expected).abs() - half_unit * expected.abs()
    assert error.max() <= 5e-7 * expected.abs().max()
    assert not torch.equal(found, layout(weight, None)(x))
    for rows in (*range(1, 27), 47, 500):
        assert torch.equal(product(x[:rows]), found[:rows])
        assert torch.equal(product(x[-rows:]), found[-rows:])
    assert torch.equal(layout(weight.T.contiguous().T, bias)(x), found)
    assert product(x[:0]).shape == (0, len(weight))


@has_bytes
@torch.inference_mode()
@LAYOUTS
def test_inputs_far_larger_than_the_others_leave_these_their_part(
    cxx: str, layout: type[ByteProduct]
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(96, 576).to(layout.dtype), torch.randn(40, 576).to(layout.dtype)
    x[:, 70] *= 100
    exact = x.double() @ weight.double().T
    theirs = exact - x[:, 70:71].double() @ weight[:, 70:71].double().T
    (rows, row_unit), (columns, column_unit) = in_bytes(x.float()), in_bytes(weight.float())
    unspread = rows @ columns.T * row_unit * column_unit.T

    def error(found: torch.Tensor) -> float:
        return float((found.double() - exact).norm() / theirs.norm())

    assert error(layout(weight, None)(x)) < 0.06 < 0.2 < error(unspread)


@has_bytes
@torch.inference_mode()
@LAYOUTS
@pytest.mark.parametrize("inputs", [33, 192])
def test_rows_of_a_weight_are_looked_up_as_they_are_multiplied_with(
    cxx: str, layout: type[ByteProduct], inputs: int
) -> None:
    torch.manual_seed(0)
    weight = whole_numbers(70, inputs).to(layout.dtype)
    whole, unit = in_bytes(spread(weight))
    some = torch.randint(len(weight), (50, 2))[:, 0]
    found = layout(weight, None).rows(some)
    assert found.dtype == layout.dtype
    expected = spread(whole * unit)[some]
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(found.float(), weight[some].float(), rtol=0, atol=0.2)


@has_bytes
@torch.inference_mode()
@LAYOUTS
def test_zeros_stay_zeros_and_what_is_no_number_spoils_its_own_row_alone(
    cxx: str, layout: type[ByteProduct]
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(40, 48).to(layout.dtype), torch.randn(5, 48).to(layout.dtype)
    weight[3], x[0] = 0, 0
    x[1, 7], x[2, 40], x[3, 0] = float("nan"), float("inf"), -float("nan")
    found = layout(weight, None)(x)
    assert not found[0].any() and not found[4, 3]
    assert found[1:4].isfinite().logical_not().all()
    assert found[4].isfinite().all()


@has_bytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_answers_do_not_depend_on_their_company(
    cxx: str, tiny_checkpoints: dict[str, Path], family: str, dtype: str
) -> None:
    path = tiny_checkpoints[family]
    spec, bases, deltas = update_of(path)
    config = EngineConfig(**{**CONFIG.model_dump(), "dtype": dtype, "linear": "int8"})

    def engine() -> Engine:
        return build_engine(path, config, (spec, bases))

    asked = mixed(deltas)
    found = answers(engine(), asked)
    alone: Asked = [
        (request(one.prompt_tokens, **one.sampling.model_dump()), d) for one, d in asked
    ]
    by_itself = engine()
    assert [answers(by_itself, [one])[0] for one in alone] == found
    assert answers(engine(), mixed([None])) != found


@has_bytes
def test_the_settings_choose_it_and_nothing_else_does(cxx: str) -> None:
    assert choose_layout("int8", torch.float32, "cpu") is ByteProduct
    assert choose_layout("int8", torch.bfloat16, "cpu") is HalfByteProduct
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_layout("auto", dtype, "cpu") not in {ByteProduct, HalfByteProduct}


def test_where_it_cannot_be_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"int8 is not possible: .* not for torch\.float16 on cpu"
    ):
        choose_layout("int8", torch.float16, "cpu")
    with pytest.raises(ConfigError, match=r"not for torch\.bfloat16 on cuda"):
        choose_layout("int8", torch.bfloat16, "cuda")

    def refuse(dtype: torch.dtype) -> None:
        raise compiler.CompileError("no such instruction")

    monkeypatch.setattr("lm_workers.layers.choose.load_bytes", refuse)
    with pytest.raises(ConfigError, match="no such instruction; use auto"):
        choose_layout("int8", torch.float32, "cpu")
