"""Reading bundles for people: their facts, whether they are sound, their updates as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adapter_gen.bundle import Bundle
from adapter_gen.export import export_peft
from adapter_gen.generator import AdapterGenerator
from adapter_gen.storage import read_file, read_manifest, write_file
from cluster_router.prompts import following_text
from cluster_router.vocabulary import CharacteristicTokens
from cluster_router.wire.errors import BundleError, ChameleonError, UnknownClusterError
from cluster_router.wire.forms import ExportForm
from lm_workers.models import (
    describe_model,
    load_embedding,
    load_lm_head,
    load_tokenizer,
    public_model,
    resolve_model,
)

STATIC = "static"


@dataclass(frozen=True, slots=True)
class BundleCheck:
    """One thing looked at. `found` is what it is, or what is wrong and what to change."""

    name: str
    ok: bool
    found: str


def describe_bundle(path: Path, model: str | None, words: bool) -> dict[str, Any]:
    """The facts of a bundle, JSON values only. `words` names clusters, and needs the base model.

    Raises:
        BundleError: it cannot be read.
        ModelError: the base model cannot.
    """
    bundle, manifest = Bundle.load(path, None), read_manifest(path)
    snapshot, spec = bundle.snapshot, bundle.spec
    clusters: list[dict[str, Any]] = [
        {"id": int(id), "size": int(size), "version": int(version)}
        for id, size, version in zip(snapshot.ids, snapshot.sizes, snapshot.versions, strict=True)
    ]
    if words:
        names = _words(bundle, model or bundle.base_model)
        clusters = [one | {"words": list(name)} for one, name in zip(clusters, names, strict=True)]
    tokens = None if bundle.embedding is None else bundle.embedding.tokens
    return {
        "path": str(path),
        "base_model": bundle.base_model,
        "fingerprint": bundle.fingerprint,
        "hypernetwork_id": bundle.hypernetwork_id,
        "hypernetwork": bundle.config.kind,
        "hypernetwork_numbers": sum(
            one.numel() for one in bundle.hypernetwork.state_dict().values()
        ),
        "depth": spec.depth,
        "rank": spec.rank,
        "sites": len(spec.sites),
        "update_bytes": 2 * spec.numbers_per_cluster,
        "embedded_tokens": tokens,
        "created_by": bundle.created_by,
        "seed": bundle.seed,
        "prompts": int(snapshot.sizes.sum()),
        "threshold": round(float(snapshot.threshold), 4),
        "files": {name: record.size for name, record in manifest.files.items()},
        "nats_per_token": _losses(bundle),
        "clusters": clusters,
    }


def _losses(bundle: Bundle) -> dict[str, dict[str, float]]:
    """Mean losses of each group of domains, as the evaluation in the bundle has them."""
    found = {}
    for group, figures in (bundle.evaluation or {}).items():
        if isinstance(figures, dict) and "mean" in figures:
            found[group] = dict(figures["mean"].get("nats_per_token", {}))
    return found


def _words(bundle: Bundle, model: str) -> list[tuple[str, ...]]:
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    embedding = load_embedding(folder)
    describe = CharacteristicTokens(embedding, following_text(tokenizer))
    return describe(bundle.snapshot.centroids - bundle.snapshot.mean)


def verify_bundle(path: Path, model: str | None) -> list[BundleCheck]:
    """Every check up to the first that fails; what comes after it has nothing to stand on."""
    checks = _Checks(path, model)
    found: list[BundleCheck] = []
    for name, check in (
        ("files", checks.files),
        ("parts", checks.parts),
        ("base model", checks.base_model),
        ("updates", checks.updates),
    ):
        try:
            found.append(BundleCheck(name, True, check()))
        except ChameleonError as error:
            return [*found, BundleCheck(name, False, str(error))]
    return found


class _Checks:
    """Each says what it found, or raises what is wrong. Those below need those above."""

    def __init__(self, path: Path, model: str | None) -> None:
        self._path, self._model = path, model

    def files(self) -> str:
        manifest = read_manifest(self._path)
        for name, record in manifest.files.items():
            read_file(self._path, name, record)
        return f"{len(manifest.files)}, lengths and checksums agree"

    def parts(self) -> str:
        Bundle.load(self._path, None)
        return "they fit each other, and every number is finite"

    def base_model(self) -> str:
        name = self._model or read_manifest(self._path).base_model
        info = describe_model(resolve_model(name), name)
        Bundle.load(self._path, info.fingerprint)
        return f"{name} ({info.fingerprint}) is the one it was trained for"

    def updates(self) -> str:
        bundle = Bundle.load(self._path, None)
        generator, snapshot = AdapterGenerator(bundle), bundle.snapshot
        for row in tqdm(range(len(snapshot)), desc="updates", unit="cluster", delay=1, leave=False):
            generator.generate(bundle.key(snapshot, row), snapshot.conditioning_of(row))
        return f"those of all {len(snapshot)} clusters are finite and fit the model"


def export_cluster(
    path: Path, cluster: str, out: Path, model: str | None, form: ExportForm
) -> list[str]:
    """Write the update of `cluster` (an id, or "static") to the folder `out`; the files' names.

    Raises:
        BundleError: `out` exists, or the bundle cannot be read or belongs to another model.
        UnknownClusterError: the bundle has no such cluster.
        RequestError: `form` leaves nothing of the update.
    """
    if out.exists():
        raise BundleError(f"{out} exists; name another folder with --out", "out")
    bundle = Bundle.load(path, None)
    name = model or bundle.base_model
    folder = resolve_model(name)
    bundle = Bundle.load(path, describe_model(folder, name).fingerprint)
    row = _row(bundle, cluster)
    conditioning = None if row is None else bundle.snapshot.conditioning_of(row)
    delta = AdapterGenerator(bundle).generate(bundle.key(bundle.snapshot, row), conditioning)
    base, remark = public_model(name)
    head = load_lm_head(folder)
    files = export_peft(delta, bundle.spec, bundle.bases, base, head, form=form, base_remark=remark)
    out.mkdir(parents=True)
    for file, data in files.items():
        write_file(out / file, data)
    return list(files)


def _row(bundle: Bundle, cluster: str) -> int | None:
    if cluster == STATIC:
        return None
    row = bundle.snapshot.row(int(cluster)) if cluster.isdecimal() else None
    if row is None:
        ids = bundle.snapshot.ids
        raise UnknownClusterError(
            f"the bundle has no cluster {cluster!r}; it has {len(ids)}, from {ids.min()} to "
            f"{ids.max()}, and {STATIC!r}",
            "cluster",
        )
    return row
