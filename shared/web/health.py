"""`/healthz` (the process answers), `/readyz` (database, queue, store, model), `/metrics` (Prometheus)."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from shared.metrics import read_ledger

QUIET = frozenset({"/healthz", "/readyz", "/metrics"})

router = APIRouter(tags=["health"])
metrics_router = APIRouter(tags=["health"])  # apart, as it can be closed


@router.get("/healthz", summary="The process answers")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


class NotReady(Exception):
    """Raised by a check whose words, and whose detail (JSON-able), may be shown to anybody."""

    def __init__(self, message: str, detail: Any = None) -> None:
        super().__init__(message)
        self.detail = detail


@router.get("/readyz", summary="All it depends on answers", responses={503: {"description": "something does not"}})
async def readyz(request: Request, response: Response) -> dict[str, Any]:
    """`checks` says "ok" or what failed; `details` holds what a check tells besides."""
    checks: dict[str, str] = {}
    details: dict[str, Any] = {}
    for name, check in request.app.state.readiness.items():
        try:
            detail = await run_in_threadpool(check)
            checks[name] = "ok"
        except NotReady as error:
            detail = error.detail
            checks[name] = f"failed: {error}"
        except Exception as error:  # whatever is wrong, the answer is "not ready", with its name
            detail = None
            checks[name] = f"failed: {type(error).__name__}"
        if detail is not None:
            details[name] = detail
    ready = all(state == "ok" for state in checks.values())
    response.status_code = 200 if ready else 503
    return {"status": "ready" if ready else "not ready", "checks": checks, "details": details}


@metrics_router.get("/metrics", summary="Prometheus metrics", response_class=Response)
def metrics(request: Request) -> Response:
    read_ledger(request.app.state.core)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
