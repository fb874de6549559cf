"""The same servers, database and clients as the integration tests have."""

from tests.integration.conftest import (
    _core,
    api,
    app,
    base_url,
    client_for,
    core,
    core_without_redis,
    lab,
    model_root,
    servers,
    settings,
    spawn,
)

__all__ = [
    "_core",
    "api",
    "app",
    "base_url",
    "client_for",
    "core",
    "core_without_redis",
    "lab",
    "model_root",
    "servers",
    "settings",
    "spawn",
]
