"""Where the text of each domain comes from and under which licence, as far as someone has said."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cluster_router.wire.errors import ConfigError


class Licence(BaseModel):
    """Where a domain's text comes from, what allows its use, and what to know of its figures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[str, Field(min_length=1)]
    licence: Annotated[str, Field(min_length=1)]
    note: str | None = None


def load_licences(path: Path | None) -> dict[str, Licence]:
    """Read a file of licences by domain; None knows of none.

    Raises:
        ConfigError: no such file, not YAML, or not `<domain>: {source, licence}`.
    """
    if path is None:
        return {}
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return TypeAdapter(dict[str, Licence]).validate_python(raw)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the licences {path}: {error}", "licences") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}", "licences") from error
