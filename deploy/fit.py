"""That a bundle is the served model's own: before anything is started, and in each replica."""

from __future__ import annotations

from adapter_gen.bundle import Bundle
from deploy.config import AppConfig
from lm_workers.models import ModelInfo, describe_model
from lm_workers.models.source import find_model


def check_bundle(config: AppConfig) -> None:
    """Read the bundle, and compare it with the model where that is on this machine already.

    For the builder: Serve stops replicas to make room for those of a new config, so what no replica
    could start with has to be found before. Where the model is elsewhere, replicas compare the two.

    Raises:
        ConfigError: there is no such bundle.
        BundleError: it is damaged, or belongs to another model.
        ModelError: what is there of the model cannot be used.
    """
    path = config.bundle_path
    if path is None:
        return
    model = find_model(config.model)
    Bundle.load(path, None if model is None else describe_model(model, config.name).fingerprint)


def load_bundle(config: AppConfig, info: ModelInfo) -> Bundle | None:
    """The bundle of `config`, which must be that of the model `info`; None where there is none.

    Raises:
        ConfigError: there is no such bundle.
        BundleError: it is damaged, or belongs to another model.
    """
    path = config.bundle_path
    return None if path is None else Bundle.load(path, info.fingerprint)
