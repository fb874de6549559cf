"""The evaluator's API process: `python -m shared.web.serve services.evaluator.app:create_app`. It imports torch when
the first classifier is asked for a prediction, is downloaded whole or is imported; not before."""

from fastapi import FastAPI

from services.evaluator import routes
from services.evaluator.board import routes_leaderboard
from services.evaluator.prediction import routes_classifiers
from shared import tracing
from shared.config import CoreSettings
from shared.core import Core
from shared.cpu import share_cores
from shared.logging import configure
from shared.web import keys
from shared.web.api import create_api, settled

ROUTERS = (routes.router, routes_classifiers.router, routes_leaderboard.router, keys.router)


def create_app() -> FastAPI:
    share_cores()
    settings = CoreSettings()
    configure(settings.log_level)
    tracing.configure(settings.otlp_endpoint, "evaluator")
    return settled(create_api("Captune evaluator", Core.from_settings(settings, api=True), ROUTERS))
