"""What Captune promises of every answer, as checks that schemathesis makes of each."""

import json
import os
from urllib.parse import urljoin

import requests
import schemathesis

OPENAI_PATHS = ("/v1/chat/", "/v1/models")  # errors as OpenAI's clients read them


@schemathesis.check
def an_error_is_a_problem(
    _: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    if response.status_code < 400 or case.path == "/readyz":
        return
    media_type = response.headers.get("content-type", [""])[0]
    body = json.loads(response.content)
    if case.path.startswith(OPENAI_PATHS) and media_type == "application/json":
        assert {"message", "type", "param", "code"} == set(body["error"]), body
        return
    assert media_type == "application/problem+json", f"{response.status_code} is told as {media_type}"
    assert body["status"] == response.status_code
    assert all(body[name] for name in ("title", "detail", "code")), body


@schemathesis.check
def the_headers_of_every_answer(
    _: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    assert response.headers.get("x-request-id"), "no X-Request-Id"
    assert response.headers.get("x-content-type-options") == ["nosniff"]
    assert "default-src 'none'" in response.headers.get("content-security-policy", [""])[0]
    if response.status_code == 401:
        assert response.headers.get("www-authenticate"), "401 without WWW-Authenticate"
    if response.status_code == 405:
        declared = {method.upper() for method in case.operation.schema[case.operation.path]}
        allowed = {method.strip() for method in response.headers["allow"][0].split(",")}
        assert allowed == declared, f"Allow: {allowed}, and the document has {declared}"
    if response.status_code in (429, 503) and case.path != "/readyz":
        assert response.headers["retry-after"][0].isdigit()


@schemathesis.check
def what_was_made_is_where_the_answer_says(
    _: schemathesis.CheckContext, response: schemathesis.Response, __: schemathesis.Case
) -> None:
    if response.status_code not in (201, 202) or "location" not in response.headers:
        return
    url = urljoin(str(response.request.url), response.headers["location"][0])
    found = requests.get(url, headers={"Authorization": response.request.headers["Authorization"]}, timeout=10)
    assert found.status_code == 200, f"{url}: {found.status_code}"


@schemathesis.check
def nothing_of_the_inside(_: schemathesis.CheckContext, response: schemathesis.Response, __: schemathesis.Case) -> None:
    if response.status_code < 400:
        return
    text = response.text.lower()
    for sign in (
        "traceback",
        "psycopg",
        "sqlalchemy",
        "site-packages",
        "select ",
        "file://",
        "redis://",
        "postgresql://",
    ):
        assert sign not in text, f"the answer tells of {sign!r}"


@schemathesis.hook
def before_call(_: schemathesis.HookContext, case: schemathesis.Case, __: dict) -> None:
    """The run's own key must outlive it."""
    if case.path == "/v1/keys/{id}" and case.path_parameters.get("id") == os.environ["CAPTUNE_SCHEMATHESIS_KEY_ID"]:
        case.path_parameters["id"] = "key_of_nobody"
