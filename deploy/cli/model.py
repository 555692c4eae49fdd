"""`chameleon model`: base models in this machine's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.output import Json, print_json
from training.terminal import command_line

app = command_line("Fetch base models.")


@app.command()
def fetch(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Embedded name, Hugging Face id, folder or .gguf file (default: the embedded one)."
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where to keep it (default: this user's cache).")
    ] = None,
    json: Json = False,
) -> None:
    """Fetch and convert a base model, check it, and print its folder.

    Nothing needs the network for it afterwards.
    """
    from lm_workers.models import DEFAULT_MODEL, describe_model, resolve_model

    name = model or DEFAULT_MODEL
    folder = resolve_model(name, cache)
    info = describe_model(folder, name)
    if json:
        print_json(
            {
                "model": name,
                "folder": str(folder),
                "fingerprint": info.fingerprint,
                "context_length": info.context_length,
                "vocab_size": info.vocab_size,
            }
        )
        return
    typer.echo(folder)
