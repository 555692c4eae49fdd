"""What a layout of the weights costs in quality: the loss of real text, unadapted and adapted.

    python tests/bench/layout_loss.py --out runs/layout_loss      # five minutes on two cores

Each engine reads the same texts and tells the log-probability of every token after the first:
validation documents of the data folder (`CHAMELEON_DATA`, or ../shared/data beside the repository),
or the files that `--text` names, of each its first `--tokens` tokens. Adapted, each text runs under
the update of its own cluster in the shipped bundle. Prints how much larger the mean loss is than
the first layout's, with the standard error of that over texts, and writes all losses, with the
machine and the date, to layout_loss.json in `--out`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from serving_bench.machine import describe_machine
from serving_bench.texts import data_folder, documents

from adapter_gen.bundle import Bundle
from adapter_gen.generator import AdapterGenerator
from adapter_gen.update import LoraDelta
from cluster_router.clusters import Assigner
from cluster_router.embedding import TokenEmbedder
from cluster_router.index import FaissIndex
from cluster_router.wire.types import Assignment, SamplingParams, TokenChunk, TokenizedRequest
from deploy.config import SHIPPED
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.device import usable_cores
from lm_workers.engine import SteppedEngine
from lm_workers.models import (
    DEFAULT_MODEL,
    describe_model,
    load_embedding,
    load_tokenizer,
    resolve_model,
)

Prompt = tuple[int, ...]
SCORE = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=0)


def domains(folder: Path, of_each: int) -> list[str]:
    """The first documents of each domain's validation split."""
    files = sorted(folder.glob("*.validation.jsonl.gz"))
    return [text for file in files for text in documents(file, of_each)]


def updates(bundle: Bundle, path: Path, prompts: Sequence[Prompt]) -> list[LoraDelta | None]:
    """What the service would run each prompt under."""
    embedder = TokenEmbedder(load_embedding(path), bundle.token_weights)
    seen = None if bundle.embedding is None else bundle.embedding.tokens
    base = describe_model(path, DEFAULT_MODEL).fingerprint
    assigner = Assigner(bundle.snapshot, FaissIndex, base, bundle.hypernetwork_id)
    generator, found = AdapterGenerator(bundle), list[LoraDelta | None]()
    for prompt in prompts:
        assigned = assigner.assign(embedder.embed(prompt[:seen]))
        assert assigned.key is not None
        found.append(generator.generate(assigned.key, assigned.conditioning))
    return found


def losses(
    engine: SteppedEngine, prompts: Sequence[Prompt], deltas: Sequence[LoraDelta | None]
) -> list[float]:
    """Mean loss in nats of each prompt's tokens but the first, each read alone."""
    found = []
    for number, (prompt, delta) in enumerate(zip(prompts, deltas, strict=True)):
        assigned = Assignment(None if delta is None else delta.key)
        engine.add(TokenizedRequest(str(number), prompt, SCORE, assigned), delta)
        scored: list[float] = []
        while engine.has_work:
            for outcome in engine.step():
                assert isinstance(outcome, TokenChunk), outcome
                entries = outcome.prompt_logprobs or ()
                scored += [one.logprob for one in entries if one.logprob is not None]
        assert len(scored) == len(prompt) - 1
        found.append(-float(np.mean(scored)))
    return found


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """By layout, and by whether adapted, each text's loss."""
    path, bundle = resolve_model(DEFAULT_MODEL), Bundle.load(SHIPPED / DEFAULT_MODEL, None)
    tokenizer = load_tokenizer(path)
    texts = [file.read_text(encoding="utf-8") for file in args.text]
    texts = texts or domains(args.data, args.of_each)
    if not texts:
        raise SystemExit(f"{args.data} holds no validation documents; name files with --text")
    prompts = [tuple(tokenizer(text).input_ids[: args.tokens]) for text in texts]
    runs = {"off": [None] * len(prompts), "on": updates(bundle, path, prompts)}
    rows: dict[str, dict[str, list[float]]] = {}
    for layout in args.linear:
        config = EngineConfig(device="cpu", dtype=args.dtype, linear=layout, prefix_cache=False)
        engine = build_engine(path, config, (bundle.spec, bundle.bases))
        rows[layout] = {name: losses(engine, prompts, deltas) for name, deltas in runs.items()}
        print(summary(rows, layout), flush=True)
    return rows


def summary(rows: dict[str, dict[str, list[float]]], layout: str) -> str:
    """One layout beside the first."""
    first, told = next(iter(rows.values())), []
    for name, found in rows[layout].items():
        more = np.subtract(found, first[name])
        error = more.std(ddof=1) / len(more) ** 0.5 if len(more) > 1 else float("nan")
        told.append(
            f"{name} {np.mean(found):.4f} nats a token, {more.mean():+.4f} ({error:.4f})"
            f" [{more.min():+.3f} to {more.max():+.3f}]"
        )
    return f"{layout}, {len(found)} texts: " + "; ".join(told)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--linear", nargs="+", default=["auto", "int8"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--text", nargs="*", type=Path, default=[])
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--of-each", type=int, default=8, help="documents of each domain")
    parser.add_argument("--tokens", type=int, default=512, help="most of a text")
    parser.add_argument("--out", type=Path, default=Path("runs/layout_loss"))
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    args = arguments()
    machine = describe_machine("cpu", usable_cores())
    rows = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "losses": rows,
    }
    (args.out / "layout_loss.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
