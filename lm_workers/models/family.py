"""Models of the Llama family, as an engine takes them: facts and weights, without transformers'
classes, which take long to import and much memory (docs/guides/performance.md).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from cluster_router.wire.errors import ModelError
from lm_workers.kv_cache import kv_geometry
from lm_workers.memory import untouched
from lm_workers.models.load import check_finite, check_loadable, lacks
from lm_workers.models.weights import StoredTensor, stored_tensors

_HEAD, _EMBEDDING, _BODY = "lm_head.weight", "model.embed_tokens.weight", "model."


class Linear(nn.Module):
    """A weight [out, in] and a bias [out]; torch's own is initialised, which on no device at all
    imports torch's compiler.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None


class Embedding(nn.Module):
    """A weight [vocab, hidden]."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [...] -> [..., hidden]."""
        return F.embedding(tokens, self.weight)


class Norm(nn.Module):
    """An RMS norm's weight [size]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps


class Attention(nn.Module):
    """One layer's.

    Attributes:
        scaling: of the scores.
        window: tokens that a query sees, None for all.
    """

    def __init__(self, config: PretrainedConfig, layer: int) -> None:
        super().__init__()
        kind, hidden, heads = config.model_type, config.hidden_size, config.num_attention_heads
        _, kv_heads, head_dim = kv_geometry(config)
        asked = bool(getattr(config, "attention_bias", False))
        bias = {"llama": asked, "mistral": False, "qwen2": True, "qwen3": asked}[kind]
        self.q_proj = Linear(hidden, heads * head_dim, bias)
        self.k_proj = Linear(hidden, kv_heads * head_dim, bias)
        self.v_proj = Linear(hidden, kv_heads * head_dim, bias)
        self.o_proj = Linear(heads * head_dim, hidden, bias and kind != "qwen2")
        self.q_norm = self.k_norm = None
        if kind == "qwen3":
            self.q_norm = Norm(head_dim, config.rms_norm_eps)
            self.k_norm = Norm(head_dim, config.rms_norm_eps)
        self.scaling = head_dim**-0.5
        self.window = _window(config, layer)


class MLP(nn.Module):
    """One layer's."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        bias = config.model_type == "llama" and bool(config.mlp_bias)
        self.gate_proj = Linear(hidden, inner, bias)
        self.up_proj = Linear(hidden, inner, bias)
        self.down_proj = Linear(inner, hidden, bias)


class Layer(nn.Module):
    """A decoder layer; `index` is its place."""

    def __init__(self, config: PretrainedConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)


class Body(nn.Module):
    """All but the head."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class FamilyModel(nn.Module):
    """Holds the weights under transformers' names. It computes nothing by itself.

    Args:
        config: of a model that `is_family`.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @property
    def base_model(self) -> Body:
        """As transformers calls what comes before the head."""
        return self.model

    def get_input_embeddings(self) -> Embedding:
        """As transformers calls it."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> Linear:
        """As transformers calls it."""
        return self.lm_head


def load_family(
    path: Path, config: PretrainedConfig, dtype: torch.dtype, device: str, as_stored: bool
) -> FamilyModel:
    """The model at `path`, frozen. Of its files nothing stays in memory.

    Args:
        path: the folder.
        config: of the model there, which `is_family`.
        dtype: of the weights.
        device: for them.
        as_stored: leave matrices in the dtype that they are stored in. Who computes in a wider one
            widens them part by part.

    Raises:
        ModelError: files missing or damaged, weights missing or of another shape than the config
            says, NaN or infinity in a weight.
    """
    check_loadable(path)
    with torch.device("meta"):
        model = FamilyModel(config)
    expected = dict(model.named_parameters())
    stored = {name: one for name, one in _named(path).items() if name in expected}
    tied = bool(config.tie_word_embeddings)
    if tied and _EMBEDDING not in stored and _HEAD in stored:
        stored[_EMBEDDING] = stored.pop(_HEAD)
    if missing := sorted(expected.keys() - stored.keys() - ({_HEAD} if tied else set())):
        raise lacks(path, missing)
    state = {}
    for name, one in stored.items():
        if one.shape != tuple(expected[name].shape):
            raise ModelError(
                f"{one.file} holds {one.name} as {list(one.shape)}, where the config beside it "
                f"says {list(expected[name].shape)}; fetch the model again"
            )
        state[name] = _own(one.read(), None if as_stored else dtype, dtype, device)
        check_finite(state[name], one.file, name)
    # As transformers does: a head that is stored beside the embedding is its own if it differs.
    if tied and (_HEAD not in state or torch.equal(state[_HEAD], state[_EMBEDDING])):
        state[_HEAD] = state[_EMBEDDING]
    model.load_state_dict(state, assign=True)
    if state[_HEAD] is state[_EMBEDDING]:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def _own(
    read: torch.Tensor, matrices: torch.dtype | None, vectors: torch.dtype, device: str
) -> torch.Tensor:
    """A copy in memory that goes back to the system as soon as nobody holds it.

    One that safetensors gives may keep its whole file there, and one that torch's allocator gives
    is not returned while others lie around it.
    """
    dtype = vectors if read.dim() == 1 else matrices or read.dtype
    if device != "cpu":
        return read.to(device, dtype)
    own = untouched(read.numel() * dtype.itemsize).view(dtype).view(read.shape)
    return own.copy_(read)


def _named(path: Path) -> dict[str, StoredTensor]:
    """The stored tensors by the names they have here: a base model's lack the outermost module."""
    stored = stored_tensors(path)
    if any(name.startswith(_BODY) for name in stored):
        return stored
    return {name if name == _HEAD else _BODY + name: one for name, one in stored.items()}


def _window(config: PretrainedConfig, layer: int) -> int | None:
    if config.model_type == "mistral":
        return config.sliding_window
    if config.model_type == "llama" or config.layer_types[layer] != "sliding_attention":
        return None
    return config.sliding_window
