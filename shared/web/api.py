"""One way to make an API: routers, error handlers, limits and health, the same for every service and for all of them
in one process."""

import gc
import resource
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response

from shared import tracing
from shared.core import Core
from shared.jobs.streams import Streams
from shared.web import health
from shared.web.answers import Answers
from shared.web.api_document import Api
from shared.web.auth import admit_metrics
from shared.web.body_limit import BodyLimit
from shared.web.docs_pages import add_docs_pages
from shared.web.problems import add_handlers
from shared.web.rate_limit import RateLimits
from shared.web.request_log import RequestLog

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


async def get_core(request: Request) -> Core:  # async: what does not wait needs no thread
    core: Core = request.app.state.core
    return core


CoreDep = Annotated[Core, Depends(get_core)]
IdempotencyKey = Annotated[
    str | None,
    Header(max_length=200, description="a retry with the same key and body gets the first request's resource"),
]
After = Annotated[str | None, Query(description="the last id of the page before", max_length=100)]
Limit = Annotated[int, Query(ge=1, le=1000)]


def settled(app: FastAPI) -> FastAPI:
    """The same, in a process that from now on serves it and nothing else. What exists by now stays, so the garbage
    collector need not walk it: a full collection held up every request under way for 0.1 s (150,000 objects), and now
    for none. And it may open as many files as the system lets it: a connection is one, and many shells say 1,024."""
    gc.collect()
    gc.freeze()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # a system with a limit of its own below this one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return app


def create_api(
    title: str, core: Core, routers: Sequence[APIRouter], lifespans: Sequence[Lifespan] = (), version: str = "0.1.0"
) -> FastAPI:
    settings = core.settings
    limits = RateLimits(settings.redis_url.get_secret_value(), settings.rate_limit, settings.failed_auth_limit)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for each in lifespans:
                await stack.enter_async_context(each(app))
            yield
        limits.close()
        core.close()
        tracing.flush()

    # No redirects: they would be to whatever host the request named.
    app = Api(
        title=title,
        version=version,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,
        redoc_url=None,
        # Of forms that routes declare: one upload, and the few words that go with it.
        form_limits={"max_files": 1, "max_fields": 16, "max_part_size": 2**16},
    )
    if settings.docs:
        add_docs_pages(app)
    app.state.core = core
    app.state.rate_limits = limits
    app.state.keys_marked = {}
    app.state.streams = Streams(core.db, settings.max_streams, settings.max_streams_per_owner)
    app.state.readiness = {"database": core.db.check, "queue": core.queue.ping, "storage": core.store.check}
    for router in (health.router, *routers):
        app.include_router(router)
    if settings.metrics != "off":
        app.include_router(
            health.metrics_router, dependencies=[Depends(admit_metrics)] if settings.metrics == "key" else []
        )
    add_handlers(app)
    app.add_middleware(BodyLimit, json_bytes=settings.max_json_bytes, upload_bytes=settings.max_upload_bytes)
    app.add_middleware(Answers)
    app.add_middleware(RequestLog)  # the outermost, so that a refused body is logged and counted too
    return app


def accepted(response: Response, location: str, retry_after: int = 1) -> None:
    """202: where to look, and when."""
    response.headers["Location"] = location
    response.headers["Retry-After"] = str(retry_after)
