"""Settings of the fine-tuning worker."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class TrainerSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="CAPTUNE_", extra="ignore")

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    processes: int | None = Field(
        default=None, ge=1, le=64, description="GPUs of this machine that one run is spread over; all where not given"
    )
    checkpoint_seconds: float = Field(
        default=60.0, ge=0, description="between saves of the full training state, which a killed run goes on from"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; its own choice where not given")
