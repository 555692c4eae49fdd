"""Load the frozen model, its tokenizer, or only its embedding, from a resolved folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from cluster_router.wire.errors import ConfigError, ModelError
from lm_workers.models.kept import KeptAnswer
from lm_workers.models.quiet import quiet_transformers
from lm_workers.models.weights import StoredTensor, check_folder, is_quantised, stored_tensors

# Model classes take seconds to import; most processes want the tokenizer or the embedding alone.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
EMBEDDINGS = (
    "embed_tokens.weight",  # Llama, Qwen, Mistral, Gemma, Phi, OPT
    "wte.weight",  # GPT-2
    "embed_in.weight",  # GPT-NeoX
    "word_embeddings.weight",  # BLOOM, Falcon
)
LM_HEADS = ("lm_head.weight", "embed_out.weight")
_CHECKED = 2**22
"""Numbers that are checked for NaN at a time."""


def load_causal_lm(
    path: Path, dtype: torch.dtype | Literal["auto"], device: str
) -> PreTrainedModel:
    """The model at `path`, frozen and in eval mode; `"auto"` leaves it as it is stored.

    Reads safetensors only and never runs code that comes with a model.

    Raises:
        ModelError: files missing or damaged, weights missing, NaN or infinity in a weight, or an
            architecture that transformers does not know.
    """
    from transformers import AutoModelForCausalLM

    check_loadable(path)
    with _loading(path):
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            device_map={"": device},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    return _frozen(model, report, path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`. Raises ModelError when it is missing or cannot be read."""
    kept = KeptAnswer("tokenizers", path)
    known = _tokenizer_class(kept.read())
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = (
                known or transformers.AutoTokenizer
            ).from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # tokenizers raises bare Exception for a malformed tokenizer.json.
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {error}") from error
    name = type(tokenizer).__name__
    if known is None and _tokenizer_class(name) is type(tokenizer):
        kept.keep(name)
    return tokenizer


def _tokenizer_class(name: object) -> type[PreTrainedTokenizerBase] | None:
    """Transformers' class of this name, if it is a tokenizer's."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
    return found if known else None


def load_embedding(path: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The input embedding [vocab, hidden] in `dtype`, read without building the model."""
    stored = find_embedding(stored_tensors(path))
    matrix = stored.read().to(dtype)
    check_finite(matrix, stored.file, stored.name)
    return matrix


def load_lm_head(path: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The LM head's weight [vocab, hidden]; where none is stored it is tied to the embedding."""
    tensors = stored_tensors(path)
    for name in LM_HEADS:
        if name in tensors:
            return tensors[name].read().to(dtype)
    return load_embedding(path, dtype)


def find_embedding(tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    """The input embedding [vocab, hidden] among a folder's tensors."""
    for ending in EMBEDDINGS:
        found = [name for name in tensors if name == ending or name.endswith("." + ending)]
        if len(found) == 1:
            return tensors[found[0]]
    raise ModelError(
        f"no input embedding under a known name ({', '.join(EMBEDDINGS)}) among "
        f"{', '.join(sorted(tensors)[:3])}...; give a decoder-only language model"
    )


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The dtype that a setting names; `"auto"` is the fastest one `device` computes natively."""
    if name == "auto":
        return auto_dtype(device)
    if name not in DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}; got {name!r}", "dtype")
    return DTYPES[name]


def auto_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = kind == "cpu" and _cpu_multiplies_bf16()
    return torch.bfloat16 if native else torch.float32


def _cpu_multiplies_bf16() -> bool:
    flags = torch.cpu.get_capabilities()
    return any(bool(flags.get(flag)) for flag in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def check_loadable(path: Path) -> None:
    """Raise ModelError unless `path` holds a whole model that can be computed with."""
    check_folder(path)
    if is_quantised(path):
        raise ModelError(
            f"{path} holds quantised weights; give the unquantised model, or a .gguf file, "
            "or serve it with vLLM (`engine: {backend: vllm}`)"
        )


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    try:
        with quiet_transformers():
            yield
    except Exception as error:
        # The config is anybody's: model classes fail with whatever they trip over.
        raise ModelError(f"{path} cannot be loaded as a language model: {error}") from error


def _frozen(model: PreTrainedModel, report: Mapping[str, Any], path: Path) -> PreTrainedModel:
    if missing := sorted(report["missing_keys"]):
        raise lacks(path, missing)
    model.eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        check_finite(weight, _file_of(name, path), name)
    return model


def lacks(path: Path, missing: Sequence[str]) -> ModelError:
    """The error of a model at `path` without these weights."""
    return ModelError(f"{path} lacks {len(missing)} weights, among them {missing[0]}")


def check_finite(weight: torch.Tensor, file: Path, name: str) -> None:
    """Raise ModelError if a weight, read from `file`, holds NaN or infinity."""
    # In parts: the check makes several copies of what it is given.
    if not all(torch.isfinite(part).all() for part in weight.flatten().split(_CHECKED)):
        raise ModelError(
            f"{file} holds NaN or infinity in {name} as {weight.dtype}; fetch the model again, "
            "or choose a dtype with a wider range"
        )


def _file_of(parameter: str, path: Path) -> Path:
    """The file of a module's weight; checkpoints may leave out the outermost module's name."""
    tensors = stored_tensors(path)
    for name in (parameter, parameter.partition(".")[2]):
        if name in tensors:
            return tensors[name].file
    return path
