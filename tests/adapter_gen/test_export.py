import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load
from transformers import PreTrainedModel

from adapter_gen.apply import adapted
from adapter_gen.export import MANIFEST, export_peft, zip_files
from adapter_gen.hypernetwork import Generated
from adapter_gen.update import LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.errors import DeltaError, RequestError
from cluster_router.wire.types import AdapterKey

TOKENS = torch.tensor([[5, 9, 2, 30, 11, 7], [1, 1, 8, 39, 0, 3]])


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
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-5)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits_of(loaded), plain)
    manifest = json.loads((tmp_path / MANIFEST).read_bytes())
    assert manifest["update"] == delta.key.id
    assert manifest["not_carried"] == []
    assert manifest["needs"] == ([] if spec.depth == "paper" else ["lora_bias"])


def test_without_lora_bias_the_shift_alone_is_left_out_and_said(
    model: PreTrainedModel, parts: tuple[UpdateSpec, SharedBases, LoraDelta], tmp_path: Path
) -> None:
    spec, bases, delta = parts
    weight = model.get_output_embeddings().weight.detach().clone()
    with adapted(model, spec, bases, Generated.of(delta)):
        expected = logits_of(model)
    files = export_peft(delta, spec, bases, "test/base", weight, form="plain")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    names = load(files["adapter_model.safetensors"])
    assert not [name for name in names if name.endswith("bias")]
    carried = logits_of(PeftModel.from_pretrained(model, tmp_path).eval())
    manifest = json.loads(files[MANIFEST])
    if spec.depth == "paper":
        constant = torch.zeros(40)
        assert manifest["not_carried"] == []
    else:
        shift = bases.shift + torch.tensor(delta.shift, dtype=torch.float32)
        constant = weight @ shift
        readme = files["README.md"].decode()
        assert f"|s| = {shift.norm():.6g}" in readme
        assert f"|W s| = {constant.abs().max():.6g}" in readme
        assert manifest["not_carried"] == ["head_shift"]
        assert manifest["head_shift"]["norm"] == pytest.approx(float(shift.norm()))
    torch.testing.assert_close(carried + constant, expected, rtol=1e-4, atol=1e-5)


def test_static_update_exports_the_shared_part(
    model: PreTrainedModel, parts: tuple[UpdateSpec, SharedBases, LoraDelta], tmp_path: Path
) -> None:
    spec, bases, _ = parts
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
    broken = LoraDelta(delta.key, cores=np.zeros((1, 2, 2), np.float16))
    with pytest.raises(DeltaError, match="must be"):
        export_peft(broken, spec, bases, "test/base", weight)


def test_linears_leave_out_the_head(
    model: PreTrainedModel, parts: tuple[UpdateSpec, SharedBases, LoraDelta], tmp_path: Path
) -> None:
    spec, bases, delta = parts
    weight = model.get_output_embeddings().weight.detach().clone()
    if spec.depth != "full":
        with pytest.raises(RequestError, match="another form"):
            export_peft(delta, spec, bases, "test/base", weight, form="linears")
        return
    files = export_peft(delta, spec, bases, "test/base", weight, form="linears")
    assert json.loads(files[MANIFEST])["not_carried"] == ["head_core", "head_shift"]
    assert delta.cores is not None and delta.shift is not None and spec.head is not None
    # What is left is the update whose part on the final hidden state is nothing.
    cores, s0 = delta.cores.copy(), bases.s0.clone()
    cores[spec.head], s0[spec.head] = 0, 0
    headless = replace(delta, cores=cores, shift=np.zeros_like(delta.shift))
    bare = replace(bases, s0=s0, shift=torch.zeros_like(bases.shift))
    with adapted(model, spec, bare, Generated.of(headless)):
        expected = logits_of(model)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-5)
