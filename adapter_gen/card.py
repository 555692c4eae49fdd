"""The model card of a bundle."""

from __future__ import annotations

import json
from typing import Any

from adapter_gen.storage import Manifest

_CARD = """\
---
base_model: {base_model}
library_name: chameleon-llm
tags: [chameleon-llm, hypernetwork, lora]
---

# ChameleonLLM bundle for {base_model}

A hypernetwork that turns the statistics of a cluster of requests into a low-rank update of the
frozen base model. It holds no weights of the base model.

| | |
|---|---|
| base model | `{base_model}` |
| fingerprint | `{fingerprint}` |
| depth, rank | {depth}, {rank} |
| adapted sites | {sites} |
| numbers per cluster | {numbers:,} |
| clusters in the snapshot | {clusters} |
| hypernetwork | `{hypernetwork}` |
| made by | {created_by}, seed {seed} |

The files are safetensors and JSON; loading them runs no code, and checks every checksum in
`bundle.json` and that the base model is the one named above.

## Evaluation

{evaluation}
"""


def model_card(manifest: Manifest, clusters: int, evaluation: dict[str, Any] | None) -> str:
    """Markdown with a front matter that model hubs read."""
    spec = manifest.spec
    if evaluation is None:
        found = "This bundle was saved without an evaluation."
    else:
        values = json.dumps(evaluation, indent=2)
        found = f"As the evaluation run reported it:\n\n```json\n{values}\n```"
    return _CARD.format(
        base_model=manifest.base_model,
        fingerprint=manifest.fingerprint,
        depth=spec.depth,
        rank=spec.rank,
        sites=len(spec.sites),
        numbers=spec.numbers_per_cluster,
        clusters=clusters,
        hypernetwork=manifest.hypernetwork.model_dump_json(),
        created_by=manifest.created_by or "not stated",
        seed=manifest.seed,
        evaluation=found,
    )
