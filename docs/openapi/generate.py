"""Writes each service's OpenAPI document beside this file: `make openapi`. A test holds them to the code."""

import json
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from services.captioner import app as captioner
from services.evaluator import app as evaluator
from services.trainer import app as trainer
from shared.config import CoreSettings
from shared.core import Core
from shared.web.api import create_api

HERE = Path(__file__).resolve().parent
SERVICES = {"captioner": captioner.ROUTERS, "trainer": trainer.ROUTERS, "evaluator": evaluator.ROUTERS}


def documents() -> dict[str, Any]:
    """Service name -> OpenAPI document. Nothing is connected to: the engine, Redis and the store open lazily."""
    settings = CoreSettings(
        database_url=SecretStr("postgresql://unused"),
        redis_url=SecretStr("redis://unused"),
        storage_url="file:///unused",
    )
    core = Core.from_settings(settings)
    return {name: create_api(f"Captune {name}", core, routers).openapi() for name, routers in SERVICES.items()}


if __name__ == "__main__":
    for name, document in documents().items():
        (HERE / f"{name}.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        print(f"docs/openapi/{name}.json: {len(document['paths'])} paths")
