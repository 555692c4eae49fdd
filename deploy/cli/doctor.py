"""`chameleon doctor`: whether this machine can serve, and what to do where it cannot."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from deploy.cli.output import Json, print_json, show, table
from training.terminal import FAILED

_STYLE = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    model: Annotated[str, typer.Option(help="Base model to look for.")] = "smollm2-135m-instruct",
    json: Json = False,
) -> None:
    """Check this machine: Python, torch, GPU, FAISS, Ray, compiler, memory, ports, disk, model.

    Exit status 1 if something keeps the service from running; warnings do not count.
    """
    with Console(stderr=True).status("looking", spinner="dots"):
        from deploy.diagnosis import diagnose

        found = list(diagnose(model))
    if json:
        print_json([asdict(one) for one in found])
    else:
        rows = [
            (Text(one.verdict, _STYLE[one.verdict]), one.name, one.found, one.advice)
            for one in found
        ]
        show(table(["", "what", "found", "what to do"], rows))
    if any(one.verdict == "fail" for one in found):
        raise typer.Exit(FAILED)
