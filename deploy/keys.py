"""Make an API key:  python -m deploy.keys my-team --file keys.yaml

The key is printed once; the file gets its hash. A running service takes it up within seconds.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from cluster_router.access import ApiKey, key_hash, read_keys
from cluster_router.wire.errors import ChameleonError, ConfigError

_FAILED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="deploy.keys", description=__doc__)
    parser.add_argument("name", help="whose key it is")
    parser.add_argument("--file", type=Path, required=True, help="file of keys, made if need be")
    parser.add_argument("--namespace", help="the one tenant that it may speak for")
    parser.add_argument("--requests-per-minute", type=int, help="most in any minute")
    options = parser.parse_args(arguments)
    try:
        print(add_key(options.file, options.name, options.namespace, options.requests_per_minute))
    except ChameleonError as error:
        print(f"error: {error}", file=sys.stderr)
        return _FAILED
    return 0


def add_key(
    file: Path, name: str, namespace: str | None = None, requests_per_minute: int | None = None
) -> str:
    """Add a new key to `file`, readable by its owner alone, and return it.

    Raises:
        ConfigError: a field is out of range, the name is taken, or the file is not one of keys.
    """
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
        raise ConfigError(f"{file} has a key of {name!r} already; remove it there first", "name")
    text = yaml.safe_dump(
        [one.model_dump(exclude_none=True) for one in (*held, entry)], sort_keys=False
    )
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:  # noqa: PTH123
            out.write(text)
        temporary.replace(file)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error}", "file") from error
    return key


if __name__ == "__main__":
    sys.exit(main())
