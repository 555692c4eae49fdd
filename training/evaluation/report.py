"""The report of an evaluation in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from training.evaluation.figures import SMALLEST_GAP
from training.evaluation.tables import (
    gains_table,
    interval,
    markdown,
    part_table,
    table,
    variants_table,
)

_TITLES = {
    "seen": "Seen domains, unseen documents",
    "unseen": "Unseen domains, never trained on",
    "held_out": "Of these, the domains held out of training on purpose",
    "wikitext": "WikiText-2, not trained on",
    "twin": "Unseen domains of a twin bundle: same recipe and seed, these domains held out",
}
_SHARES = {
    "lost_when_shuffled": "of the gain over static is lost when clusters are shuffled",
    "oracle_gap_closed": "of the gap from static to the oracle is closed",
    "in_context_recovered": "of the gain of earlier contexts in the prompt is had without them",
}

_HEAD = """\
# Evaluation of `{bundle}`

Base model `{base_model}`; bundle {id}, depth `{depth}`, rank {rank}. Next-token loss on the {split}
split (of unseen domains whose test split is short, on others too): in each document at most
{context} tokens are context (half of a shorter document), the next {scored} are scored. Only the
context of a document, and contexts that arrived before it, decide what it is scored under. Gains
are in nats per token and positive where something is won. Intervals are 95 %, paired bootstrap,
{resamples:,} resamples{interval}. Measured on {measured}.

Primary endpoint, fixed before the run: {primary}.
"""

_STREAM = """\
## The stream

Groups that arrive as a stream: {groups}. Documents of all their domains are interleaved at random
(seed {seed}). Contexts of {warmup} further documents of each domain arrive {when}, from splits of
which nothing is scored as far as those go; nothing of them is scored, and no document's scored part
is ever learned from.
Clusters begin with {start} and are published every {publish} arrivals. What all have in common is
learned anew when {common} contexts are new (as many as had been learned from, if that is more, up
to {common_buffer}), from the latest {common_buffer}; `refined_common` is that alone. A cluster is
refined from there when {refine} of its contexts are new (likewise), on its latest {buffer}. A
document is scored under what its cluster had been refined to before it arrived, and joins the
cluster only then; so `refined` is the control "others only", and `refined_own` its counterpart "own
prompt only". Static is the update of a document that resembles no cluster.
"""


def report(evaluation: dict[str, Any], plots: Sequence[str], note: str | None) -> str:
    """Everything that was measured.

    Args:
        evaluation: the figures.
        plots: files in the folder `plots`.
        note: why there are none, where there are none.
    """
    return "\n".join(_parts(evaluation, plots, note)).rstrip() + "\n"


def _parts(evaluation: dict[str, Any], plots: Sequence[str], note: str | None) -> Iterator[str]:
    protocol = evaluation["protocol"]
    yield _HEAD.format(
        bundle=protocol["base_model"],
        base_model=protocol["base_model"],
        id=protocol["bundle"],
        depth=protocol["depth"],
        rank=protocol["rank"],
        split=protocol["split"],
        context=protocol["context_tokens"],
        scored=protocol["scored_tokens"],
        resamples=protocol["resamples"],
        interval=": " + protocol["interval"].removeprefix("95 %, "),
        measured=machine(protocol),
        primary=_primary(evaluation),
    )
    yield from _stream(protocol)
    for name, title in _TITLES.items():
        if name in evaluation:
            yield f"## {title}\n"
            yield from _group(evaluation[name], protocol["variants"])
            yield from (f"![{p}](plots/{p})\n" for p in plots if p.startswith(f"{name}-"))
    if note:
        yield f"No plots: {note}\n"
    if protocol["left_out"]:
        yield "## Left out\n"
        yield from (f"- `{name}`: {why}" for name, why in protocol["left_out"].items())


def machine(protocol: dict[str, Any]) -> str:
    """Where and when it was measured."""
    return "{device} ({dtype}, torch {torch}), {date}".format(**protocol["measured"])


def _primary(evaluation: dict[str, Any]) -> str:
    group, gain = evaluation["protocol"]["primary"]
    text = f"gain `{gain}` on {group} domains"
    if group not in evaluation or gain not in evaluation[group]["mean"]["gains"]:
        return f"{text} (not measured in this run)"
    mean = evaluation[group]["mean"]
    static = mean["nats_per_token"]["static"]
    found = mean["gains"][gain]
    return f"{text}: **{interval(found)}**, {found[0] / static:+.2%} of the static loss"


def _stream(protocol: dict[str, Any]) -> Iterator[str]:
    settings = protocol["settings"]
    stream = settings["stream"]
    if stream["groups"]:
        yield _STREAM.format(
            groups=", ".join(stream["groups"]),
            seed=settings["seed"],
            warmup=stream["warmup_documents"],
            when="before all others" if stream["warmup"] == "first" else "in between",
            start="the bundle's" if stream["start"] == "bundle" else "none",
            publish=stream["publish_every"],
            common=stream["common"]["every"],
            common_buffer=stream["common"]["buffer"],
            refine=stream["refine_every"],
            buffer=stream["buffer"],
        )


def _group(figures: dict[str, Any], variants: dict[str, str]) -> Iterator[str]:
    yield table(figures) + "\n"
    yield "Every variant, unweighted mean over domains:\n"
    yield variants_table(figures, variants) + "\n"
    yield from _shares(figures.get("shares", {}))
    if "part" in figures:
        count = figures["part"]["documents"]
        yield f"On the {count} documents that the expensive variants were measured on:\n"
        yield part_table(figures, variants) + "\n"
    if len(figures["domains"]) > 1:
        yield "Gain over static by domain:\n"
        yield gains_table(figures) + "\n"
    arrived = figures.get("curves", {}).get("arrived")
    if arrived:
        yield "Gain of `refined` by earlier contexts of the cluster, documents pooled:\n"
        yield _arrived(arrived) + "\n"


def _shares(shares: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    lines = [
        f"- `{name}`: {found[0]:.0%} [{found[1]:.0%}, {found[2]:.0%}] {_SHARES[share]}"
        for share, values in shares.items()
        for name, found in values.items()
    ]
    missing = [text for share, text in _SHARES.items() if share not in shares]
    yield from lines
    if missing:
        yield (
            f"- Shares of a gain or gap below {SMALLEST_GAP} nats per token (of no gain, for "
            "shuffling), or of one not measured, are left out."
        )
    yield ""


def _arrived(curve: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{point['from']} and more"
            if point["to"] is None
            else f"{point['from']}-{point['to']}",
            str(point["documents"]),
            interval(point["gain"]),
        ]
        for point in curve
    ]
    return markdown([["earlier contexts", "documents", "gain over static"], *rows])
