"""Settings of the evaluation worker and of the predictor in the API."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class EvaluatorSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="CAPTUNE_", extra="ignore")

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; its own choice where not given")

    predict_models: int = Field(default=2, ge=1, le=100, description="classifiers that the API keeps loaded")
    predict_files: int = Field(default=64, ge=1, le=10_000, description="images of one request")
    predict_bytes: int = Field(default=64 * 2**20, ge=1, description="bytes of one request's images together")
    predict_queue: int = Field(
        default=256, ge=1, description="images of all requests that wait or are worked on; beyond it the answer is 429"
    )
    predict_waiting_bytes: int = Field(
        default=512 * 2**20,
        ge=1,
        description="bytes of the requests that are read or wait; beyond it the answer is 429",
    )
    predict_batch: int = Field(default=32, ge=1, description="images that go through the model together")
    import_bytes: int = Field(default=5 * 2**30, ge=1, description="bytes of an imported classifier, unpacked")
