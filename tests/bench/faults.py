"""kill -9 of each kind of process in turn, under load: what callers lose, and for how long.

    python tests/bench/faults.py --out runs/faults

The default model with two LM replicas and two routers. `--parts` names some of the parts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

from reliability.report import table
from reliability.service import APP, Settings, body, running
from reliability.strike import PARTS, strike

EVERYTHING = "everything"


async def strike_all(url: str, parts: list[str], callers: int, tokens: int) -> list[dict[str, Any]]:
    numbers = itertools.count()
    rows = []
    for part in parts:
        struck = list(PARTS) if part == EVERYTHING else [part]
        found = await strike(
            APP, url, struck, lambda: body(next(numbers), tokens), callers, within_s=180
        )
        rows.append(found.row())
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, EVERYTHING], default=[*PARTS])
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    args = parser.parse_args()
    with running(Settings(lm_replicas=2, routers=2)) as url:
        rows = asyncio.run(strike_all(url, args.parts, args.callers, args.tokens))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(json.dumps(rows, indent=1))
    (args.out / "report.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
