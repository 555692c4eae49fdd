"""Figures as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_VARIANTS = (
    "base", "static", "budget_static", "hyper", "shuffled",
    "refined_common", "refined", "refined_shuffled",
)  # fmt: skip
_GAINS = ("over_base", "net", "conditioning", "refined_net", "refined_conditioning")


def table(report: dict[str, Any]) -> str:
    """One line a domain, and the unweighted mean where there are several."""
    domains = report["domains"]
    rows = dict(domains) | ({"**mean**": report["mean"]} if len(domains) > 1 else {})
    some = next(iter(domains.values()))
    variants = [name for name in _VARIANTS if name in some["nats_per_token"]]
    gains = [name for name in _GAINS if name in some["gains"]]
    lines = [
        ["domain", "documents", *variants, *(gain.replace("_", " ") for gain in gains)],
        *(
            [
                name,
                str(figures["documents"]),
                *(f"{figures['nats_per_token'][v]:.4f}" for v in variants),
                *(interval(figures["gains"][gain]) for gain in gains),
            ]
            for name, figures in rows.items()
        ),
    ]
    return markdown(lines)


def variants_table(report: dict[str, Any], describe: dict[str, str]) -> str:
    """One line a variant: mean loss, bits per byte, gain over static."""
    mean = report["mean"]
    lines = [["variant", "nats/token", "bits/byte", "gain over static", "what"]]
    for name, nats in mean["nats_per_token"].items():
        gain = interval(mean["over_static"][name]) if name != "static" else ""
        bits = f"{mean['bits_per_byte'][name]:.4f}"
        lines.append([name, f"{nats:.4f}", bits, gain, describe.get(name, "")])
    return markdown(lines)


def part_table(report: dict[str, Any], describe: dict[str, str]) -> str:
    """The same on the documents that the expensive variants were measured on."""
    lines = [["variant", "nats/token", "gain over static there", "what"]]
    part, whole = report["part"]["nats_per_token"], report["mean"]["nats_per_token"]
    for name, nats in part.items():
        gain = part["static"] - nats
        shown = (
            interval(report["mean"]["over_static"][name]) if name not in whole else f"{gain:+.4f}"
        )
        lines.append(
            [name, f"{nats:.4f}", "" if name == "static" else shown, describe.get(name, "")]
        )
    return markdown(lines)


def gains_table(report: dict[str, Any]) -> str:
    """Gain over static of every variant in every domain, without intervals."""
    names = list(report["mean"]["over_static"])
    rows = dict(report["domains"]) | {"**mean**": report["mean"]}
    return markdown(
        [
            ["domain", *names],
            *(
                [domain, *(f"{figures['over_static'][name][0]:+.4f}" for name in names)]
                for domain, figures in rows.items()
            ),
        ]
    )


def interval(values: Sequence[float]) -> str:
    """`+estimate [+low, +high]`."""
    estimate, low, high = values
    return f"{estimate:+.4f} [{low:+.4f}, {high:+.4f}]"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head."""
    head, *rows = lines
    rule = ["---"] * len(head)
    return "\n".join(
        "|" + "|".join(f" {c} " if c != "---" else c for c in row) + "|"
        for row in (head, rule, *rows)
    )
