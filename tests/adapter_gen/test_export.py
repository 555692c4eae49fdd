import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from adapter_gen.apply import adapted
from adapter_gen.export import export_peft, zip_files
from adapter_gen.hypernetwork import Generated, Hypernetwork
from adapter_gen.sites import discover_sites
from adapter_gen.update import Depth, LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.errors import DeltaError
from cluster_router.wire.types import AdapterKey

KEY = AdapterKey("base", "hyper", 4, 2)
TOKENS = torch.tensor([[5, 9, 2, 30, 11, 7], [1, 1, 8, 39, 0, 3]])


@pytest.fixture
def parts(
    model: PreTrainedModel,
    depth: Depth,
    make_hypernetwork: Callable[..., Hypernetwork],
    make_bases: Callable[[UpdateSpec], SharedBases],
) -> tuple[UpdateSpec, SharedBases, LoraDelta]:
    spec = discover_sites(model, depth, rank=3, alpha=6.0)
    module = make_hypernetwork(spec, 8)
    delta = module(torch.randn(1, 8), torch.tensor([40.0])).delta(0, KEY, spec)
    return spec, make_bases(spec), delta


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_peft_computes_the_reference(
    model: PreTrainedModel,
    parts: tuple[UpdateSpec, SharedBases, LoraDelta],
    tmp_path: Path,
) -> None:
    spec, bases, delta = parts
    weight = model.get_output_embeddings().weight.detach().clone()
    plain = logits_of(model)
    with adapted(model, spec, bases, Generated.of(delta)):
        expected = logits_of(model)
    assert torch.equal(logits_of(model), plain)
    assert (expected - plain).abs().max() > 0.05
    for name, data in export_peft(delta, spec, bases, "test/base", weight).items():
        (tmp_path / name).write_bytes(data)

    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    carried = logits_of(loaded)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits_of(loaded), plain)

    constant = torch.zeros(40)
    if spec.depth != "paper":
        shift = bases.shift + torch.tensor(delta.shift, dtype=torch.float32)
        constant = weight @ shift
        readme = (tmp_path / "README.md").read_text()
        assert f"|s| = {shift.norm():.6g}" in readme
        assert f"|W s| = {constant.abs().max():.6g}" in readme
    torch.testing.assert_close(carried + constant, expected, rtol=1e-4, atol=1e-5)


def test_static_update_exports_the_shared_part(
    model: PreTrainedModel, parts: tuple[UpdateSpec, SharedBases, LoraDelta], tmp_path: Path
) -> None:
    spec, bases, _ = parts
    bases = SharedBases(bases.u, bases.v, bases.s0, torch.zeros_like(bases.shift))
    static = LoraDelta.static(AdapterKey("base", "hyper", None, 0), spec)
    with adapted(model, spec, bases, Generated.of(static)):
        expected = logits_of(model)
    weight = model.get_output_embeddings().weight
    files = export_peft(static, spec, bases, "test/base", weight)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert "the static update" in files["README.md"].decode()
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-5)


def test_zip_holds_the_files_and_is_reproducible(
    model: PreTrainedModel, parts: tuple[UpdateSpec, SharedBases, LoraDelta]
) -> None:
    spec, bases, delta = parts
    weight = model.get_output_embeddings().weight
    files = export_peft(delta, spec, bases, "test/base", weight)
    archive = zip_files(files)
    assert archive == zip_files(export_peft(delta, spec, bases, "test/base", weight))
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        assert {name: opened.read(name) for name in opened.namelist()} == files
    assert json.loads(files["adapter_config.json"])["r"] == 3


def test_refuses_parts_that_do_not_fit(
    model: PreTrainedModel, parts: tuple[UpdateSpec, SharedBases, LoraDelta]
) -> None:
    spec, bases, delta = parts
    weight = model.get_output_embeddings().weight
    with pytest.raises(DeltaError, match="head_weight"):
        export_peft(delta, spec, bases, "test/base", weight.T)
    broken = LoraDelta(KEY, cores=np.zeros((1, 2, 2), np.float16))
    with pytest.raises(DeltaError, match="must be"):
        export_peft(broken, spec, bases, "test/base", weight)
