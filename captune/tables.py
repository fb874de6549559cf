"""Plain-text tables for the terminal."""

from collections.abc import Iterable, Sequence

from shared.schemas.evaluations import Leaderboard


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns padded to their widest cell; numbers to the right."""
    cells = [[("-" if cell is None else str(cell)) for cell in row] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) if cells else len(name) for i, name in enumerate(header)]
    numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, cells)])


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.replace(".", "", 1).replace("±", "").replace(" ", "").replace("*", "").isdigit()


def leaderboard(board: Leaderboard) -> str:
    """Fractions are shown as percentages; one table per validation protocol."""
    percent = board.metric not in ("nll",)
    scale, unit = (100.0, " %") if percent else (1.0, "")
    parts = [f"{board.dataset_name}: {board.metric}{unit} on {board.split}, mean ± standard error over seeds"]
    for protocol in dict.fromkeys(row.protocol for row in board.rows):
        rows = []
        for row in (r for r in board.rows if r.protocol == protocol):
            error = "" if row.stderr is None else f" ± {scale * row.stderr:.2f}"
            few = "*" if row.few_seeds else ""
            rows.append(
                (
                    row.rank,
                    row.method,
                    row.model,
                    _shots(row.shots, row.train_seconds),
                    f"{scale * row.mean:.2f}{error}{few}",
                    row.n,
                    f"{100 * row.metrics['top5']:.1f}" if "top5" in row.metrics else None,
                    f"{100 * row.metrics['macro_f1']:.1f}" if "macro_f1" in row.metrics else None,
                    f"{100 * row.metrics['ece']:.1f}" if "ece" in row.metrics else None,
                    f"{row.metrics['nll']:.3f}" if "nll" in row.metrics else None,
                    f"{row.train_seconds:.0f}" if row.train_seconds else None,
                )
            )
        header = ("#", "method", "model", "shots", board.metric, "runs", "top-5", "macro-F1", "ECE", "NLL", "train s")
        parts += ["", f"validation: {protocol}", table(header, rows)]
    if any(row.few_seeds for row in board.rows):
        parts += ["", "* fewer than 3 seeds: the standard error means little"]
    if not board.rows:
        parts += ["", "no scores yet: jobs are scored when they finish ('captune jobs list')"]
    return "\n".join(parts)


def _shots(shots: int | None, train_seconds: float | None) -> object:
    if shots is not None:
        return shots
    return "all" if train_seconds else 0
