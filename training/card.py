"""The model card of a trained bundle. Every figure in it is read from evaluation.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adapter_gen.bundle import Bundle
from training.config import TrainSettings
from training.evaluation.report import machine
from training.evaluation.tables import table

EVALUATE_SETTINGS = "training/evaluate.yaml"
"""File of a bundle: the settings that it was measured with."""

_CARD = """\
---
base_model: {base_model}
library_name: chameleon-llm
tags: [chameleon-llm, hypernetwork, lora]
---

# ChameleonLLM bundle for {base_model}

A hypernetwork that turns the statistics of a cluster of requests into a low-rank update of
{where} of the frozen base model (depth `{depth}`, rank {rank}). It holds no weights of the base
model. {numbers:,} numbers are generated for a cluster; the bundle starts with {clusters}
clusters.

| | |
|---|---|
| base model | `{base_model}`, fingerprint `{fingerprint}` |
| trained on | {train_documents:,} documents, {train_tokens:,} scored tokens |
| made by | `{created_by}`, seed {seed} |
| settings | `training/settings.json` in this folder |

## Figures

{figures}

## Data

Trained on the first tokens of documents of these domains:

{data}

Left out of training by the settings (`data.exclude`): {excluded}.

{recipe}

To make it again (seed {seed}):

```
python -m training train --config training/configs/{depth}.yaml --data <folder> --out <bundle> \\
    --licences training/configs/licences.yaml
python -m training evaluate --bundle <bundle> --data <folder> --record{evaluate}
```

{limits}
- One seed; the intervals cover the choice of test documents, not of training runs.
{notes}"""

_RECIPE = {
    "head": """\
## Recipe

1. Final hidden states of the frozen model are computed once. In each document the first
   {context} tokens (at most half of it) are context, the next {scored} are scored.
2. Contexts are embedded as the mean of their token embeddings, weighted by inverse document
   frequency, and clustered by spherical k-means. A cluster's condition is its centroid.
3. A static update (U, S0, V and a shift) is trained by cross-entropy and stopped early on
   validation documents (step {static_step} was best): the baseline `static` above.
4. The hypernetwork's shift is fitted on top in closed form, to the second-order loss of the
   clusters of many random clusterings, and kept at the scale that validated best ({scale}).
5. The whole hypernetwork is then trained by gradient descent on the same clusterings, stopped early
   too (step {hyper_step} was best). At step 0 the generated cores are zero: only the shift of the
   final hidden state differs between clusters.
""",
    "full": """\
## Recipe

1. Contexts (the first {context} tokens of a document, at most half of it) are embedded as the mean
   of their token embeddings, weighted by inverse document frequency, and clustered by spherical
   k-means. A cluster's condition is its centroid.
2. A static update (U and V of every linear, and a shift) is trained by cross-entropy on documents
   of all domains and stopped early on validation documents (step {static_step} was best): the
   baseline `static` above. Some documents that are questions with answers are in the chat format.
3. For each cluster the cores between U and V are refined by a few steps of Adam on the cluster's
   own training documents; a part of them is held back and decides how far to go ({moved}).
4. The hypernetwork remembers these cores by centroid and blends those of similar clusters, at the
   strength and sharpness that validated best ({scale} and {sharpness}).
""",
}

_LIMITS = {
    "head": """\
## Limits

- The update reaches the final hidden state only: it shifts which words are likely, it adds no
  knowledge and no skill.
- Figures are losses on short English text and code, not the quality of chat answers. No text in the
  chat format was trained on: a small check found answers in it slightly less likely under the
  static update than under the base model (`training/LOG.md` in the repository).
- A prompt much shorter than {context} tokens often resembles no cluster and then gets the static
  update.
""",
    "full": """\
## Limits

- Figures are losses on short English text and code, not the quality of answers.
- A prompt much shorter than {context} tokens often resembles no cluster and then gets the static
  update.
""",
}

_WHERE = {"head": "the final hidden state", "full": "every linear"}

_UNMEASURED = "Not yet measured: run `python -m training evaluate --record` on this folder."

_FIGURES = """\
Next-token loss in nats per token on the test split, {resamples:,} bootstrap resamples, 95 %
intervals in brackets ({interval}). Measured on {measured}.

`base` is the unadapted model, `static` what all clusters share, `hyper` this bundle with each
document's own cluster, `shuffled` this bundle with a random other cluster. `refined_common` is the
same after refinement on all earlier prompts of the stream that the documents arrive in, `refined`
and `refined_shuffled` after further refinement on the cluster's own. Gains are positive where this
bundle is better: over base (base - hyper), net (static - hyper), conditioning (shuffled - hyper),
and so for refined. All variants, baselines and controls are in the report that the command below
writes.

"""

_SECTIONS = {
    "seen": "### Seen domains, unseen documents\n",
    "unseen": "### Unseen domains, never trained on\n",
    "held_out": "### Of these, the domains held out of training on purpose\n",
    "twin": "### Unseen domains, same recipe\n\nFigures of another bundle, trained by the same "
    "recipe and seed with these domains held out. This bundle was trained on them.\n",
    "wikitext": "### WikiText-2, not trained on\n",
}


def card(bundle: Bundle, settings: TrainSettings, record: dict[str, Any]) -> str:
    """Markdown with a front matter that model hubs read."""
    depth = bundle.spec.depth
    facts = {
        "depth": depth,
        "seed": bundle.seed,
        "context": settings.data.context_tokens,
        "scored": settings.data.scored_tokens,
        **_training_facts(record),
    }
    return _CARD.format(
        base_model=bundle.base_model,
        fingerprint=bundle.fingerprint,
        where=_WHERE[depth],
        rank=bundle.spec.rank,
        numbers=bundle.spec.numbers_per_cluster,
        clusters=len(bundle.snapshot),
        train_documents=record["train_documents"],
        train_tokens=record["train_tokens"],
        created_by=bundle.created_by or "not stated",
        excluded=", ".join(f"`{name}`" for name in settings.data.exclude) or "nothing",
        data="\n".join(_data(record)),
        notes="".join(_notes(record)),
        figures=_UNMEASURED if bundle.evaluation is None else _figures(bundle.evaluation),
        evaluate="" if bundle.evaluation is None else _evaluate(bundle.evaluation),
        recipe=_RECIPE[depth].format(**facts).rstrip(),
        limits=_LIMITS[depth].format(**facts).rstrip(),
        **facts,
    )


def _training_facts(record: dict[str, Any]) -> dict[str, Any]:
    """What the recipe says of this run, by depth."""
    facts = {"static_step": record["static"]["best_step"]}
    if "start" in record:
        return facts | {
            "scale": record["start"]["scale"],
            "hyper_step": record["hyper"]["best_step"],
        }
    moved = sum(entry["scale"] > 0 for entry in record["prototypes"])
    best = min(record["blends"], key=lambda tried: float(tried["loss"]))
    return facts | {
        "scale": best["strength"],
        "sharpness": best["sharpness"],
        "moved": f"{moved} of {len(record['prototypes'])} moved from the static update",
    }


def _data(record: dict[str, Any]) -> Iterator[str]:
    yield "| domain | documents | source | licence |\n|---|---|---|---|"
    for name, documents in record["domains"].items():
        facts = record["licences"].get(name, {"source": "not stated", "licence": "not stated"})
        yield f"| {name} | {documents} | {facts['source']} | {facts['licence']} |"


def _notes(record: dict[str, Any]) -> Iterator[str]:
    for name, facts in record["licences"].items():
        if "note" in facts:
            yield f"- `{name}`: {facts['note']}.\n"


def _evaluate(evaluation: dict[str, Any]) -> str:
    """Further options of the command that measures the bundle again."""
    options = f" \\\n    --settings <bundle>/{EVALUATE_SETTINGS}"
    if "budget_static" in evaluation["protocol"]["variants"]:
        options += " --budget <bundle of the whole budget>"
    return options


def _figures(evaluation: dict[str, Any]) -> str:
    protocol = evaluation["protocol"]
    text = _FIGURES.format(
        resamples=protocol["resamples"],
        interval=protocol["interval"].removeprefix("95 %, "),
        measured=machine(protocol),
    )
    sections = [text.rstrip()]
    for name, heading in _SECTIONS.items():
        if name in evaluation:
            sections.append(f"{heading}\n{table(evaluation[name])}")
    return "\n\n".join(sections)
