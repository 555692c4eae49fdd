"""`chameleon clusters`: the clusters of a running service."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster_router.wire.errors import ChameleonError
from deploy.cli.output import Json, print_json, show, table
from deploy.cli.service import LOCAL, Key, Service, Tenant, Url


def clusters(
    cluster: Annotated[int | None, typer.Argument(help="Id: show this cluster alone.")] = None,
    url: Url = LOCAL,
    key: Key = None,
    namespace: Tenant = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on showing them until Ctrl-C.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    json: Json = False,
) -> None:
    """List the clusters of a running service: size, changes, characteristic words."""
    service = Service(url, key)
    if cluster is not None:
        one = service.get(f"/v1/clusters/{cluster}", namespace=namespace)
        if json:
            print_json(one)
        else:
            show(_facts(one))
        return
    if watch:
        _watch(service, namespace, every)
        return
    listed = service.get("/v1/clusters", namespace=namespace)
    if json:
        print_json(listed)
    else:
        show(_table(listed, {}), _summary(listed))


def _watch(service: Service, namespace: str | None, every: float) -> None:
    """Show the clusters until interrupted; grown ones say by how much since it began."""
    listed = service.get("/v1/clusters", namespace=namespace)
    first = {one["id"]: one["size"] for one in listed["data"]}
    console = Console(highlight=False)
    # In a pipe each look is printed after the last one; a terminal shows the latest in its place.
    display = Live(console=console, screen=True, auto_refresh=False)
    try:
        with display if console.is_terminal else nullcontext():
            while True:
                shown = _table(listed, first)
                if console.is_terminal:
                    display.update(shown, refresh=True)
                else:
                    console.print(shown)
                time.sleep(every)
                try:
                    listed = service.get("/v1/clusters", namespace=namespace)
                except ChameleonError as error:
                    console.print(f"{error}; looking again", markup=False)
    except KeyboardInterrupt:
        show(_summary(listed))


def _table(listed: dict[str, Any], first: dict[int, int]) -> Table:
    heads = ["cluster", "prompts", *(["new"] if first else [])]
    heads += ["version", "refined", "adapter", "characteristic words"]
    rows = []
    for one in sorted(listed["data"], key=lambda one: -one["size"]):
        grown = [one["size"] - first.get(one["id"], 0)] if first else []
        rest = [one["version"], one["refinement"], one["adapter_key"]]
        rows.append([one["id"], one["size"], *grown, *rest, _words(one)])
    return table(heads, rows)


def _facts(one: dict[str, Any]) -> Table:
    facts = [("prompts", one["size"]), ("version", one["version"]), ("refined", one["refinement"])]
    rows = [*facts, ("adapter", one["adapter_key"]), ("words", _words(one))]
    return table(["cluster", str(one["id"])], rows)


def _words(one: dict[str, Any]) -> str:
    return " ".join(one["characteristic_tokens"])


def _summary(listed: dict[str, Any]) -> str:
    if not listed["data"]:
        return "no clusters: the service runs without a bundle, or this namespace is new"
    prompts = sum(one["size"] for one in listed["data"])
    version = listed["snapshot_version"]
    return f"{len(listed['data'])} clusters, {prompts:,} prompts, snapshot {version}"
