"""What the runs of one data set came to: mean ± standard error over seeds, beside what the paper reports."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Final

from pydantic import BaseModel

from captune import tables
from captune.bench.data import Benchmark
from captune.bench.plan import Settings
from shared.schemas.evaluations import Evaluation
from shared.schemas.fine_tuning import FineTuningJob, Method

PAPER_NOTE: Final = (
    "paper: MMFT's accuracy as its authors report it (arXiv 2601.21426), measured on their own set-up; its model, "
    "captions and splits need not be those above, and shots are not stated: it stands in the rows of all of train"
)


class Row(BaseModel):
    """`mean` and `stderr` (ddof = 1; none under two runs) of top-1 on test, in %. `shots`: none for all of train, and
    for methods that see none. `runs`: scored, `missing`: failed, cancelled or unscored."""

    method: str
    shots: int | None
    trained_on: str
    mean: float | None
    stderr: float | None
    runs: int
    missing: int
    seeds: list[int]
    paper: float | None


class Result(BaseModel):
    """One data set. `error`: why there are no rows."""

    dataset: str
    title: str
    dataset_id: str | None = None
    group_id: str | None = None
    captioner: str | None = None
    notes: list[str] = []
    paper: float | None = None
    rows: list[Row] = []
    error: str | None = None


def rows(
    jobs: Iterable[FineTuningJob],
    evaluations: Mapping[str, Evaluation],
    known: Iterable[Method],
    settings: Settings,
    benchmark: Benchmark,
) -> list[Row]:
    """`jobs`: the runs that count. A run that was repeated after a failure counts once, by its score."""
    methods = {method.name: method for method in known}
    scores: dict[tuple[str, int | None], dict[tuple[int, int], float | None]] = {}
    for job in jobs:
        evaluation = evaluations.get(job.evaluation_id or "")
        top1 = None if evaluation is None else (evaluation.scores or {}).get("top1")
        of = scores.setdefault((job.method.type, job.shots), {})
        seed = (job.seed, job.shot_seed)
        of[seed] = of.get(seed) if top1 is None else 100.0 * top1
    order = {name: place for place, name in enumerate(settings.methods)}
    found = []
    for (name, shots), by_seed in sorted(
        scores.items(), key=lambda each: (math.inf if each[0][1] is None else each[0][1], order[each[0][0]])
    ):
        bare = methods[name].kind == "zero_shot" and not methods[name].needs_captions
        values = [value for value in by_seed.values() if value is not None]
        found.append(
            Row(
                method=name,
                shots=shots,
                trained_on="none" if bare else "all of train" if shots is None else f"{shots} per class",
                mean=fmean(values) if values else None,
                stderr=stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
                runs=len(values),
                missing=len(by_seed) - len(values),
                seeds=sorted({seed for (seed, _), value in by_seed.items() if value is not None}),
                paper=benchmark.paper if name == "mmft" and shots is None else None,
            )
        )
    return found


def table(result: Result, settings: Settings) -> str:
    reported = "not known here" if result.paper is None else f"{result.paper:.2f}"
    parts = [
        f"{result.title}: top-1 % on test, mean ± standard error over seeds; MMFT in the paper: {reported}",
        f"model {settings.model}, captions by {result.captioner or 'no model'}, validation {settings.validation}, "
        f"{settings.preset} preset",
    ]
    parts += [f"  {note}" for note in result.notes]
    if result.error is not None:
        return "\n".join([*parts, f"  failed: {result.error}"])
    body = [
        (
            row.trained_on,
            row.method,
            None if row.mean is None else _interval(row),
            row.runs,
            row.missing,
            None if row.paper is None else f"{row.paper:.2f}",
        )
        for row in result.rows
    ]
    return "\n".join([*parts, tables.table(("images", "method", "top-1", "runs", "missing", "paper"), body)])


def _interval(row: Row) -> str:
    stderr = "" if row.stderr is None else f" ± {row.stderr:.2f}"
    return f"{row.mean:.2f}{stderr}" + ("*" if _few(row) else "")


def _few(row: Row) -> bool:
    return row.trained_on != "none" and row.runs < 3


def report(results: Sequence[Result], settings: Settings) -> str:
    parts = [table(result, settings) for result in results]
    if any(_few(row) for result in results for row in result.rows):
        parts.append("* fewer than 3 runs: the standard error means little")
    return "\n\n".join([*parts, PAPER_NOTE])
