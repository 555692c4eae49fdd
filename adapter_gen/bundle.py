"""Bundle: everything that adapting one base model takes, as a directory that can be published.

- bundle.json: format version, base model, spec, hypernetwork settings, checksums
- hypernetwork.safetensors: weights of the hypernetwork
- bases.safetensors: U, V, S0 and s0, which all clusters share
- snapshot.safetensors: the clusters it was trained on
- token_weights.safetensors: optional, weight of each token in the prompt embedding
- evaluation.json: optional, what an evaluation run printed
- README.md: model card, which training writes and nothing reads
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.numpy

from adapter_gen import codec, storage
from adapter_gen.hypernetwork import Hypernetwork, HypernetworkConfig
from adapter_gen.storage import EmbeddingInfo, FileRecord, Manifest
from adapter_gen.update import SharedBases, UpdateSpec
from cluster_router.wire.errors import BundleError
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import AdapterKey, FloatArray


@dataclass(frozen=True, eq=False)
class Bundle:
    """A trained hypernetwork with all it belongs to, checked whole when made or loaded.

    The weights are copied and rounded to the precision of the files, so that a bundle in memory
    computes what it will compute after `save` and `load`.

    Attributes:
        base_model: name of the base model, for people.
        fingerprint: content id of the base model; a bundle serves no other.
        hypernetwork: in eval mode, on the CPU.
        bases: what all clusters share.
        snapshot: the clusters to start from.
        token_weights: float32 [vocab], weights of the prompt's mean; None for the plain mean.
        embedding: how prompts were embedded.
        evaluation: what an evaluation run found, JSON values only.
        created_by: command or job that made the bundle.
        seed: seed of its training.

    Raises:
        BundleError: parts do not fit each other, or a number is not finite.
    """

    base_model: str
    fingerprint: str
    hypernetwork: Hypernetwork
    bases: SharedBases
    snapshot: ClusterSnapshot
    token_weights: FloatArray | None = None
    embedding: EmbeddingInfo | None = None
    evaluation: dict[str, Any] | None = None
    created_by: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        codec.check_spec(self.spec)
        dim = self.snapshot.conditioning.shape[1]
        if dim != self.hypernetwork.conditioning_dim:
            raise BundleError(
                f"the snapshot's conditioning has {dim} numbers, "
                f"the hypernetwork takes {self.hypernetwork.conditioning_dim}"
            )
        if self.embedding is not None and self.embedding.dim != self.snapshot.dim:
            raise BundleError(
                f"embedding.dim is {self.embedding.dim}, the centroids have {self.snapshot.dim}"
            )
        codec.check_token_weights(self.token_weights)
        object.__setattr__(self, "bases", codec.rounded_bases(self.bases, self.spec))
        object.__setattr__(self, "hypernetwork", codec.rounded_module(self.hypernetwork))

    @property
    def spec(self) -> UpdateSpec:
        """Shape of the updates."""
        return self.hypernetwork.spec

    @property
    def config(self) -> HypernetworkConfig:
        """Settings of the hypernetwork."""
        return self.hypernetwork.config

    @cached_property
    def hypernetwork_id(self) -> str:
        """Sixteen hex digits that change with any weight, basis or setting of an update."""
        settings = {"spec": asdict(self.spec), "config": self.config.model_dump()}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        tensors = {**self.hypernetwork.state_dict(), **codec.base_tensors(self.bases)}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(codec.stored(name, tensor).numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def clusters_id(self) -> str:
        """Sixteen hex digits that change with any cluster, and with how prompts are embedded."""
        digest = hashlib.sha256(codec.encode_snapshot(self.snapshot))
        if self.token_weights is not None:
            digest.update(self.token_weights.tobytes())
        if self.embedding is not None:
            digest.update(self.embedding.model_dump_json().encode())
        return digest.hexdigest()[:16]

    def key(self, snapshot: ClusterSnapshot, row: int | None) -> AdapterKey:
        """Name of the update of cluster `row` of `snapshot`; None is the static update."""
        cluster = None if row is None else int(snapshot.ids[row])
        version = 0 if row is None else int(snapshot.versions[row])
        return AdapterKey(self.fingerprint, self.hypernetwork_id, cluster, version)

    def save(self, path: Path) -> None:
        """Write the directory `path`, which appears whole or not at all.

        Raises:
            BundleError: `path` exists already.
        """
        if path.exists():
            raise BundleError(f"{path} exists; a bundle is never overwritten, name another path")
        path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            for name, data in self._files().items():
                storage.write_file(building / name, data)
            building.chmod(0o755)
            building.rename(path)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        _sync_directory(path.parent)

    def _files(self) -> dict[str, bytes]:
        files = {
            storage.HYPERNETWORK: codec.encode_tensors(self.hypernetwork.state_dict()),
            storage.BASES: codec.encode_tensors(codec.base_tensors(self.bases)),
            storage.SNAPSHOT: codec.encode_snapshot(self.snapshot),
        }
        if self.token_weights is not None:
            weights = {"weights": self.token_weights}
            files[storage.TOKEN_WEIGHTS] = safetensors.numpy.save(weights)
        if self.evaluation is not None:
            files[storage.EVALUATION] = storage.encode_json(self.evaluation)
        manifest = Manifest(
            base_model=self.base_model,
            fingerprint=self.fingerprint,
            spec=self.spec,
            hypernetwork=self.config,
            embedding=self.embedding,
            created_by=self.created_by,
            seed=self.seed,
            files={name: FileRecord.of(data) for name, data in files.items()},
        )
        files[storage.MANIFEST] = storage.encode_json(manifest.model_dump(mode="json"))
        return files

    @classmethod
    def load(cls, path: Path, fingerprint: str | None) -> Bundle:
        """Read and check a bundle. Only safetensors and JSON are read; no code can run.

        Args:
            path: the directory.
            fingerprint: content id of the base model it is to adapt; None skips that check.

        Raises:
            BundleError: anything is missing, damaged, malformed or of another base model.
        """
        manifest = storage.read_manifest(path)
        if fingerprint is not None and manifest.fingerprint != fingerprint:
            raise BundleError(
                f"{path} belongs to {manifest.base_model} ({manifest.fingerprint}), not to the "
                f"base model being served ({fingerprint}); choose the bundle of that model"
            )
        codec.check_spec(manifest.spec)
        files = {
            name: storage.read_file(path, name, record) for name, record in manifest.files.items()
        }
        snapshot = codec.decode_snapshot(files[storage.SNAPSHOT])
        return cls(
            base_model=manifest.base_model,
            fingerprint=manifest.fingerprint,
            hypernetwork=codec.decode_hypernetwork(files[storage.HYPERNETWORK], manifest, snapshot),
            bases=codec.decode_bases(files[storage.BASES], manifest.spec),
            snapshot=snapshot,
            token_weights=codec.decode_token_weights(files.get(storage.TOKEN_WEIGHTS)),
            embedding=manifest.embedding,
            evaluation=codec.decode_evaluation(files.get(storage.EVALUATION)),
            created_by=manifest.created_by,
            seed=manifest.seed,
        )


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
