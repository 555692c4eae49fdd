"""`chameleon bundle`: what a bundle holds, whether it is sound, its updates as adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cluster_router.wire.forms import ExportForm
from deploy.cli.output import Json, print_json, show, table
from training.terminal import FAILED, command_line

app = command_line("Look into bundles, check them, export their adapters.")

Named = Annotated[str, typer.Argument(help="Folder, or name of a shipped bundle.")]
Base = Annotated[
    str | None, typer.Option(help="Base model (default: the one that the bundle names).")
]


@app.command()
def inspect(
    bundle: Named,
    words: Annotated[
        bool,
        typer.Option("--words", help="Name clusters by words, which needs the base model."),
    ] = False,
    model: Base = None,
    json: Json = False,
) -> None:
    """Show what a bundle belongs to, what it holds, and its clusters."""
    from deploy.bundle_tools import describe_bundle

    found = describe_bundle(_folder(bundle), model, words)
    if json:
        print_json(found)
        return
    clusters: list[dict[str, Any]] = found.pop("clusters")
    files: dict[str, int] = found.pop("files")
    losses: dict[str, dict[str, float]] = found.pop("nats_per_token")
    show(table(["bundle", str(found.pop("path"))], list(found.items())), "")
    show(table(["file", "bytes"], list(files.items())), "")
    for group, figures in losses.items():
        show(table([f"nats per token, {group}", ""], list(figures.items())), "")
    heads = ["cluster", "prompts", "version", *(["words"] if words else [])]
    rows = [(c["id"], c["size"], c["version"], " ".join(c.get("words", ()))) for c in clusters]
    show(table(heads, [row[: len(heads)] for row in rows]))


@app.command()
def verify(bundle: Named, model: Base = None, json: Json = False) -> None:
    """Check files, checksums, numbers, the base model, and every cluster's update.

    Exit status 1 if anything is wrong.
    """
    from deploy.bundle_tools import verify_bundle

    found = verify_bundle(_folder(bundle), model)
    if json:
        print_json([{"check": c.name, "ok": c.ok, "found": c.found} for c in found])
    else:
        for check in found:
            typer.echo(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.found}")
    if not all(check.ok for check in found):
        raise typer.Exit(FAILED)


@app.command()
def export(
    bundle: Named,
    cluster: Annotated[str, typer.Argument(help="Id of a cluster, or static.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    model: Base = None,
    form: Annotated[
        ExportForm,
        typer.Option(
            help="What the reader takes: whole needs lora_bias, as PEFT has; plain, for vLLM, "
            "leaves out the shift of the head; linears all of the head.",
        ),
    ] = "whole",
    json: Json = False,
) -> None:
    """Write a cluster's update as a PEFT adapter; `static` is what all clusters share.

    A running service exports its present clusters: GET /v1/clusters/ID/adapter.
    """
    from deploy.bundle_tools import export_cluster

    written = export_cluster(_folder(bundle), cluster, out, model, form)
    if json:
        print_json({"folder": str(out), "files": written})
        return
    typer.echo(
        f"wrote {out}: {', '.join(sorted(written))}\n"
        f"{out}/README.md says what the adapter carries and how to load it"
    )


def _folder(name: str) -> Path:
    from deploy.config import AppConfig

    folder = AppConfig(bundle=name).bundle_path
    assert folder is not None
    return folder
