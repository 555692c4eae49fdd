"""Turn a GGUF file into a folder of config, safetensors and tokenizer, once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from cluster_router.wire.errors import ModelError
from lm_workers.models.quiet import quiet_transformers

MAGIC = b"GGUF"


def convert_gguf(gguf: Path, target: Path, notice: str) -> Path:
    """Write `gguf` as bfloat16 safetensors with config and tokenizer into the folder `target`.

    `target` appears whole or not at all. `notice` says where the weights come from and goes beside
    them as NOTICE. Quantised weights are unpacked in float32 before they are rounded to bfloat16.

    Raises:
        ModelError: not a GGUF file, damaged, or of an architecture transformers cannot read.
    """
    _check_magic(gguf)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _convert(gguf, scratch)
        (scratch / "NOTICE").write_text(notice.strip() + "\n", encoding="utf-8")
        # mkdtemp makes the folder private; a cache may be shared.
        scratch.chmod(0o755)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _check_magic(gguf: Path) -> None:
    with gguf.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ModelError(f"{gguf} is not a GGUF file; give one that starts with 'GGUF'")


def _convert(gguf: Path, folder: Path) -> None:
    try:
        with quiet_transformers():
            model = _dequantize(gguf)
            tokenizer = AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, local_files_only=True
            )
            model.save_pretrained(folder, safe_serialization=True)
            tokenizer.save_pretrained(folder)
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
