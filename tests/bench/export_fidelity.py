"""What an export to PEFT loses, for every cluster of a bundle, on given text.

    python tests/bench/export_fidelity.py --out runs/export_fidelity

Each cluster is exported in every form that it has, loaded by PEFT and compared with the
update itself: the loss of the text under both, and the largest difference of a logit. The text is
the documents of tests/serve unless `--text` names others. Writes export_fidelity.json to `--out`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapter_gen.bundle import Bundle
from adapter_gen.export import EXPORT_FORMS, export_peft
from adapter_gen.fidelity import measure_export
from adapter_gen.generator import AdapterGenerator
from deploy.config import SHIPPED
from lm_workers.models import DEFAULT_MODEL, load_causal_lm, load_tokenizer, resolve_model

TEXTS = sorted((Path(__file__).parents[1] / "serve" / "documents").glob("*.txt"))


def read_tokens(files: Sequence[Path], model: Path, length: int) -> torch.Tensor:
    """The first `length` tokens [B, length] of each file that has as many."""
    tokenizer = load_tokenizer(model)
    ids = [tokenizer(file.read_text(encoding="utf-8")).input_ids for file in files]
    return torch.tensor([row[:length] for row in ids if len(row) >= length])


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both exports of each cluster."""
    path = resolve_model(args.model)
    bundle = Bundle.load(args.bundle, None)
    model = load_causal_lm(path, torch.float32, "cpu")
    tokens = read_tokens(args.text, path, args.tokens)
    generator, snapshot = AdapterGenerator(bundle), bundle.snapshot
    weight = model.get_output_embeddings().weight
    rows = []
    for row in range(0, len(snapshot), args.every):
        key = bundle.key(snapshot, row)
        delta = generator.generate(key, snapshot.conditioning_of(row))
        found: dict[str, Any] = {"cluster": key.cluster}
        for form in EXPORT_FORMS:
            if form == "linears" and bundle.spec.depth != "full":
                continue
            files = export_peft(delta, bundle.spec, bundle.bases, args.model, weight, form=form)
            one = measure_export(files, delta, bundle.spec, bundle.bases, model, tokens)
            found[form] = asdict(one)
        rows.append(found)
        print(f"cluster {key.cluster}: {summary([found])}", flush=True)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Means over clusters, largest logit differences over all."""

    def mean(form: str, name: str) -> float:
        return float(np.mean([row[form][name] for row in rows]))

    def exported(form: str) -> str:
        largest = max(row[form]["largest_logit"] for row in rows)
        return f"{mean(form, 'export_loss'):.4f} exported {form} (logits within {largest:.2g})"

    forms = [form for form in EXPORT_FORMS if form in rows[0]]
    return (
        f"loss {mean('whole', 'base_loss'):.4f} base, {mean('whole', 'update_loss'):.4f} updated, "
        + ", ".join(exported(form) for form in forms)
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=SHIPPED / DEFAULT_MODEL)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS)
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    parser.add_argument("--every", type=int, default=1, help="take every n-th cluster")
    parser.add_argument("--out", type=Path, default=Path("runs/export_fidelity"))
    return parser.parse_args()


def main() -> None:
    """Run, print and write the report."""
    args = arguments()
    rows = measure(args)
    print(f"all: {summary(rows)}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "export_fidelity.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
