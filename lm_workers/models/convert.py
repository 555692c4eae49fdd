"""Turn a GGUF file into a folder of config, safetensors and tokenizer, once."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cluster_router.wire.errors import ModelError
from lm_workers.models.quiet import quiet_transformers
from lm_workers.models.weights import CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAGIC = b"GGUF"
FORMAT = 1
"""Part of a converted folder's name: raise it when what is written changes."""


def convert_gguf(gguf: Path, target: Path, notice: str) -> Path:
    """Write `gguf` as bfloat16 safetensors with config and tokenizer into the folder `target`.

    `target` appears whole or not at all; the caller holds a lock on it. `notice` says where the
    weights come from and goes beside them as NOTICE. Quantised weights are unpacked in float32
    before they are rounded to bfloat16.

    Raises:
        ModelError: not a GGUF file, damaged, or of an architecture transformers cannot read.
    """
    _check_magic(gguf)
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
    scratch.mkdir(parents=True)
    try:
        _convert(gguf, scratch)
        (scratch / "NOTICE").write_text(notice.strip() + "\n", encoding="utf-8")
        _share(scratch)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _share(folder: Path) -> None:
    """Give the weights the mode of the config: safetensors writes private files."""
    mode = (folder / CONFIG).stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)


def _check_magic(gguf: Path) -> None:
    with gguf.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ModelError(f"{gguf} is not a GGUF file; give one that starts with 'GGUF'")


def _convert(gguf: Path, folder: Path) -> None:
    from lm_workers.models.gguf_tokenizer import save_gguf_tokenizer  # not for who converts nothing

    try:
        # The GGUF reader draws its own progress bar on stderr.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            model = _dequantize(gguf)
            model.save_pretrained(folder, safe_serialization=True)
            save_gguf_tokenizer(gguf, folder)
    except ModelError:
        raise
    except Exception as error:
        # The file is anybody's: its readers fail with whatever they trip over.
        raise ModelError(
            f"{gguf} cannot be converted ({type(error).__name__}: {error}); "
            "fetch it again, or give a model of an architecture transformers knows"
        ) from error


def _dequantize(gguf: Path) -> PreTrainedModel:
    """The model with plain bfloat16 weights and a config that has forgotten GGUF."""
    from transformers import AutoModelForCausalLM, GgufConfig

    packed, report = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{gguf} lacks {len(missing)} weights, among them {missing[0]}")
    weights = packed.state_dict()
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{gguf} holds NaN or infinity in {name}; fetch it again")
    config = type(packed.config).from_dict(_plain(packed.config.to_dict()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    model.load_state_dict(halves, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = packed.generation_config
    return model


def _plain(config: dict[str, object]) -> dict[str, object]:
    dropped = {"quantization_config", "_name_or_path", "dtype", "torch_dtype"}
    return {key: value for key, value in config.items() if key not in dropped}
