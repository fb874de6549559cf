"""`/healthz` (the process answers), `/readyz` (database, queue, store, model), `/metrics` (Prometheus)."""

from math import nan
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, Histogram, generate_latest
from redis import RedisError

from shared.queue import KINDS

REQUESTS = Histogram("captune_request_seconds", "HTTP requests", ["method", "route", "status"])
QUEUE_DEPTH = Gauge("captune_queue_depth", "ids waiting on the Redis list", ["kind"])
QUIET = frozenset({"/healthz", "/readyz", "/metrics"})

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="The process answers")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="All it depends on answers", responses={503: {"description": "something does not"}})
async def readyz(request: Request, response: Response) -> dict[str, Any]:
    checks: dict[str, str] = {}
    for name, check in request.app.state.readiness.items():
        try:
            await run_in_threadpool(check)
            checks[name] = "ok"
        except Exception as error:  # whatever is wrong, the answer is "not ready", with its name
            checks[name] = f"failed: {type(error).__name__}" if name != "model" else f"failed: {error}"
    ready = all(state == "ok" for state in checks.values())
    response.status_code = 200 if ready else 503
    return {"status": "ready" if ready else "not ready", "checks": checks}


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
def metrics(request: Request) -> Response:
    queue = request.app.state.core.queue
    try:
        depths = {kind: float(queue.depth(kind)) for kind in KINDS}
    except RedisError:  # an outage must not take the other metrics along
        depths = dict.fromkeys(KINDS, nan)
    for kind, depth in depths.items():
        QUEUE_DEPTH.labels(kind).set(depth)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
