"""The trainer's API process: `python -m shared.web.serve services.trainer.app:create_app`. It never imports torch."""

from fastapi import FastAPI

from services.trainer.routes import fine_tuning, groups
from shared import tracing
from shared.config import CoreSettings
from shared.core import Core
from shared.logging import configure
from shared.web.api import create_api, settled

ROUTERS = (fine_tuning.router, groups.router)


def create_app() -> FastAPI:
    settings = CoreSettings()
    configure(settings.log_level)
    tracing.configure(settings.otlp_endpoint, "trainer")
    return settled(create_api("Captune trainer", Core.from_settings(settings, api=True), ROUTERS))
