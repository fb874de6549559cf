"""Path tricks in ids, names, filters and downloads: an id is looked for among rows, and no text of a user's is ever a
path or a header of ours."""

import io
import re
import socket
import zipfile
from pathlib import Path
from urllib.parse import quote

import pytest

from shared.core import Core
from shared.store.disk import DiskStore
from tests.attacks.belongings import belongings
from tests.integration.factories import archive
from tests.integration.support import Api

TRICKS = [
    "..",
    ".",
    "../../../etc/passwd",
    "..\\..\\windows\\win.ini",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "%252e%252e%252f",
    "/etc/passwd",
    "C:\\boot.ini",
    "\\\\host\\share",
    "file:///etc/passwd",
    "ds_\x00.png",
    "ds_\r\nSet-Cookie: a=b",
    "\u202egnp.exe",
    "\uff0e\uff0e\uff0fetc",
    "ds_" + "a" * 5000,
    "'; DROP TABLE jobs; --",
    "${jndi:ldap://127.0.0.1/a}",
    "{{7*7}}",
]
ROUTES = [
    "/v1/datasets/{}",
    "/v1/datasets/{}/images",
    "/v1/datasets/{}/captions",
    "/v1/images/{}/content",
    "/v1/captions/{}",
    "/v1/caption_jobs/{}/export",
    "/v1/caption_jobs/{}/report",
    "/v1/fine_tuning/jobs/{}/events",
    "/v1/fine_tuning/groups/{}",
    "/v1/classifiers/{}",
    "/v1/classifiers/{}/download",
    "/v1/evaluations/{}/predictions",
]


@pytest.mark.parametrize("route", ROUTES)
def test_an_id_is_no_path(api: Api, route: str) -> None:
    for trick in TRICKS:
        for sent in (quote(trick, safe=""), quote(trick, safe="/\\:")):
            if sent.strip("./") == "":
                continue  # the client itself resolves these
            answer = api.anna.get(route.format(sent))
            assert answer.status_code in (404, 422), f"{route.format(sent)}: {answer.status_code}"
            assert answer.headers["content-type"] == "application/problem+json"
            assert "root:" not in answer.text
            assert "set-cookie" not in answer.headers


def test_dots_that_a_client_did_not_resolve(base_url: str, api: Api) -> None:
    """Sent as they are, over a socket."""
    host, port = base_url.removeprefix("http://").split(":")
    key = api.anna.headers["authorization"]
    for path in (
        "/v1/images/../../etc/passwd",
        "/v1/images/..%2f..%2fetc%2fpasswd/content",
        "//etc/passwd",
        "/v1//datasets",
    ):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            request = f"GET {path} HTTP/1.1\r\nHost: evil.example\r\nAuthorization: {key}\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode())
            answer = connection.makefile("rb").read().decode()
        assert answer.startswith("HTTP/1.1 404"), (path, answer)
        assert "evil.example" not in answer, "an answer repeats the Host that it was sent"


def test_no_answer_leads_to_the_host_that_was_named(api: Api) -> None:
    """A path with a slash too many is not found; a redirect would be to wherever the Host header says."""
    for path in ("/v1/datasets/", "/v1/leaderboard/", "/healthz/"):
        answer = api.anna.get(path, headers={"Host": "evil.example"}, follow_redirects=False)
        assert answer.status_code == 404
        assert "location" not in answer.headers
    form = {"name": "pets", "domain": "pets"}
    made = api.anna.post(
        "/v1/datasets", data=form, files={"file": ("a.zip", archive())}, headers={"Host": "evil.example"}
    )
    assert made.headers["Location"] == f"/v1/datasets/{made.json()['id']}"


def test_filters_are_values(api: Api, core: Core) -> None:
    mine = belongings(core)
    assert api.anna.get(f"/v1/datasets/{mine.dataset}/images").json()["data"]
    for trick in TRICKS:
        for path, name in (
            (f"/v1/datasets/{mine.dataset}/images", "class_name"),
            (f"/v1/datasets/{mine.dataset}/captions", "class_name"),
            (f"/v1/datasets/{mine.dataset}/captions", "characteristic"),
            ("/v1/classifiers", "tag"),
            ("/v1/classifiers", "group_id"),
            ("/v1/evaluations", "dataset_id"),
        ):
            answer = api.anna.get(path, params={name: trick})
            assert answer.status_code in (200, 422), answer.text
            if answer.status_code == 200:
                assert answer.json()["data"] == [], f"{name}={trick!r}"


@pytest.mark.parametrize(
    "name", ['x"; filename="evil.exe', "a\r\nSet-Cookie: a=b", "../../etc/passwd", "猫\u202egnp.exe", "\\", "%00"]
)
def test_a_name_is_no_part_of_a_header(api: Api, core: Core, name: str) -> None:
    mine = belongings(core, name=name)
    for path, kind in {
        f"/v1/caption_jobs/{mine.caption_job}/export?format=csv": "attachment",
        f"/v1/evaluations/{mine.evaluation}/predictions": "attachment",
        f"/v1/images/{mine.image}/content": "inline",
    }.items():
        answer = api.anna.get(path)
        assert answer.status_code == 200, answer.text
        assert re.fullmatch(kind + r'; filename="[A-Za-z0-9_-]+\.[a-z]+"', answer.headers["Content-Disposition"])
        assert "set-cookie" not in answer.headers


def test_names_inside_an_export_stay_below_the_folder_it_is_unpacked_in(api: Api, core: Core) -> None:
    """Image paths were checked when the archive came in; a sidecar has its image's."""
    mine = belongings(core)
    answer = api.anna.get(f"/v1/caption_jobs/{mine.caption_job}/export", params={"format": "txt"})
    for name in zipfile.ZipFile(io.BytesIO(answer.content)).namelist():
        assert not name.startswith(("/", "\\"))
        assert ".." not in name.split("/")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../b", "uploads/.."])
def test_the_store_itself_takes_no_key_that_climbs(tmp_path: Path, key: str) -> None:
    store = DiskStore(tmp_path)
    with pytest.raises(ValueError, match="bad storage key"):
        store.put_bytes(key, b"")
