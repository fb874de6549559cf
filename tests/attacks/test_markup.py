"""Texts of users that are markup somewhere else: in a browser (stored XSS), a spreadsheet, Markdown, LaTeX. The API
answers JSON and files, never pages; what shows them must escape them, and no browser may take them for a page."""

import csv
import io
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from services.captioner.transfer.export import Exported, as_csv
from services.captioner.transfer.parse import Entry, read
from shared.core import Core
from shared.db.models import Image
from shared.spreadsheet import defused, restored
from tests.attacks.belongings import belongings
from tests.integration.factories import add_classifier, add_dataset, png
from tests.integration.support import Api

SCRIPTS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "javascript:alert(1)",
    "{{constructor.constructor('alert(1)')()}}",
    "</textarea><script>",
]
FORMULAS = [
    "=1+1",
    "=cmd|'/C calc'!A0",
    "+1",
    "-1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\uff1d1+1",
    "'=1",
    "''=1",
    '=HYPERLINK("//x")',
]
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def assert_inert(answer: Any, content_type: str = "application/json") -> None:
    assert answer.headers["content-type"] == content_type
    for name, value in SAFE.items():
        assert answer.headers[name] == value, name
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "sandbox" in policy
    assert answer.headers["Cache-Control"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_comes_back_as_json_that_no_browser_runs(api: Api, core: Core, script: str) -> None:
    """In names, domains, class names, captions, tags, suffixes, key names and in what an error quotes."""
    classes = [{"name": "cat", "display_name": script}, {"name": "dog", "display_name": "dog"}]
    mine = belongings(core, caption=script, name=script, domain=script, classes=classes)
    add_classifier(core, mine.dataset, {"top1": 0.5}, suffix=script, tags=[script], model=script)
    quoted = 0
    for path in (
        "/v1/datasets",
        f"/v1/datasets/{mine.dataset}",
        f"/v1/datasets/{mine.dataset}/captions",
        f"/v1/captions/{mine.caption}",
        f"/v1/leaderboard?dataset_id={mine.dataset}",
        "/v1/classifiers",
    ):
        answer = api.anna.get(path)
        assert answer.status_code == 200
        assert_inert(answer)
        quoted += script in json.dumps(answer.json(), ensure_ascii=False).replace('\\"', '"')
    assert quoted == 6
    edited = api.anna.patch(f"/v1/captions/{mine.caption}", json={"text": f"{script} again"}, headers={"If-Match": "*"})
    assert_inert(edited)
    key = api.admin.post("/v1/keys", json={"owner": "anna", "name": script, "scopes": ["read"]})
    assert key.status_code == 201
    assert_inert(key)
    for refused in (
        api.anna.get(f"/v1/datasets/{script.replace('/', '')}"),
        api.anna.get("/v1/leaderboard", params={"dataset_id": mine.dataset, "metric": script}),
        api.anna.post("/v1/fine_tuning/jobs", json={"dataset_id": mine.dataset, "method": {"type": script}}),
        api.anna.post("/v1/evaluations", json={script: script}),
    ):
        assert refused.status_code in (404, 422)
        assert_inert(refused, "application/problem+json")


def test_every_answer_is_inert_whatever_its_kind(api: Api, core: Core, app: Any) -> None:
    mine = belongings(core)
    csv_type = "text/csv; charset=utf-8"
    for who, path, content_type in (
        (api.anna, f"/v1/images/{mine.image}/content", "image/png"),
        (api.anna, f"/v1/caption_jobs/{mine.caption_job}/export?format=csv", csv_type),
        (api.anna, f"/v1/caption_jobs/{mine.caption_job}/export?format=json", "application/json"),
        (api.anna, f"/v1/leaderboard?dataset_id={mine.dataset}&format=csv", csv_type),
        (api.anna, f"/v1/leaderboard?dataset_id={mine.dataset}&format=markdown", "text/markdown; charset=utf-8"),
        (api.anna, f"/v1/leaderboard?dataset_id={mine.dataset}&format=latex", "application/x-latex; charset=utf-8"),
        (api.anna, f"/v1/evaluations/{mine.evaluation}/predictions", "application/vnd.apache.parquet"),
        (api.nobody, "/v1/datasets", "application/problem+json"),
        (api.nobody, "/nothing", "application/problem+json"),
        (api.nobody, "/healthz", "application/json"),
    ):
        assert_inert(who.get(path), content_type)
    assert_inert(api.anna.put("/v1/datasets"), "application/problem+json")
    assert_inert(api.anna.post("/v1/evaluations", content=b"x" * 30_000), "application/problem+json")


def test_a_secret_is_not_kept_by_caches(api: Api) -> None:
    made = api.admin.post("/v1/keys", json={"owner": "anna", "scopes": ["read"]})
    assert made.headers["Cache-Control"] == "no-store"
    assert api.anna.get("/v1/datasets").headers["Cache-Control"] == "no-store"


def test_the_type_of_an_image_is_of_its_bytes_not_of_its_name(api: Api, core: Core) -> None:
    """Stored at ingestion from what was decoded; a row could say nothing else, so it is given a name that lies."""
    dataset = add_dataset(core)
    data = png(1) + b"<html><script>alert(1)</script>"
    with core.transaction() as session:
        image = {
            "dataset_id": dataset,
            "owner": "anna",
            "class_name": "cat",
            "split": "train",
            "width": 16,
            "height": 16,
        }
        digest = core.store.put_blob(data)
        row = Image(id="img_1", path="cat/x.html", sha256=digest, media_type="image/png", bytes=len(data), **image)
        session.add(row)
    answer = api.anna.get("/v1/images/img_1/content")
    assert answer.content == data
    assert_inert(answer, "image/png")
    assert answer.headers["Content-Disposition"] == 'inline; filename="img_1.png"'


def test_the_documentation_may_load_nothing_from_elsewhere(api: Api) -> None:
    for path in ("/docs", "/redoc"):
        answer = api.nobody.get(path)
        assert answer.status_code == 200
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "http" not in policy, "a host besides this one"


# -- spreadsheets ------------------------------------------------------------------------------------------------------


def assert_no_formula(text: str) -> list[list[str]]:
    rows = list(csv.reader(io.StringIO(text, newline="")))
    for cell in (cell for row in rows for cell in row):
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")), cell
    return rows


@pytest.mark.parametrize("formula", FORMULAS)
def test_no_cell_of_an_export_is_a_formula(api: Api, core: Core, formula: str) -> None:
    mine = belongings(core, caption=formula)
    answer = api.anna.get(f"/v1/caption_jobs/{mine.caption_job}/export", params={"format": "csv"})
    rows = assert_no_formula(answer.text)
    assert restored(rows[1][1]) == formula
    add_classifier(core, mine.dataset, {"top1": 0.5}, suffix=formula, model=formula, captioner=formula)
    assert_no_formula(api.anna.get("/v1/leaderboard", params={"dataset_id": mine.dataset, "format": "csv"}).text)


@given(st.text())
def test_what_is_written_for_a_spreadsheet_can_be_read_back(text: str) -> None:
    assert restored(defused(text)) == text
    assert not defused(text).startswith(tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"))


@given(
    path=st.text(st.sampled_from("=+-@'a/.\""), min_size=1, max_size=9).filter(lambda text: text.strip()),
    caption=st.text(st.sampled_from("=+-@'a,\"\n \uff1d"), min_size=1, max_size=9).filter(lambda text: text.strip()),
)
def test_an_export_is_imported_as_it_was(tmp_path_factory: pytest.TempPathFactory, path: str, caption: str) -> None:
    told = {"caption": caption, "characteristic": "=a", "flags": [], "excluded": False}
    file = tmp_path_factory.mktemp("csv") / "captions.csv"
    file.write_bytes(b"".join(as_csv([Exported(path, "x.txt", [told])])))
    (found,) = read(file, "csv")
    assert isinstance(found, Entry)
    assert (found.name, found.text, found.characteristic) == (path, caption.strip(), "=a")


# -- Markdown and LaTeX ------------------------------------------------------------------------------------------------

MARKUP = [
    *SCRIPTS,
    "[link](javascript:alert(1))",
    "![x](http://127.0.0.1/pixel.png)",
    "| a | b |\n|---|---|",
    r"\input{/etc/passwd}",
    r"\immediate\write18{id}",
    r"}\end{table}\write18{id}",
    "$\\catcode`\\%=12$",
    "%\n\\input{x}",
    "# heading",
    "<!-- -->",
    "https://evil.example",
]


@pytest.mark.parametrize("text", MARKUP)
def test_a_table_shows_a_users_text_and_runs_none(api: Api, core: Core, text: str) -> None:
    mine = belongings(core, name=text)
    add_classifier(core, mine.dataset, {"top1": 0.5}, suffix=text, model=text, captioner=text, method="tes")
    markdown = leaderboard(api.anna, mine.dataset, "markdown")
    for sign in ("<", "](", "!["):
        assert sign not in markdown
    widths = {line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "the table keeps its columns"
    assert "http://" not in markdown
    assert "https://" not in markdown
    latex = leaderboard(api.anna, mine.dataset, "latex")
    commands = {word for word in (part.split("{")[0].split(" ")[0] for part in latex.split("\\")[1:]) if word.isalpha()}
    assert commands & {"input", "write", "immediate", "catcode", "include", "openout", "def"} == set()
    assert latex.count(r"\end{table}") == 1


def leaderboard(who: TestClient, dataset_id: str, format: str) -> str:
    answer = who.get("/v1/leaderboard", params={"dataset_id": dataset_id, "format": format})
    assert answer.status_code == 200, answer.text
    return str(answer.text)
