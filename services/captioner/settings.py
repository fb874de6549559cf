"""Settings of the captioner, read from ``CAPTUNE_*`` when ``CaptionerSettings()`` is called."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, JsonValue, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

#: What a request to an `openai` engine says itself, and what would change the shape of the answer.
_OWN_FIELDS = frozenset(
    ("model", "messages", "stream", "n", "temperature", "seed", "stop", "max_tokens", "max_completion_tokens")
)
Precision = Literal["auto", "nf4", "int8", "bf16", "fp16", "fp32"]


class EngineSpec(BaseModel):
    """What to build one engine from.

    ``model`` is a hub id or a local directory; directories are accepted only below one of
    ``CAPTUNE_MODEL_ROOTS``, so that nobody can make the service read an arbitrary path.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    type: str = "attributes"
    model: str | None = None
    precision: Precision = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    max_batch: int | None = Field(default=None, ge=1, le=1024)
    max_pixels: int = Field(default=1_048_576, ge=1024, description="Larger pictures are scaled down to this area.")
    # hf
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    compile: bool = Field(default=False, description="torch.compile the decoder: slow to start, then measure")
    # openai
    base_urls: tuple[HttpUrl, ...] = Field(default=(), description="servers with the same model, each up to /v1")
    api_key: SecretStr | None = None
    concurrency: int = Field(default=64, ge=1, le=1024, description="most requests in flight, over all base_urls")
    timeout_s: float = Field(default=120.0, gt=0, description="of one try of one request")
    revision: str | None = Field(
        default=None, max_length=200, description="what the operator knows of the weights behind base_urls"
    )
    extra_body: dict[str, JsonValue] = Field(
        default={},
        description="sent along with each request, such as {'chat_template_kwargs': {'enable_thinking': false}}; "
        "captions are reused for the same only",
    )

    @field_validator("extra_body")
    @classmethod
    def _nothing_of_its_own(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if own := sorted(_OWN_FIELDS.intersection(value)):
            raise ValueError(f"{', '.join(own)} cannot be set here: the engine or each request sets them")
        return value


def _default_engines() -> dict[str, EngineSpec]:
    return {"attributes": EngineSpec()}


class CaptionerSettings(BaseSettings):
    """``CAPTUNE_ENGINES`` is JSON: ``{"attributes": {}, "qwen": {"type": "hf", "model": "Qwen/..."}}``."""

    model_config = SettingsConfigDict(env_prefix="CAPTUNE_", extra="ignore")

    engines: dict[str, EngineSpec] = Field(default_factory=_default_engines, min_length=1)
    queue_size: int = Field(default=256, ge=1, description="Requests waiting per engine; more are answered 429.")
    max_wait_ms: float = Field(default=10.0, ge=0, le=1000, description="Longest wait to fill a batch.")
    request_timeout_s: float = Field(default=300.0, gt=0, description="Deadline of one caption request, in seconds.")
    prepare_threads: int = Field(default=2, ge=1, le=64)
    max_image_bytes: int = Field(default=48_000_000, ge=1024)
    max_image_pixels: int = Field(default=100_000_000, ge=1024)
    max_images: int = Field(default=8, ge=1, le=64, description="Pictures per chat request.")


class CaptionWorkerSettings(BaseSettings):
    """Where the worker of caption jobs finds the model, and how much it asks at a time."""

    model_config = SettingsConfigDict(env_prefix="CAPTUNE_", extra="ignore")

    captioner_url: str = Field(description="Base URL of the captioner's API, without /v1.")
    service_token: SecretStr
    request_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="The captioner's deadline of one request, in seconds: the same variable as its.",
    )
    caption_concurrency: int = Field(
        default=192, ge=1, le=1024, description="Requests in flight, all the time: two of a GPU's largest batches."
    )
