"""Greedy answers under exported adapters, in vLLM and in PEFT, beside those of our engine.

    python tests/bench/export_vllm.py --out runs/export_vllm      # needs vLLM, takes minutes

Each cluster of the shipped bundle is exported in the form `plain`, which vLLM loads, and answers
the beginnings of the documents of tests/serve. Beside it: our engine under the update itself, and
under the update without the shift of its head, which is all that `plain` leaves out. Where an
answer parts from that, PEFT says how close the two tokens were. Writes export_vllm.json to `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from adapter_gen.bundle import Bundle
from adapter_gen.export import export_peft
from adapter_gen.generator import AdapterGenerator
from adapter_gen.update import LoraDelta, SharedBases
from cluster_router.wire.types import Assignment, SamplingParams, TokenizedRequest
from deploy.config import SHIPPED
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.models import (
    DEFAULT_MODEL,
    load_causal_lm,
    load_lm_head,
    load_tokenizer,
    resolve_model,
)
from lm_workers.vllm.build import ENVIRONMENT

TEXTS = sorted((Path(__file__).parents[1] / "serve" / "documents").glob("*.txt"))
Tokens = tuple[int, ...]
Answers = dict[int, list[Tokens]]
"""By cluster, one for each prompt."""


@dataclass(frozen=True)
class Comparison:
    """Answers beside those of a reference.

    Attributes:
        answers: how many.
        equal: how many of them are equal to the last token.
        tokens: share of tokens up to and without the first that differs.
        largest_gap: of the answers that differ, the largest log-probability, in nats, by which PEFT
            prefers the reference's first other token; None where there are none, or nobody asked.
    """

    answers: int
    equal: int
    tokens: float
    largest_gap: float | None = None


def ours(
    path: Path, bundle: Bundle, bases: SharedBases, deltas: Sequence[LoraDelta], asked: Any
) -> Answers:
    """The built-in engine's answers in float32, all clusters in one batch."""
    config = EngineConfig(dtype="float32", max_context=512, max_sequences=16)
    engine = build_engine(path, config, (bundle.spec, bases))
    sampling = SamplingParams(temperature=0, max_tokens=asked.output, ignore_eos=True)
    waiting = [(row, number) for row in range(len(deltas)) for number in range(len(asked.prompts))]
    found: dict[str, list[int]] = {f"{row}-{number}": [] for row, number in waiting}
    while waiting or engine.has_work:
        while waiting and engine.num_running + engine.num_waiting < config.max_sequences:
            row, number = waiting.pop(0)
            assigned = Assignment(key=deltas[row].key)
            request = TokenizedRequest(f"{row}-{number}", asked.prompts[number], sampling, assigned)
            engine.add(request, deltas[row])
        for chunk in engine.step():
            found[chunk.request_id] += chunk.tokens
    numbers = range(len(asked.prompts))
    return {row: [tuple(found[f"{row}-{n}"]) for n in numbers] for row in range(len(deltas))}


def in_vllm(path: Path, folders: Sequence[Path], rank: int, asked: Any) -> Answers:
    """Answers of a vLLM of its own that has loaded the exports."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm
    from vllm.lora.request import LoRARequest

    llm = vllm.LLM(
        str(path),
        skip_tokenizer_init=True,
        dtype=asked.dtype,
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=rank,
        max_loras=1,
        max_model_len=512,
        max_num_seqs=16,
    )
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=asked.output, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in asked.prompts]
    found = {}
    for row, folder in enumerate(folders):
        lora = LoRARequest(folder.name, row + 1, str(folder))
        answers = llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
        found[row] = [tuple(one.outputs[0].token_ids) for one in answers]
    return found


class Peft:
    """The exports in PEFT, on transformers, in float32."""

    def __init__(self, path: Path, folders: Sequence[Path]) -> None:
        base = load_causal_lm(path, torch.float32, "cpu")
        self._model = PeftModel.from_pretrained(base, folders[0], adapter_name="0").eval()
        for row, folder in enumerate(folders[1:], 1):
            self._model.load_adapter(folder, adapter_name=str(row))

    @torch.inference_mode()
    def answers(self, rows: Sequence[int], asked: Any) -> Answers:
        """Greedy, every prompt of a cluster in one batch; prompts have one length."""
        found = {}
        for row in rows:
            self._model.set_adapter(str(row))
            ids = torch.tensor(asked.prompts)
            whole = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=asked.output,
                min_new_tokens=asked.output,
                pad_token_id=0,
            )
            found[row] = [tuple(one) for one in whole[:, ids.shape[1] :].tolist()]
        return found

    @torch.inference_mode()
    def gap(self, row: int, text: Tokens, preferred: int, other: int) -> float:
        """Log-probability of one next token after `text` less that of another."""
        self._model.set_adapter(str(row))
        scores = self._model(torch.tensor([text])).logits[0, -1].log_softmax(-1)
        return float(scores[preferred] - scores[other])


def compare(found: Answers, reference: Answers, prompts: Any, peft: Peft | None) -> Comparison:
    """How far answers agree with a reference; PEFT is asked only where that is given."""
    agreed, gaps, equal, total = 0, [], 0, 0
    for row, answers in found.items():
        for prompt, answer, expected in zip(prompts, answers, reference[row], strict=True):
            parted = next(
                (
                    at
                    for at, pair in enumerate(zip(answer, expected, strict=True))
                    if len({*pair}) > 1
                ),
                len(expected),
            )
            agreed, total, equal = (
                agreed + parted,
                total + len(expected),
                equal + (answer == expected),
            )
            if answer != expected and peft is not None:
                text = (*prompt, *expected[:parted])
                gaps.append(peft.gap(row, text, expected[parted], answer[parted]))
    count = sum(map(len, found.values()))
    return Comparison(count, equal, agreed / total, max(gaps, default=None))


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Every comparison, by what is compared."""
    path, bundle = resolve_model(DEFAULT_MODEL), Bundle.load(SHIPPED / DEFAULT_MODEL, None)
    tokenizer = load_tokenizer(path)
    texts = [tuple(tokenizer(file.read_text(encoding="utf-8")).input_ids) for file in TEXTS]
    asked.prompts = [one[: asked.input] for one in texts if len(one) >= asked.input]
    generator, snapshot = AdapterGenerator(bundle), bundle.snapshot
    deltas = [
        generator.generate(bundle.key(snapshot, row), snapshot.conditioning_of(row))
        for row in range(0, len(snapshot), asked.every)
    ]
    whole = ours(path, bundle, bundle.bases, deltas, asked)
    bare = replace(bundle.bases, shift=torch.zeros_like(bundle.bases.shift))
    shiftless = [replace(one, shift=np.zeros_like(one.shift)) for one in deltas]
    without = ours(path, bundle, bare, shiftless, asked)
    with tempfile.TemporaryDirectory() as root:
        folders = []
        for row, delta in enumerate(deltas):
            folders.append(Path(root) / f"cluster-{row}")
            folders[-1].mkdir()
            files = export_peft(
                delta, bundle.spec, bundle.bases, str(path), load_lm_head(path), form="plain"
            )
            for name, data in files.items():
                (folders[-1] / name).write_bytes(data)
        vllm = in_vllm(path, folders, bundle.spec.rank, asked)
        peft = Peft(path, folders)
        in_peft = peft.answers(sorted(vllm), asked)
        found = {
            "vLLM beside the update without its shift": compare(vllm, without, asked.prompts, peft),
            "PEFT beside the update without its shift": compare(
                in_peft, without, asked.prompts, peft
            ),
            "vLLM beside the whole update": compare(vllm, whole, asked.prompts, None),
        }
    for name, one in found.items():
        print(f"{name}: {one}", flush=True)
    return {"dtype": asked.dtype, **{name: asdict(one) for name, one in found.items()}}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", default="float32", help="of vLLM; the others are in float32")
    parser.add_argument("--every", type=int, default=1, help="take every n-th cluster")
    parser.add_argument("--input", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--out", type=Path, default=Path("runs/export_vllm"))
    return parser.parse_args()


def main() -> None:
    """Run, print and write the report."""
    asked = arguments()
    asked.out.mkdir(parents=True, exist_ok=True)
    found = measure(asked)
    (asked.out / "export_vllm.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
