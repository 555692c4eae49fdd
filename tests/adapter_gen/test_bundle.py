import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from adapter_gen.apply import init_bases
from adapter_gen.bundle import Bundle
from adapter_gen.hypernetwork import CoreConfig
from adapter_gen.storage import EmbeddingInfo
from adapter_gen.update import HEAD, Depth, SharedBases, Site, UpdateSpec
from cluster_router.wire.errors import BundleError

MakeBundle = Callable[..., Bundle]


@pytest.fixture
def saved(make_bundle: MakeBundle, tmp_path: Path) -> Path:
    make_bundle("full").save(tmp_path / "bundle")
    return tmp_path / "bundle"


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "bundle.json").read_text())
    (path / "bundle.json").write_text(json.dumps({**manifest, **changes}))


def rewrite(path: Path, name: str, data: bytes) -> None:
    """Replace a file and its record, as someone would who edits a bundle on purpose."""
    (path / name).unlink()
    (path / name).write_bytes(data)
    files = json.loads((path / "bundle.json").read_text())["files"]
    files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(path, files=files)


def edit_tensors(path: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(path / name)
    edit(tensors)
    rewrite(path, name, safetensors.torch.save(tensors))


def test_round_trip_computes_the_same_update(
    make_bundle: MakeBundle, depth: Depth, tmp_path: Path
) -> None:
    bundle = make_bundle(depth, embedding=EmbeddingInfo(dim=12, tokens=256))
    bundle.save(tmp_path / "bundle")
    state = torch.random.get_rng_state()
    loaded = Bundle.load(tmp_path / "bundle", bundle.fingerprint)

    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.hypernetwork_id == bundle.hypernetwork_id
    assert loaded.spec == bundle.spec
    assert loaded.config == bundle.config
    assert loaded.embedding == bundle.embedding
    assert loaded.evaluation == bundle.evaluation
    assert (loaded.created_by, loaded.seed) == ("a test", 3)
    for name, array in bundle.snapshot.arrays().items():
        assert np.array_equal(loaded.snapshot.arrays()[name], array), name
    assert np.array_equal(loaded.token_weights, bundle.token_weights)
    for ours, theirs in zip(bundle.bases.u, loaded.bases.u, strict=True):
        assert torch.equal(ours, theirs)
    vector, support = torch.randn(2, 12), torch.tensor([1.0, 9.0])
    for before, after in zip(
        vars(bundle.hypernetwork(vector, support)).values(),
        vars(loaded.hypernetwork(vector, support)).values(),
        strict=True,
    ):
        assert (before is None and after is None) or torch.equal(before, after)


def test_optional_parts_may_be_absent(make_bundle: MakeBundle, tmp_path: Path) -> None:
    make_bundle("head", token_weights=None, evaluation=None).save(tmp_path / "bundle")
    loaded = Bundle.load(tmp_path / "bundle", None)
    assert loaded.token_weights is None
    assert loaded.evaluation is None


def test_key_names_content(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    key = bundle.key(bundle.snapshot, 2)
    assert (key.base, key.cluster, key.version) == (bundle.fingerprint, 12, 5)
    assert bundle.key(bundle.snapshot, None).cluster is None

    module = make_bundle().hypernetwork
    with torch.no_grad():
        next(module.parameters()).flatten()[0] += 0.5
    assert make_bundle(hypernetwork=module).hypernetwork_id != key.hypernetwork
    bases = bundle.bases
    moved = SharedBases(bases.u, bases.v, bases.s0 + 1, bases.shift)
    assert make_bundle(bases=moved).hypernetwork_id != key.hypernetwork
    assert make_bundle(evaluation=None).hypernetwork_id == key.hypernetwork


def test_save_is_all_or_nothing(make_bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="JSON"):
        make_bundle(evaluation={"nll": float("nan")}).save(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    make_bundle().save(tmp_path / "bundle")
    with pytest.raises(BundleError, match="never overwritten"):
        make_bundle().save(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_refuses_another_base(saved: Path) -> None:
    with pytest.raises(BundleError, match="belongs to test/base"):
        Bundle.load(saved, "0" * 16)


@pytest.mark.parametrize(
    "name",
    ["bundle.json", "hypernetwork.safetensors", "bases.safetensors", "token_weights.safetensors"],
)
def test_refuses_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.load(saved, None)


def test_refuses_truncated_file(saved: Path) -> None:
    data = (saved / "bases.safetensors").read_bytes()
    (saved / "bases.safetensors").write_bytes(data[:-1])
    with pytest.raises(BundleError, match=r"bases\.safetensors has .* bytes, expected"):
        Bundle.load(saved, None)


def test_refuses_flipped_bit(saved: Path) -> None:
    data = bytearray((saved / "hypernetwork.safetensors").read_bytes())
    data[-1] ^= 1
    (saved / "hypernetwork.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match="checksum"):
        Bundle.load(saved, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"format_version": None}, "format version None"),
        ({"colour": "red"}, "colour"),
        ({"seed": "many"}, "seed"),
        ({"hypernetwork": {"kind": "core", "depth": 9}}, "depth"),
        ({"hypernetwork": {"kind": "pickle"}}, "hypernetwork"),
        ({"hypernetwork": {"kind": "paper"}}, "depth paper"),
        ({"hypernetwork": {"kind": "core", "width": 17}}, "must be"),
        ({"files": {}}, "does not list hypernetwork.safetensors"),
    ],
)
def test_refuses_bad_manifest(saved: Path, changes: dict[str, object], message: str) -> None:
    edit_manifest(saved, **changes)
    with pytest.raises(BundleError, match=message):
        Bundle.load(saved, None)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format_version": 1}', "[" * 100_000])
def test_refuses_manifest_that_is_none(saved: Path, text: str) -> None:
    (saved / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        Bundle.load(saved, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "positive"),
        ({"hidden_size": -4}, "positive"),
        ({"rank": 10**30}, "plausible"),
        ({"depth": "head"}, "depth head"),
        ({"sites": []}, "depth full"),
        ({"beta": 1}, "beta"),
    ],
)
def test_refuses_bad_spec(saved: Path, change: dict[str, object], message: str) -> None:
    spec = json.loads((saved / "bundle.json").read_text())["spec"]
    edit_manifest(saved, spec={**spec, **change})
    with pytest.raises(BundleError, match=message):
        Bundle.load(saved, None)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "model.pkl"])
def test_refuses_other_file_names(saved: Path, name: str) -> None:
    files = json.loads((saved / "bundle.json").read_text())["files"]
    edit_manifest(saved, files={**files, name: next(iter(files.values()))})
    with pytest.raises(BundleError, match="no bundle has"):
        Bundle.load(saved, None)


@pytest.mark.parametrize("name", ["bundle.json", "bases.safetensors"])
def test_refuses_link_out_of_the_directory(saved: Path, name: str) -> None:
    (saved / name).rename(saved.parent / "outside")
    (saved / name).symlink_to(saved.parent / "outside")
    with pytest.raises(BundleError, match="link out of the bundle"):
        Bundle.load(saved, None)


@pytest.mark.parametrize("name", ["hypernetwork.safetensors", "bases.safetensors"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t[max(t)].fill_(float("nan")), "NaN"),
        (lambda t: t[max(t)].fill_(float("inf")), "NaN or infinity"),
        (lambda t: t.update({max(t): t[max(t)].double()}), "float64"),
        (lambda t: t.update({max(t): t[max(t)][..., :-1].contiguous()}), "must be"),
        (lambda t: t.pop(max(t)), "lacks"),
        (lambda t: t.update(extra=torch.zeros(1)), "holds extra"),
    ],
)
def test_refuses_bad_tensors(
    saved: Path,
    name: str,
    edit: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    edit_tensors(saved, name, edit)
    with pytest.raises(BundleError, match=message):
        Bundle.load(saved, None)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("mean"), "lacks mean"),
        (lambda t: t.update(ids=t["ids"].int()), "ids must be int64"),
        (lambda t: t.update(mean=t["mean"].bfloat16()), "plain numbers"),
        (lambda t: t["mean"].fill_(float("nan")), "NaN"),
        (lambda t: t.update(version=torch.zeros(0, dtype=torch.int64)), "one finite number"),
        (lambda t: t.update(conditioning=torch.zeros(4, 9)), "must be|has 9 numbers"),
        (lambda t: t.update(extra=torch.zeros(1)), "holds extra"),
    ],
)
def test_refuses_bad_snapshot(
    saved: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit_tensors(saved, "snapshot.safetensors", edit)
    with pytest.raises(BundleError, match=message):
        Bundle.load(saved, None)


def test_refuses_bad_token_weights(saved: Path) -> None:
    edit_tensors(saved, "token_weights.safetensors", lambda t: t["weights"].mul_(-1))
    with pytest.raises(BundleError, match="not negative"):
        Bundle.load(saved, None)


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"\xff" * 64])
@pytest.mark.parametrize("name", ["bases.safetensors", "snapshot.safetensors"])
def test_reads_no_pickle(saved: Path, name: str, data: bytes) -> None:
    rewrite(saved, name, data)
    with pytest.raises(BundleError, match="not a safetensors file"):
        Bundle.load(saved, None)


def test_refuses_parts_that_do_not_fit(make_bundle: MakeBundle) -> None:
    with pytest.raises(BundleError, match="bases lacks"):
        make_bundle("full", bases=make_bundle("head").bases)
    with pytest.raises(BundleError, match=r"embedding\.dim"):
        make_bundle(embedding=EmbeddingInfo(dim=5))
    with pytest.raises(BundleError, match="token_weights"):
        make_bundle(token_weights=np.ones(4))
    bases = make_bundle().bases
    with pytest.raises(BundleError, match="beyond float16"):
        make_bundle(bases=SharedBases(bases.u, bases.v, bases.s0 + 1e6, bases.shift))


def test_a_full_depth_bundle_of_smollm2_fits_in_25_mb(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    sizes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    sites = [Site(f"{layer}.{i}", *pair) for layer in range(30) for i, pair in enumerate(sizes)]
    spec = UpdateSpec("full", 16, 576, (*sites, Site(HEAD, 576, 576)))
    make_bundle(
        hypernetwork=CoreConfig().build(spec, 12),
        bases=init_bases(spec, seed=0),
        token_weights=np.ones(49152, np.float32),
    ).save(tmp_path / "bundle")
    assert sum(file.stat().st_size for file in (tmp_path / "bundle").iterdir()) < 25e6
