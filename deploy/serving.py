"""A config file for Ray Serve: read, changed by options, and checked before anything starts."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from adapter_gen.bundle import Bundle
from cluster_router.wire.errors import ConfigError
from deploy.config import AppConfig
from deploy.environment import SETTINGS
from deploy.placement import check_gpus
from lm_workers.models import describe_model, resolve_model

Model = TypeVar("Model", bound=BaseModel)
BUILDER = "deploy.app:build"


@dataclass(frozen=True)
class ServeConfig:
    """A checked config file.

    Attributes:
        document: the file as Serve takes it, JSON values only, with what its processes need.
        settings: of this project's application in it.
        application: name of that application.
        host: where Serve listens.
        port: likewise.
        prefix: route of that application, without a final slash.
    """

    document: dict[str, Any]
    settings: AppConfig
    application: str
    host: str
    port: int
    prefix: str

    @property
    def url(self) -> str:
        """Where a client on this machine finds the application."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}{self.prefix}"


@dataclass(frozen=True)
class Overrides:
    """Options that replace what the file says; None leaves it. `bundle` may be "none"."""

    host: str | None = None
    port: int | None = None
    model: str | None = None
    bundle: str | None = None


def read_config(path: Path, overrides: Overrides) -> ServeConfig:
    """Read a config file of Serve that has this project's application in it.

    Raises:
        ConfigError: it cannot be read, or a setting is unknown or out of range.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}", "config") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is no config of Ray Serve; deploy/config.yaml is one")
    application = _application(path, document)
    _override(document, application, overrides)
    schema = _checked(ServeDeploySchema, document, str(path))
    place = f"{path}: applications.{application['name']}.args"
    settings = _checked(AppConfig, application.get("args") or {}, place)
    _check_resources(settings, application)
    return ServeConfig(
        document=document | {"controller_options": _with_environment(schema)},
        settings=settings,
        application=application["name"],
        host=schema.http_options.host,
        port=schema.http_options.port,
        prefix=(application.get("route_prefix") or "/").rstrip("/"),
    )


def _application(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    applications = document.get("applications")
    for one in applications if isinstance(applications, list) else []:
        if isinstance(one, dict) and one.get("import_path") == BUILDER:
            one.setdefault("name", "default")
            return one
    raise ConfigError(
        f"{path} has no application with import_path: {BUILDER}; deploy/config.yaml shows one"
    )


def _override(document: dict[str, Any], application: dict[str, Any], given: Overrides) -> None:
    http = {"host": given.host, "port": given.port}
    args = {"model": given.model, "bundle": given.bundle}
    for holder, name, values in ((document, "http_options", http), (application, "args", args)):
        chosen = {key: value for key, value in values.items() if value is not None}
        if chosen:
            holder[name] = (holder.get(name) or {}) | chosen
    if given.bundle == "none":
        application["args"]["bundle"] = None


def _check_resources(settings: AppConfig, application: dict[str, Any]) -> None:
    for one in application.get("deployments") or []:
        # Serve takes the whole of `ray_actor_options` from here where there are any.
        if one["name"] == "LMReplica" and one.get("ray_actor_options") is not None:
            check_gpus(settings.engine, one["ray_actor_options"].get("num_gpus"))


def _with_environment(schema: ServeDeploySchema) -> dict[str, Any]:
    """The controller's options, with `deploy/environment.py` in its environment.

    Where our own environment, or the file, says otherwise, that holds.
    """
    given = schema.controller_options
    found = ((given and given.runtime_env) or {}).get("env_vars") or {}
    ours = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    return {"runtime_env": {"env_vars": {**SETTINGS, **found, **ours}}}


def _checked(kind: type[Model], value: Any, place: str) -> Model:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5]]
        raise ConfigError(f"{place}: " + "; ".join(lines)) from None


def check_parts(config: ServeConfig) -> str:
    """Fetch the model if need be, and check that the bundle is sound and the model's own.

    Returns:
        What is served, in words.

    Raises:
        ModelError: there is no usable model of that name.
        ConfigError: there is no such bundle.
        BundleError: it is damaged, or belongs to another model.
    """
    settings = config.settings
    info = describe_model(resolve_model(settings.model), settings.name)
    if settings.access.keys is not None:
        settings.access.build()
    if settings.bundle_path is None:
        return f"{settings.name}, unadapted"
    bundle = Bundle.load(settings.bundle_path, info.fingerprint)
    return f"{settings.name}, adapted by {settings.bundle} ({len(bundle.snapshot)} clusters)"


def check_port(host: str, port: int) -> None:
    """Raise ConfigError if something listens there already, or nobody may."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET  # as Serve chooses it
    try:
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot listen on port {port} of {host} ({error.strerror}); stop what runs there, or "
            "choose another with --port",
            "port",
        ) from error
