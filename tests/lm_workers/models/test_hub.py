"""Hugging Face ids, against a small hub of our own that speaks the real client's protocol."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from cluster_router.wire.errors import ModelError
from lm_workers.models import DEFAULT_MODEL, load_causal_lm, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves the files of `root` as the model `tiny/llama`; `refusal` answers everything else."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.refusal = "RepoNotFound"
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests.append(self.path)
                status, headers, body = hub.answer(self.path.partition("?")[0])
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        return Handler

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        model = "/api/models/tiny/llama"
        if path in {model, f"{model}/revision/main"}:
            return 200, {"Content-Type": "application/json"}, json.dumps(self._info()).encode()
        if path == f"{model}/tree/{COMMIT}":
            return 200, {"Content-Type": "application/json"}, json.dumps(self._tree()).encode()
        file = self.root / path.removeprefix(f"/tiny/llama/resolve/{COMMIT}/")
        if not path.startswith("/tiny/llama/resolve/") or not file.is_file():
            status = 403 if self.refusal == "GatedRepo" else 404
            return status, {"X-Error-Code": self.refusal}, b"{}"
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, content

    def _files(self) -> list[str]:
        return [str(f.relative_to(self.root)) for f in self.root.rglob("*") if f.is_file()]

    def _info(self) -> dict[str, object]:
        files = [{"rfilename": name} for name in self._files()]
        return {"id": "tiny/llama", "modelId": "tiny/llama", "sha": COMMIT, "siblings": files}

    def _tree(self) -> list[dict[str, object]]:
        return [
            {
                "type": "file",
                "path": name,
                "size": (self.root / name).stat().st_size,
                "oid": hashlib.sha256((self.root / name).read_bytes()).hexdigest(),
            }
            for name in self._files()
        ]


def point_client_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, which the client reads once when it is imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (llama / "pytorch_model.bin").write_bytes(b"pickle")
    (llama / "onnx").mkdir()
    (llama / "onnx" / "config.json").write_text("{}")
    (llama / "modeling_own.py").write_text("raise SystemExit")
    hub = Hub(llama)
    point_client_at(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def test_fetched_once_then_offline(hub: Hub) -> None:
    folder = resolve_model("tiny/llama")
    names = {file.name for file in folder.rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "onnx", "modeling_own.py"}
    assert load_causal_lm(folder, torch.float32, "cpu").config.hidden_size == 32

    hub.requests.clear()
    assert resolve_model("tiny/llama") == folder
    assert hub.requests == []


def test_download_that_was_cut_short_is_completed(hub: Hub) -> None:
    folder = resolve_model("tiny/llama")
    weights = folder / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    assert resolve_model("tiny/llama") == folder
    assert load_causal_lm(folder, torch.float32, "cpu")


def test_no_such_model(hub: Hub) -> None:
    with pytest.raises(ModelError, match=f"no such model, nor a folder.*'{DEFAULT_MODEL}'"):
        resolve_model("smollm-135m-instruct")


def test_gated(hub: Hub) -> None:
    hub.refusal = "GatedRepo"
    with pytest.raises(ModelError, match=r"gated; accept its terms .* HF_TOKEN"):
        resolve_model("tiny/gated")


def test_pickle_only(hub: Hub) -> None:
    (hub.root / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"'tiny/llama' from Hugging Face: .* no model\.safetenso"):
        resolve_model("tiny/llama")


def test_file_that_cannot_be_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refusal = "EntryNotFound"
    tree = [*hub._tree(), {"type": "file", "path": "vocab.json", "size": 1, "oid": "0" * 40}]
    monkeypatch.setattr(hub, "_tree", lambda: tree)
    with pytest.raises(ModelError, match="the download failed"):
        resolve_model("tiny/llama")


def test_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        resolve_model("tiny/llama")


def test_partial_and_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model("tiny/llama")
    shutil.rmtree(folder)
    point_client_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ModelError, match="nothing usable is in its local cache"):
        resolve_model("tiny/llama")
