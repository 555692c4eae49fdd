"""PEFT's mixed batches: transformers' `generate` with one adapter name for each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
from serving_bench.engines.transformers import TransformersEngine
from serving_bench.workload import Request


class PeftEngine(TransformersEngine):
    """All adapters resident, chosen by `adapter_names`."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.version = f"peft {peft.__version__}"
        first, *rest = sorted(Path(job["adapters"]).iterdir())
        self.model = peft.PeftModel.from_pretrained(self.model, str(first), adapter_name=first.name)
        for folder in rest:
            self.model.load_adapter(str(folder), adapter_name=folder.name)
        self.model.eval()

    def generate_options(self, batch: Sequence[Request]) -> dict[str, Any]:
        """See TransformersEngine."""
        return {"adapter_names": [f"{one.cluster:04}" for one in batch]}


start = PeftEngine
