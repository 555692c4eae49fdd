"""`chameleon seeds`: what several seeds of one recipe gain on the same documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster_router.wire.errors import ConfigError
from training.statistics import RESAMPLES, Array, Bootstrap, Interval

_BASELINE = "static"
_CONTROLS = {"hyper": "shuffled", "refined": "refined_shuffled"}
"""Variants and the same under another cluster: the difference is what conditioning is worth."""
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
    lines = [
        f"| group | variant | {heads} | mean | of the loss |",
        "|---" * (len(folders) + 4) + "|",
    ]
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
    """The static loss, then what each variant gains: in each seed, and in their mean."""
    first = runs[0]
    bootstrap = Bootstrap(
        [one["domain"] for one in first], [one["scored_tokens"] for one in first], RESAMPLES, 0
    )

    def estimates(nats: Sequence[Array]) -> list[float]:
        return [bootstrap.hierarchical(one).estimate for one in (*nats, np.mean(nats, axis=0))]

    everywhere = {
        name: [np.array([one["nats"][name] for one in run]) for run in runs]
        for name in first[0]["nats"]
        if all(name in one["nats"] for run in runs for one in run)
    }
    static = everywhere[_BASELINE]
    losses = estimates(static)
    yield " | ".join([f"{_BASELINE}, its loss", *(f"{loss:.4f}" for loss in losses), ""])

    def line(name: str, worse: Sequence[Array], better: Sequence[Array]) -> str:
        gains = [one - other for one, other in zip(worse, better, strict=True)]
        *each, mean = estimates(gains)
        interval = bootstrap.hierarchical(np.mean(gains, axis=0))
        return " | ".join(
            [name, *(f"{gain:+.4f}" for gain in each), _text(interval), f"{mean / losses[-1]:+.2%}"]
        )

    for name, nats in everywhere.items():
        if name != _BASELINE:
            yield line(name, static, nats)
    for name, control in _CONTROLS.items():
        if name in everywhere and control in everywhere:
            yield line(f"{name} over {control}", everywhere[control], everywhere[name])


def _text(interval: Interval) -> str:
    return f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
