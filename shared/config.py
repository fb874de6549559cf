"""Settings every process shares. Built once in `create_app` or `main`, never at import.

`DATABASE_URL`, `REDIS_URL` and `STORAGE_URL` keep the names every host uses; the rest is prefixed `CAPTUNE_`."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.schemas.keys import RateLimit


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "captune"


def _plain(name: str) -> AliasChoices:
    return AliasChoices(name, name.lower())


def _folders(value: object) -> object:
    """A list as PATH has it (`/models:/more`), each from the root or from a home folder on."""
    if not isinstance(value, str):
        return value
    folders = [Path(folder).expanduser() for folder in value.split(os.pathsep) if folder]
    if odd := [str(folder) for folder in folders if not folder.is_absolute()]:
        raise ValueError(f"write absolute paths with '{os.pathsep}' between them; {odd[0]!r} is none")
    return folders


class CoreSettings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="CAPTUNE_",
        extra="ignore",
        populate_by_name=True,
        hide_input_in_errors=True,  # a secret may be in it
    )

    database_url: SecretStr = Field(validation_alias=_plain("DATABASE_URL"))
    redis_url: SecretStr = Field(validation_alias=_plain("REDIS_URL"))
    storage_url: str = Field(validation_alias=_plain("STORAGE_URL"))

    service_token: SecretStr | None = None  # what workers show the captioner; unset means no such caller is admitted
    bootstrap_key: SecretStr | None = None  # made an admin key by the migration step, so that a fresh stack has one

    rate_limit: RateLimit = "600/second"  # of each API key, where the key has none of its own; `off`: none
    failed_auth_limit: RateLimit = "60/minute"  # requests with a wrong key, of each client address
    metrics: Literal["open", "key", "off"] = "open"  # key: for metrics_token, and API keys with scope admin
    metrics_token: SecretStr | None = None  # what a Prometheus may show instead of an API key
    docs: bool = True  # /docs, /redoc and /openapi.json

    max_upload_bytes: int = 20 * 2**30
    max_json_bytes: int = 64 * 2**20  # chat completions carry images as data URIs

    statement_seconds: float = Field(default=120.0, gt=0)  # of one SQL statement of an API; workers' are not bounded
    max_streams: int = Field(default=800, ge=1)  # open event streams of one API process, of its 1,000 connections
    max_streams_per_owner: int = Field(default=500, ge=1)

    lease_seconds: float = 30.0  # a worker that does not renew for this long has lost its job
    reconcile_seconds: float = 2.0
    requeue_after_seconds: float = 5.0  # a queued row unknown to Redis for this long is enqueued again
    retry_seconds: float = 5.0  # before a failed attempt is repeated; four times as long after each further failure
    max_failures: int = 5  # crashes and unexpected errors in a row, without progress, before a job fails for good

    # Downloaded CLIPs, and the starter once it is built. (Caption models: HF_HUB_CACHE, as the hub's tools have it.)
    model_cache: Path = Field(default_factory=_user_cache)
    cache_bytes: int = Field(default=20 * 2**30, ge=0)  # of decoded images and embeddings kept there at most; 0: none
    # Folders below which a CLIP or a caption model may be a local directory, as in PATH: `/models:/more`.
    model_roots: Annotated[list[Path], NoDecode, BeforeValidator(_folders)] = []
    log_level: str = "INFO"
    metrics_port: int = 0  # where workers and the reconciler serve their metrics, on every address; 0: nowhere
    otlp_endpoint: str | None = None  # an OpenTelemetry collector (OTLP over HTTP) that traces are sent to
