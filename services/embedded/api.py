"""Every service's API in one process: `python -m shared.web.serve services.embedded.api:create_app`.

The same routers as in the services' own processes, in one application with one OpenAPI document."""

from fastapi import FastAPI

from services.captioner import app as captioner
from services.evaluator import app as evaluator
from services.trainer import app as trainer
from shared import tracing
from shared.config import CoreSettings
from shared.core import Core
from shared.cpu import share_cores
from shared.logging import configure
from shared.web.api import create_api, settled

ROUTERS = (*captioner.ROUTERS, *trainer.ROUTERS, *evaluator.ROUTERS)


def create_app() -> FastAPI:
    share_cores()
    settings = CoreSettings()
    configure(settings.log_level)
    tracing.configure(settings.otlp_endpoint, "api")
    return settled(create_api("Captune", Core.from_settings(settings, api=True), ROUTERS, [captioner.lifespan]))
