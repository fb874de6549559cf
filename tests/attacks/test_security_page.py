"""SECURITY.md names the test that holds each promise: those tests exist; and every file of attacks is named, there or
in this folder's README."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def named() -> set[tuple[str, str]]:
    """(file, test) in order of the page; `::test_x` alone means the file named before it."""
    found, file = set(), ""
    for path, test in re.findall(r"(tests/[\w/]+\.py)?::(test_\w+)", (ROOT / "SECURITY.md").read_text()):
        file = path or file
        found.add((file, test))
    return found


def test_every_test_that_a_promise_names_exists() -> None:
    assert len(named()) > 40
    for file, test in named():
        tree = ast.parse((ROOT / file).read_text())
        assert test in {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }, f"{file} has no {test}"


def test_no_promise_is_without_a_test() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    table = page.split("| Promise | Test |")[1].split("\n\n")[0]
    rows = [row for row in table.splitlines()[2:] if row.startswith("|")]
    assert len(rows) > 15
    assert all("::test_" in row for row in rows)


def test_every_file_of_attacks_is_named() -> None:
    here = Path(__file__).parent
    pages = (ROOT / "SECURITY.md").read_text() + (here / "README.md").read_text()
    assert [file.name for file in here.glob("test_*.py") if file.name not in pages] == []
