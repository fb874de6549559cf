"""The trainer's API process: `uvicorn --factory services.trainer.app:create_app`. It never imports torch."""

from fastapi import FastAPI

from services.trainer.routes import fine_tuning, groups
from shared.config import CoreSettings
from shared.core import Core
from shared.logging import configure
from shared.web import create_api, settled

ROUTERS = (fine_tuning.router, groups.router)


def create_app() -> FastAPI:
    settings = CoreSettings()
    configure(settings.log_level)
    return settled(create_api("Captune trainer", Core.from_settings(settings), ROUTERS))
