"""The evaluator's API process: `uvicorn --factory services.evaluator.app:create_app`. It never imports torch."""

from fastapi import FastAPI

from services.evaluator import routes
from shared.config import CoreSettings
from shared.core import Core
from shared.logging import configure
from shared.web import create_api

ROUTERS = (routes.router,)


def create_app() -> FastAPI:
    settings = CoreSettings()
    configure(settings.log_level)
    return create_api("Captune evaluator", Core.from_settings(settings), ROUTERS)
