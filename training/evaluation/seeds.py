"""`chameleon seeds`: what several seeds of one recipe gain on the same documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster_router.wire.errors import ConfigError
from training.statistics import RESAMPLES, Bootstrap, Interval

_BASELINE = "static"
_Document = dict[str, Any]
_SAME = ("group", "domain", "scored_tokens", "scored_bytes")


def compare(folders: Sequence[Path]) -> str:
    """The table, in Markdown.

    Raises:
        ConfigError: a folder holds no evaluation, or they did not score the same documents.
    """
    runs = [_documents(folder) for folder in folders]
    told = [[tuple(one[name] for name in _SAME) for one in run] for run in runs]
    for folder, found in zip(folders, told, strict=True):
        if found != told[0]:
            raise ConfigError(
                f"{folder} and {folders[0]} did not score the same documents; evaluate both with "
                "the same data, settings and --seed"
            )
    heads = " | ".join(folder.name for folder in folders)
    lines = [f"| group | variant | {heads} | mean |", "|---" * (len(folders) + 3) + "|"]
    for group in dict.fromkeys(one["group"] for one in runs[0]):
        chosen = [[one for one in run if one["group"] == group] for run in runs]
        lines += [f"| {group} | {line} |" for line in _lines(chosen)]
    return "\n".join(lines)


def _documents(folder: Path) -> list[_Document]:
    try:
        lines = (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no evaluation: {error}") from None


def _lines(runs: Sequence[list[_Document]]) -> Iterator[str]:
    """One a variant: its gain of each seed, and the mean."""
    first = runs[0]
    bootstrap = Bootstrap(
        [one["domain"] for one in first], [one["scored_tokens"] for one in first], RESAMPLES, 0
    )
    for variant in first[0]["nats"]:
        everywhere = all(variant in one["nats"] for run in runs for one in run)
        if variant == _BASELINE or not everywhere:
            continue
        gains = [
            np.array([one["nats"][_BASELINE] - one["nats"][variant] for one in run]) for run in runs
        ]
        each = [f"{bootstrap.hierarchical(gain).estimate:+.4f}" for gain in gains]
        yield " | ".join([variant, *each, _text(bootstrap.hierarchical(np.mean(gains, axis=0)))])


def _text(interval: Interval) -> str:
    return f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
