"""The captioner's API process: `python -m shared.web.serve services.captioner.app:create_app`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from services.captioner import routes
from services.captioner.engines import build
from services.captioner.serving import chat
from services.captioner.serving.batcher import Batcher
from services.captioner.settings import CaptionerSettings
from shared import tracing
from shared.config import CoreSettings
from shared.core import Core
from shared.cpu import share_cores
from shared.logging import configure
from shared.web.api import create_api, settled
from shared.web.health import NotReady

ROUTERS = (routes.router, chat.router)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Starts the engines; they load in their own threads, `/readyz` and `/v1/models` tell when they can be used."""
    settings = CaptionerSettings()
    app.state.captioner_settings = settings
    app.state.batchers = {
        name: Batcher(
            build(name, spec, app.state.core.settings.model_roots),
            queue_size=settings.queue_size,
            max_wait_ms=settings.max_wait_ms,
            request_timeout_s=settings.request_timeout_s,
            prepare_threads=settings.prepare_threads,
        )
        for name, spec in settings.engines.items()
    }
    for batcher in app.state.batchers.values():
        batcher.start()

    def model_loaded() -> dict[str, Any]:
        detail = {name: batcher.status() for name, batcher in app.state.batchers.items()}
        for name, batcher in app.state.batchers.items():
            if not batcher.ready:
                raise NotReady(f"{name}: {batcher.error}" if batcher.error else f"{name} is {batcher.state}", detail)
        return detail

    app.state.readiness["model"] = model_loaded
    try:
        yield
    finally:
        for batcher in app.state.batchers.values():
            await asyncio.to_thread(batcher.stop)


def create_app() -> FastAPI:
    share_cores()
    settings = CoreSettings()
    configure(settings.log_level)
    tracing.configure(settings.otlp_endpoint, "captioner")
    return settled(create_api("Captune captioner", Core.from_settings(settings, api=True), ROUTERS, [lifespan]))
