"""`chameleon keys`: who may call. Keys are kept as hashes in a file, which a service follows."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster_router.wire.errors import ConfigError
from deploy.cli.output import Json, print_json, show, table
from training.terminal import command_line

if TYPE_CHECKING:
    from cluster_router.access import ApiKey

app = command_line("Make, list and remove API keys. A running service follows the file.")

File = Annotated[Path, typer.Option("--file", help="The service's access.keys.")]
Name = Annotated[str, typer.Argument(help="Whose key it is.")]


@app.command()
def add(
    name: Name,
    file: File,
    namespace: Annotated[
        str | None, typer.Option(help="The one tenant that it may speak for.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Most in any minute.")] = None,
) -> None:
    """Make a key and print it, once: the file gets its hash."""
    typer.echo(add_key(file, name, namespace, requests_per_minute))


@app.command("list")
def list_keys(file: File, json: Json = False) -> None:
    """List whose keys there are."""
    from cluster_router.access import read_keys

    found = [one.model_dump(exclude={"sha256"}) for one in read_keys(file)]
    if json:
        print_json(found)
        return
    rows = [(k["name"], k["namespace"] or "any", k["requests_per_minute"] or "-") for k in found]
    show(table(["name", "namespace", "requests a minute"], rows))


@app.command()
def remove(name: Name, file: File) -> None:
    """Remove a key: it lets nobody in any more."""
    remove_key(file, name)


def add_key(
    file: Path, name: str, namespace: str | None = None, requests_per_minute: int | None = None
) -> str:
    """Add a new key to `file`, readable by its owner alone, and return it.

    Raises:
        ConfigError: a field is out of range, the name is taken, or the file is not one of keys.
    """
    from pydantic import ValidationError

    from cluster_router.access import ApiKey, key_hash, read_keys

    key = f"ck-{secrets.token_urlsafe(32)}"
    try:
        entry = ApiKey(
            name=name,
            sha256=key_hash(key),
            namespace=namespace,
            requests_per_minute=requests_per_minute,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    held = read_keys(file) if file.exists() else ()
    if any(one.name == name for one in held):
        raise ConfigError(
            f"{file} has a key of {name!r} already; remove it first: "
            f"chameleon keys remove {name} --file {file}",
            "name",
        )
    _write(file, [*held, entry])
    return key


def remove_key(file: Path, name: str) -> None:
    """Take the key of `name` out of `file`.

    Raises:
        ConfigError: it is not there, or the file is not one of keys.
    """
    from cluster_router.access import read_keys

    held = read_keys(file)
    kept = [one for one in held if one.name != name]
    if len(kept) == len(held):
        names = ", ".join(one.name for one in held) or "none"
        raise ConfigError(f"{file} has no key of {name!r}; it has: {names}", "name")
    _write(file, kept)


def _write(file: Path, keys: Sequence[ApiKey]) -> None:
    import yaml

    text = yaml.safe_dump([one.model_dump(exclude_none=True) for one in keys], sort_keys=False)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:  # noqa: PTH123
            out.write(text)
        temporary.replace(file)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error}", "file") from error
