"""A generator replica in this process: nothing that takes long is done on its event loop."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from pathlib import Path

import pytest

from adapter_gen.bundle import Bundle
from deploy import generator
from deploy.affinity import RESIDENT
from deploy.config import AppConfig
from deploy.generator import GeneratorReplica


async def test_an_adapter_is_packed_in_a_thread(
    default_model: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_in: list[int] = []

    def noted(files: dict[str, bytes]) -> bytes:
        packed_in.append(threading.get_ident())
        return zip_files(files)

    zip_files = generator.zip_files
    monkeypatch.setattr(generator, "zip_files", noted)
    replica = GeneratorReplica(AppConfig())
    try:
        bundle = Bundle.load(bundle_path, None)
        key, conditioning = bundle.key(bundle.snapshot, 0), bundle.snapshot.conditioning_of(0)
        archive = await replica.export(key, conditioning, "linears")
    finally:
        for task in replica._tasks:
            task.cancel()
    files = zipfile.ZipFile(io.BytesIO(archive))
    config = json.loads(files.read("adapter_config.json"))
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert b"quantised to 4 bits" in files.read("README.md")
    assert len(packed_in) == 1 and threading.get_ident() not in packed_in


async def test_updates_are_sent_whole_and_named_to_whoever_routes(
    default_model: Path, bundle_path: Path
) -> None:
    replica = GeneratorReplica(AppConfig())
    try:
        assert await replica.record_routing_stats() == {RESIDENT: []}
        bundle = Bundle.load(bundle_path, None)
        key, conditioning = bundle.key(bundle.snapshot, 0), bundle.snapshot.conditioning_of(0)
        delta = await replica.get(key, conditioning)
        delta.check(bundle.spec)
        assert delta.key == key
        assert await replica.record_routing_stats() == {RESIDENT: [key.id]}
    finally:
        for task in replica._tasks:
            task.cancel()
