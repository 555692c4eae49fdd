"""`chameleon version`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, metadata

import typer

from deploy.cli.output import Json, print_json

PARTS = ("ray", "torch", "transformers", "faiss-cpu", "faiss-gpu", "vllm")
"""Packages that decide what this installation computes and on what."""


def installed(package: str) -> str | None:
    """Version of an installed package, read without importing it."""
    try:
        return metadata(package)["Version"]
    except PackageNotFoundError:
        return None


def version(json: Json = False) -> None:
    """Print the version, and those of what it runs on."""
    found = {
        "chameleon-llm": installed("chameleon-llm"),
        "python": platform.python_version(),
        **{part: known for part in PARTS if (known := installed(part))},
    }
    if json:
        print_json(found)
        return
    for name, known in found.items():
        typer.echo(f"{name} {known or 'not installed; run pip install -e .'}")
