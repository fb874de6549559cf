"""Plain-text tables for the terminal."""

from collections.abc import Iterable, Sequence

from captune.printing import printable
from shared.schemas.captions import Caption, CaptionPreview, CaptionReport
from shared.schemas.evaluations import Comparison, Leaderboard

TEXT_WIDTH = 60


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns padded to their widest cell; numbers to the right. No cell can be more than one line."""
    cells = [[("-" if cell is None else printable(str(cell))) for cell in row] for row in rows]
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
    scale, unit = (100.0, " %") if board.unit == "fraction" else (1.0, "")
    name = printable(board.dataset_name)
    parts = [f"{name}: {board.metric}{unit} on {board.split}, mean ± standard error over seeds"]
    header = ("#", "method", "model", "shots", board.metric, "runs", "", "ECE", "NLL", "train s", "captions s", "id")
    for changed, protocol in dict.fromkeys((row.data_changed, row.protocol) for row in board.rows):
        rows = []
        for row in (r for r in board.rows if (r.data_changed, r.protocol) == (changed, protocol)):
            error = "" if row.stderr is None else f" ± {scale * row.stderr:.2f}"
            few = "*" if row.few_seeds else ""
            rows.append(
                (
                    row.rank,
                    row.method if row.suffix is None else f"{row.method} ({row.suffix})",
                    row.model,
                    _shots(row.shots, row.train_seconds),
                    f"{scale * row.mean:.2f}{error}{few}",
                    row.n,
                    "≈" if row.tied_with_best else "",
                    f"{100 * row.metrics['ece']:.1f}" if "ece" in row.metrics else None,
                    f"{row.metrics['nll']:.3f}" if "nll" in row.metrics else None,
                    f"{row.train_seconds:.0f}" if row.train_seconds else None,
                    f"{row.caption_seconds:.0f}" if row.caption_seconds else None,
                    _short_id(row.id),
                )
            )
        title = f"validation: {protocol}"
        parts += ["", f"{title}; scored on what the data set was before" if changed else title, table(header, rows)]
    if any(row.tied_with_best for row in board.rows):
        parts += ["", "≈ not distinguishable from the best of its protocol at 95 %"]
    if any(row.few_seeds for row in board.rows):
        parts += ["", "* fewer than 3 seeds: the standard error means little"]
    if board.has_more:
        parts += ["", "there are more rows: raise --limit"]
    if not board.rows:
        parts += ["", "no scores yet: jobs are scored when they finish ('captune jobs list')"]
    return "\n".join(parts)


def _short_id(id: str) -> str:
    """Enough of the setting for `captune compare`, and what sets the row apart besides."""
    setting, dot, rest = id.partition(".")
    return f"{setting[:8]}" if not dot or rest in ("none", "few_shot", "full") else f"{setting}.{rest}"


def comparison(found: Comparison) -> str:
    """The two means, their difference with its interval, and what each alone got right."""
    rows = [
        ("a", f"{100 * found.mean_a:.2f} %"),
        ("b", f"{100 * found.mean_b:.2f} %"),
        ("a - b", f"{100 * found.difference:+.2f} points"),
        ("95 % interval", f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"),
        ("p-value", f"{found.p_value:.4f}"),
        ("only a right", f"{100 * found.only_a:.2f} % of the images"),
        ("only b right", f"{100 * found.only_b:.2f} % of the images"),
    ]
    text = [f"{found.metric} on {found.split}: {found.images:,} images, {found.pairs:,} pairs of runs"]
    text += [f"{name:<14} {value}" for name, value in rows]
    if found.pairs == 1:
        text.append("one run each: the interval is that of these two runs, not of other seeds")
    return "\n".join(text)


def _shots(shots: int | None, train_seconds: float | None) -> object:
    if shots is not None:
        return shots
    return "all" if train_seconds else 0


def captions(found: Iterable[Caption]) -> str:
    """One line per caption, the text cut to 60 characters; `*` marks an edited one."""
    header = ("id", "image", "characteristic", "tokens", "flags", "text")
    rows = []
    for c in found:
        flags = ["excluded"] * c.excluded + list(c.flags)
        text = _short(c.text) + ("" if c.original_text is None else " *")
        rows.append((c.id, c.path, c.characteristic, c.clip_tokens, ",".join(flags) or None, text))
    return table(header, rows)


def preview(found: CaptionPreview) -> str:
    """What a caption job would do, then the prompts of one image."""
    rows = [
        ("images", f"{found.images:,}"),
        ("captions", f"{found.captions:,}"),
        ("written before", f"{found.reusable:,}"),
        ("model calls", f"{found.model_calls:,}"),
        ("prompt tokens", _about(found.estimated_prompt_tokens)),
        ("completion tokens", _about(found.estimated_completion_tokens)),
        ("time", _duration(found.estimated_seconds)),
    ]
    if found.captions_per_second is not None:
        rows.append(("measured rate", f"{found.captions_per_second:.1f} captions/s"))
    parts = [f"{name:<18} {value}" for name, value in rows]
    parts += ["", printable(f"{found.path}, class {found.class_name}, called '{found.display_name}':")]
    for each in found.examples:
        parts += ["", f"-- {each.characteristic}", each.prompt]
        if each.text is not None:
            flags = f", {', '.join(each.flags)}" if each.flags else ""
            parts.append(f"-> {each.text}  [{each.clip_tokens} tokens{flags}]")
    return "\n".join(parts)


def caption_report(found: CaptionReport) -> str:
    """Counts, the histogram of lengths and one example per flag."""
    parts = [
        f"{found.caption_job_id}: {found.captions:,} captions of {found.images:,} images, "
        f"{found.excluded:,} excluded, {found.edited:,} edited",
        f"{found.words_mean:.1f} words on average; distinct-1 {found.distinct_1:.3f}, "
        f"distinct-2 {found.distinct_2:.3f} (of {found.distinct_sample:,} captions)",
    ]
    if found.agreement is not None:
        parts.append("agreement: " + ", ".join(f"{name} {value:.3f}" for name, value in found.agreement.items()))
    parts += ["", table(("characteristic", "captions"), found.characteristics.items())]
    most = max((each.captions for each in found.tokens), default=0)
    bins = [(f"{b.low}-{b.high}", b.captions, "#" * round(30 * b.captions / most)) for b in found.tokens if b.captions]
    parts += ["", table((f"tokens of {found.budget}", "captions", ""), bins)]
    if found.flags:
        rows = [(flag, n, _example(found.examples.get(flag))) for flag, n in found.flags.items()]
        parts += ["", table(("flag", "captions", "for example"), rows)]
    return "\n".join(parts)


def _example(found: Sequence[Caption] | None) -> str | None:
    return f"{found[0].id}: {_short(found[0].text)}" if found else None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= TEXT_WIDTH else text[: TEXT_WIDTH - 1] + "…"


def _about(count: int | None) -> str:
    return "not measured yet" if count is None else f"about {count:,}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not measured yet"
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"
