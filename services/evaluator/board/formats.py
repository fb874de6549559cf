"""The leaderboard as CSV, as a Markdown table and as a LaTeX table. The texts in it are users': each format escapes
what it would take for markup."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator

from shared.schemas.evaluations import Leaderboard, LeaderboardRow
from shared.spreadsheet import defused

_LATEX = {
    **{"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"},
    **{"|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}"},
}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:$@^=])")  # a backslash before any ASCII punctuation is no markup


def to_csv(board: Leaderboard) -> str:
    """One line per row; lists and objects as JSON. A spreadsheet must not run a user's text as a formula."""
    names = list(LeaderboardRow.model_fields)
    out = io.StringIO()
    writer = csv.DictWriter(out, ["dataset_id", "split", "metric", *names])
    writer.writeheader()
    for row in board.rows:
        cells = {name: _cell(value) for name, value in row.model_dump().items()}
        writer.writerow({"dataset_id": board.dataset_id, "split": board.split, "metric": board.metric, **cells})
    return out.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, (dict, list)):
        return json.dumps(value, sort_keys=True)
    return defused(value) if isinstance(value, str) else value


def to_markdown(board: Leaderboard) -> str:
    """One table; the best of each protocol bold, what is tied with it marked."""
    header = _header(board)
    lines = [
        f"{escape_markdown(board.dataset_name)}: {escape_markdown(_title(board))}",
        "",
        "| " + " | ".join(map(escape_markdown, header)) + " |",
        "|" + "|".join("---:" if name in _NUMBERS else "---" for name in header[:-3]) + "|---:|---:|---:|",
    ]
    for row, cells in _cells(board, escape_markdown):
        cells[-3] = f"**{cells[-3]}**" if row.rank == 1 else cells[-3]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", escape_markdown(_LEGEND), ""])


def to_latex(board: Leaderboard) -> str:
    r"""A `table` for \usepackage{booktabs} and \usepackage[T1]{fontenc}; the best of each protocol bold, what is tied
    with it underlined; a rule between protocols."""
    header = _header(board)
    align = "".join("r" if name in _NUMBERS else "l" for name in header[:-3]) + "rrr"
    caption = escape_latex(f"{board.dataset_name}: {_title(board)}. {_LATEX_LEGEND}")
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{caption}}}",
        rf"  \begin{{tabular}}{{{align}}}",
        r"    \toprule",
        "    " + " & ".join(map(escape_latex, header)) + r" \\",
    ]
    before = None
    for row, cells in _cells(board, escape_latex, mark=""):
        if (row.protocol, row.data_changed) != before:
            lines.append(r"    \midrule")
            before = (row.protocol, row.data_changed)
        cells[-3] = cells[-3].replace("±", r"$\pm$")
        if row.rank == 1:
            cells[-3] = rf"\textbf{{{cells[-3]}}}"
        elif row.tied_with_best:
            cells[-3] = rf"\underline{{{cells[-3]}}}"
        lines.append("    " + " & ".join(cells) + r" \\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def escape_latex(text: str) -> str:
    """Text that prints as it is, on one line; two hyphens are no dash."""
    return re.sub("-(?=-)", "-{}", "".join(_LATEX.get(each, each) for each in _one_line(text)))


def escape_markdown(text: str) -> str:
    """Text that shows as it is in a cell of a table, by CommonMark and GitHub's dialect; no HTML, no link."""
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", text)


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


_NUMBERS = ("#", "shots")
_LEGEND = (
    "mean ± standard error over seeds; ≈ not distinguishable from the best at 95 %; * fewer than 3 seeds; † scored on "
    "what the data set was before"
)
_LATEX_LEGEND = (
    "Mean ± standard error over seeds. Bold: best; underlined: not distinguishable from it at 95 %; *: fewer than 3 "
    "seeds; †: scored on what the data set was before."
)


def _title(board: Leaderboard) -> str:
    unit = "%" if board.unit == "fraction" else board.unit
    return f"{board.metric} ({unit}) on {board.split}"


def _header(board: Leaderboard) -> list[str]:
    return ["#", "validation", "method", "model", "captioner", "shots", board.metric, "seeds", "train s"]


def _cells(
    board: Leaderboard, escape: Callable[[str], str], mark: str = " ≈"
) -> Iterator[tuple[LeaderboardRow, list[str]]]:
    for row in board.rows:
        method = row.method if row.suffix is None else f"{row.method} ({row.suffix})"
        shots = "0" if not row.train_seconds and row.shots is None else str(row.shots or "all")
        texts = [
            *("†" if row.rank is None else str(row.rank), row.protocol, method, row.model, row.captioner or "", shots),
        ]
        value = shown(row.mean, row.stderr, board.unit) + ("*" if row.few_seeds else "")
        seconds = "" if row.train_seconds is None else f"{row.train_seconds:.0f}"
        yield row, [*map(escape, texts), value + (mark if row.tied_with_best else ""), str(row.n), seconds]


def shown(mean: float, stderr: float | None, unit: str) -> str:
    """`70.52 ± 1.23`, fractions as percentages."""
    scale = 100.0 if unit == "fraction" else 1.0
    return f"{scale * mean:.2f}" + ("" if stderr is None else f" ± {scale * stderr:.2f}")
