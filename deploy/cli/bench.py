"""`chameleon bench`: how fast a running service answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from cluster_router.wire.errors import ConfigError
from deploy.cli.chat import parse_adaptation
from deploy.cli.output import Json, print_json, show, table
from deploy.cli.service import LOCAL, Key, Service, Tenant, Url
from training.terminal import FAILED

PROMPTS = (
    "I was charged twice for one transfer. How do I get the second payment back?",
    "Write an SQL query that counts orders by country for the last twelve months.",
    "def merge_sorted(left: list[int], right: list[int]) -> list[int]:",
    "The patient reports chest pain after climbing stairs. The most likely causes are",
    "Melt the butter, add the onions and cook them slowly until they are golden. Then",
    "The tenant shall give notice in writing at least three months before the end of",
    "It was a bright cold day in April, and the harbour lay silent under the snow.",
    "To reset the router, hold the button on its back for ten seconds. If the light",
)
_MS = ("ttft_ms", "itl_ms", "tpot_ms", "latency_ms")


def bench(
    url: Url = LOCAL,
    key: Key = None,
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="How many.")] = 64,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, help="Clients, one request each.")
    ] = 8,
    prompts: Annotated[
        Path | None, typer.Option(help="File with a prompt a line (default: eight built in).")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 64,
    adaptation: Annotated[str, typer.Option(help="auto, off, or the id of a cluster.")] = "auto",
    namespace: Tenant = None,
    learn: Annotated[bool, typer.Option("--learn", help="Let clusters learn from it.")] = False,
    json: Json = False,
) -> None:
    """Measure a running service under load: time to first token, between tokens, throughput.

    Answers are greedy and exactly --max-tokens long. One request warms the service up and is not
    counted. Exit status 1 if a request failed.
    """
    from deploy.load import Load, run_load, summarise

    service = Service(url, key)
    fields: dict[str, Any] = {
        "model": service.model(),
        "adaptation": parse_adaptation(adaptation),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "learn": learn,
    }
    if namespace:
        fields["namespace"] = namespace
    texts = PROMPTS if prompts is None else read_prompts(prompts)
    asyncio.run(run_load(service.url, key, Load(texts, 1, 1, fields), lambda: None))
    load = Load(texts, requests, concurrency, fields)
    with tqdm(total=requests, desc="requests", unit="req", delay=1, leave=False) as bar:
        found = summarise(asyncio.run(run_load(service.url, key, load, bar.update)))
    settings = {"url": service.url, "concurrency": concurrency, "max_tokens": max_tokens}
    if json:
        print_json(settings | {"model": fields["model"], "adaptation_asked": adaptation} | found)
    else:
        _report(found)
    if found["failed"]:
        raise typer.Exit(FAILED)


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        ConfigError: it cannot be read, or there are none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts: {error}", "prompts") from error
    if not (found := [line for line in lines if line.strip()]):
        raise ConfigError(f"{path} holds no prompts; write one a line", "prompts")
    return found


def _report(found: dict[str, Any]) -> None:
    latencies = [(name, *(found[name] or {}).values()) for name in _MS if found[name]]
    adapted = ", ".join(f"{count} {mode}" for mode, count in found["adaptation"].items())
    facts = [
        ("requests", f"{found['requests']}, {found['failed']} failed"),
        ("seconds", found["seconds"]),
        ("requests/s", found["requests_per_s"]),
        ("output tokens/s", found["output_tokens_per_s"]),
        ("prompt tokens", f"{found['prompt_tokens']}, {found['cached_tokens']} cached"),
        ("adapted by", adapted),
        *(("error", f"{count} x {text}") for text, count in found["errors"].items()),
    ]
    show(table(["load", ""], facts), "")
    show(table(["milliseconds", "mean", "p50", "p90", "p99"], latencies))
