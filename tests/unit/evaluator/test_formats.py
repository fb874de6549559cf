"""The leaderboard as CSV, Markdown and LaTeX: what users wrote stays text."""

import csv
import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.evaluator.board.formats import escape_latex, escape_markdown, to_csv, to_latex, to_markdown
from shared.schemas.evaluations import Leaderboard, LeaderboardRow
from shared.spreadsheet import restored

TEXTS = st.text(
    st.one_of(st.sampled_from(list("\\`*_{}[]()#+-.!|<>&~^$%\"'=@\n\t\r\v :/0a")), st.characters(codec="utf-8")),
    max_size=40,
)


def row(**values: Any) -> LeaderboardRow:
    defaults: dict[str, Any] = {
        **{"id": "s1", "rank": 1, "protocol": "full", "method": "mmft", "model": "starter", "captions": None},
        **{"captioner": None, "shots": 8, "hyperparameters": {"lr": 1e-5}, "suffix": None, "tags": ["a"]},
        **{"pinned": False, "data_changed": False, "n": 3, "mean": 0.70523, "stderr": 0.0123, "few_seeds": False},
        **{"tied_with_best": None, "metrics": {"top1": 0.7}, "train_seconds": 12.4, "caption_seconds": None},
        "classifier_ids": ["clf_1"],
    }
    return LeaderboardRow.model_validate(defaults | values)


def board(*rows: LeaderboardRow, **values: Any) -> Leaderboard:
    defaults: dict[str, Any] = {
        **{"dataset_id": "ds_1", "dataset_name": "pets", "data_fingerprint": "f", "split": "test", "metric": "top1"},
        **{"unit": "fraction", "higher_is_better": True, "has_more": False, "last_id": None},
    }
    return Leaderboard.model_validate(defaults | values | {"rows": list(rows)})


def words(text: str) -> str:
    """What is left of a text on one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# -- CSV ---------------------------------------------------------------------------------------------------------------


@given(TEXTS, TEXTS)
def test_no_cell_of_a_csv_is_a_formula_and_all_can_be_read_back(suffix: str, model: str) -> None:
    text = to_csv(board(row(suffix=suffix, model=model)))
    (found,) = csv.DictReader(io.StringIO(text, newline=""))
    for name, cell in (("suffix", suffix), ("model", model)):
        assert not found[name].startswith(tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"))
        assert restored(found[name]) == cell
    assert found["hyperparameters"] == '{"lr": 1e-05}'


# -- Markdown ----------------------------------------------------------------------------------------------------------


def shown_by_markdown(text: str) -> str:
    """By the rules for inline text: a backslash makes any ASCII punctuation a character; entities are characters."""
    text = re.sub(r"\\([!-/:-@\[-`{-~])", lambda found: chr(0xE000 + ord(found[1])), text)
    assert not re.search(r"[\\`*_\[\]()<>|~]", text), "markup is left"
    for name, character in (("lt", "<"), ("gt", ">"), ("amp", "&")):
        text = text.replace(f"&{name};", character)
    return "".join(chr(ord(c) - 0xE000) if 0xE021 <= ord(c) <= 0xE07E else c for c in text)


@given(TEXTS.filter(lambda text: not re.search("[\ue000-\ue100]", text)))
def test_markdown_shows_the_text(text: str) -> None:
    assert shown_by_markdown(escape_markdown(text)) == words(text)


@given(TEXTS, TEXTS)
def test_a_markdown_table_keeps_its_columns(suffix: str, name: str) -> None:
    text = to_markdown(board(row(suffix=suffix), row(rank=2, model=suffix), dataset_name=name))
    lines = text.split("\n")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table} == {10}
    assert len(text.splitlines()) == len(lines) - 1


def test_markdown_marks() -> None:
    text = to_markdown(
        board(
            row(),
            row(rank=2, tied_with_best=True, mean=0.7),
            row(rank=3, n=2, few_seeds=True, mean=0.6),
            row(rank=None, data_changed=True, stderr=None, n=1, mean=0.9, shots=None, train_seconds=None),
        )
    )
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert "| **70.52 ± 1.23** | 3 | 12 |" in lines[2]
    assert "| 70.00 ± 1.23 ≈ |" in lines[3]
    assert "| 60.00 ± 1.23* |" in lines[4]
    assert lines[5].startswith("| † | full | mmft | starter |  | 0 | 90.00 | 1 |")


# -- LaTeX -------------------------------------------------------------------------------------------------------------

COMMANDS = {
    **{"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<", "textgreater": ">"},
    **{"textbar": "|", "textquotedbl": '"', "textasciigrave": "`", "textquotesingle": "'"},
}


def shown_by_latex(text: str) -> str:
    """What TeX would set; fails at anything that is not plain text."""
    out, rest = "", text
    while rest:
        if command := re.match(r"\\([a-z]+)\{\}", rest):
            out += COMMANDS[command[1]]
        elif command := re.match(r"\\([{}$&#%_])", rest):
            out += command[1]
        elif command := re.match(r"-\{\}(?=-)", rest):
            out += "-"
        else:
            command = re.match(r"[^\\{}$&#%_~^<>|\"`']", rest)
            assert command is not None, rest
            assert not rest.startswith("--")
            out += command[0]
        rest = rest[command.end() :]
    return out


@given(TEXTS)
def test_latex_shows_the_text(text: str) -> None:
    assert shown_by_latex(escape_latex(text)) == words(text)


@given(TEXTS, TEXTS)
def test_a_latex_table_keeps_its_columns_and_braces(suffix: str, name: str) -> None:
    text = to_latex(board(row(suffix=suffix), row(rank=2, model=suffix), dataset_name=name))
    bare = re.sub(r"\\.", "", text.replace("\\\\", ""))
    assert bare.count("{") == bare.count("}")
    body = [line for line in text.split("\n") if line.endswith(r" \\")]
    assert len(body) == 3
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {8}


def test_latex_marks() -> None:
    text = to_latex(
        board(
            row(),
            row(rank=2, tied_with_best=True, mean=0.7),
            row(protocol="none", rank=1),
            row(protocol="none", rank=None, data_changed=True),
        )
    )
    assert r"\textbf{70.52 $\pm$ 1.23}" in text
    assert r"\underline{70.00 $\pm$ 1.23}" in text
    assert text.count(r"\midrule") == 3
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")


@pytest.mark.parametrize(("write", "lines"), [(to_csv, 1), (to_markdown, 6), (to_latex, 9)])
def test_no_rows(write: Any, lines: int) -> None:
    assert len(write(board()).splitlines()) == lines


def test_other_units_are_not_percentages() -> None:
    assert "| **1.25 ± 0.02** |" in to_markdown(board(row(mean=1.25, stderr=0.02), metric="nll", unit="nats"))
