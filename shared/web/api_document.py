"""The OpenAPI document, made whole. FastAPI knows what a route answers when all is well; what can go wrong follows from
what the route takes, so it is told here, once for all of them."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.constants import REF_TEMPLATE

from shared.schemas.common import Problem

JSON, PROBLEM = "application/json", "application/problem+json"
OPENAI = "chat"  # the tag of routes that answer errors in OpenAI's shape, which their clients read

_WHY = {
    400: "the body cannot be read",
    401: "no API key was sent, or one that is not valid",
    403: "the API key lacks the scope",
    404: "there is no such thing among yours",
    408: "the body came too slowly",
    409: "it cannot be done in the state that things are in",
    413: "the body is too large",
    415: "the body is not JSON",
    422: "a value is not valid; `errors` lists every one",
    429: "too many requests, or too many that wait",
    503: "the database, or a model, does not answer",
}
_RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
_HEADERS: dict[int, dict[str, Any]] = {
    202: {"Location": {"schema": {"type": "string"}, "description": "where to look", "required": True}} | _RETRY_AFTER,
    401: {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}
_REQUEST_ID = {"schema": {"type": "string"}, "description": "the server's log has it too", "required": True}


class Api(FastAPI):
    """FastAPI with such a document."""

    _whole: dict[str, Any] | None = None

    def openapi(self) -> dict[str, Any]:
        made = super().openapi()
        if made is not self._whole:  # FastAPI keeps it until a route is added
            _complete(made)
            self._whole = made
        return made


def _complete(document: dict[str, Any]) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    components["headers"] = {"RequestId": _REQUEST_ID}
    shared = components["responses"] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            openai = OPENAI in operation.get("tags", ())
            for status in _errors(path, method, operation):
                if status in _WHY:
                    name = f"{'OpenAI' if openai else 'Problem'}{status}"
                    shared[name] = _error(status, _WHY[status], openai)
                    responses[str(status)] = {"$ref": f"#/components/responses/{name}"}
                else:
                    responses[str(status)] = _error(status, responses[str(status)]["description"], openai)
            for status, response in responses.items():
                if "$ref" not in response:
                    response["headers"] = _headers(int(status)) | response.get("headers", {})
            operation["responses"] = dict(sorted(responses.items()))
    schemas["Problem"] = Problem.model_json_schema(ref_template=REF_TEMPLATE, mode="serialization")
    for replaced in ("HTTPValidationError", "ValidationError"):
        schemas.pop(replaced, None)


def _headers(status: int) -> dict[str, Any]:
    return {"X-Request-Id": {"$ref": "#/components/headers/RequestId"}} | _HEADERS.get(status, {})


def _errors(path: str, method: str, operation: dict[str, Any]) -> Iterator[int]:
    """The statuses that an operation can answer, besides those that it tells itself."""
    told = [int(status) for status in operation["responses"] if int(status) >= 400]
    yield from (status for status in told if status != 422 and path.startswith("/v1"))
    body, openai = "requestBody" in operation, OPENAI in operation.get("tags", ())
    if not operation.get("security"):
        return
    yield from (401, 403, 429, 503)
    if body:
        yield from (400, 408, 413)
        if openai:
            yield 415
    if not openai and (body or "parameters" in operation):
        yield 422
    elif "422" in operation["responses"]:
        del operation["responses"]["422"]
    if body or "{" in path or _requires_a_thing(operation):
        yield 404
    if method != "get" and not openai:
        yield 409


def _requires_a_thing(operation: dict[str, Any]) -> bool:
    return any(each["required"] and each["name"].endswith("_id") for each in operation.get("parameters", ()))


def _error(status: int, why: str, openai: bool) -> dict[str, Any]:
    content = {JSON if openai else PROBLEM: {"schema": _ref("ErrorResponse" if openai else "Problem")}}
    if openai and status in (408, 413, 429):  # the limits on bodies stand before the route
        content[PROBLEM] = {"schema": _ref("Problem")}
    return {"description": why, "content": content, "headers": _headers(status)}


def _ref(model: str) -> dict[str, str]:
    return {"$ref": REF_TEMPLATE.format(model=model)}
