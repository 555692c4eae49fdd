"""Small real checkpoints of three families, and the default model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# Triton looks at it when it is imported, which transformers does: its kernels then run on a CPU.
os.environ["TRITON_INTERPRET"] = str(int(not Path("/dev/nvidiactl").exists()))

from deploy.environment import GRPC, SETTINGS

# So does Ray Serve: applications that tests deploy are bound as `serve run` binds them.
os.environ[GRPC] = SETTINGS[GRPC]

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from typer.testing import CliRunner, Result

from deploy.cli import app
from deploy.config import SHIPPED
from lm_workers.models import DEFAULT_MODEL, resolve_model

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "Paris is the capital of France.",
    "0123456",
]
CHAT = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
VOCAB = 320
SIZES = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, **LLAMA_LIKE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, **LLAMA_LIKE, head_dim=16, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )


@pytest.fixture(scope="session")
def tiny_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> dict[str, Path]:
    """One float32 folder of each family, with random weights. Read only."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, make in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make(), dtype=torch.float32)
        # Weights that bfloat16 holds exactly, so that copies in either dtype are the same model.
        model.to(torch.bfloat16).to(torch.float32).save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(params=sorted(CONFIGS))
def tiny_checkpoint(request: pytest.FixtureRequest, tiny_checkpoints: dict[str, Path]) -> Path:
    """Each family in turn. Read only."""
    return tiny_checkpoints[request.param]


@pytest.fixture(scope="session")
def tiny_llama(tiny_checkpoints: dict[str, Path]) -> Path:
    """The llama. Read only."""
    return tiny_checkpoints["llama"]


@pytest.fixture
def edit_config() -> Callable[..., Path]:
    """Copy a checkpoint and change settings in its config.json."""

    def edit(folder: Path, target: Path, **changes: object) -> Path:
        shutil.copytree(folder, target)
        file = target / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return target

    return edit


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The embedded default model, fetched once into the user's cache."""
    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def bundle_path() -> Path:
    """The shipped bundle of the default model."""
    return SHIPPED / DEFAULT_MODEL


@pytest.fixture
def chameleon(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `chameleon WORDS...` in this process, and fails on anything but an orderly end."""
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: object, input: str | None = None) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words], input=input)
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        return result

    return run
