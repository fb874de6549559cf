"""`captune train`, `captune sweep`, `captune groups …` and `captune methods`."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any, get_args

from captune import arguments, tables
from captune.client import Client
from captune.printing import note, say, say_json
from captune.progress import ProgressBar
from captune.terminal import client_of, finish, show
from shared.schemas.common import Progress
from shared.schemas.fine_tuning import FineTuningJob, Group, Method, MethodSpec, Validation

PRESETS: tuple[str, ...] = get_args(MethodSpec.model_fields["preset"].annotation)
VALIDATION: tuple[str, ...] = get_args(Validation)


def train(args: argparse.Namespace) -> int:
    request: dict[str, Any] = {
        "model": args.model,
        "dataset_id": args.dataset_id,
        "caption_job_id": args.captions,
        "method": {"type": args.method, "preset": args.preset, "hyperparameters": dict(args.set)},
        "shots": args.shots,
        "shot_seed": args.shot_seed,
        "validation": args.validation,
        "checkpoints": args.checkpoints,
        "suffix": args.suffix,
        "tags": args.tag,
    }
    if args.exclude_flags is not None:
        request["exclude_flags"] = args.exclude_flags
    with client_of(args) as client:
        jobs = [client.train(seed=seed, **request) for seed in args.seeds]
        return max(finish(args, client, job, f"{args.method} seed {job.seed}") for job in jobs)


def sweep(args: argparse.Namespace) -> int:
    request: dict[str, Any] = {
        "models": args.models,
        "caption_job_ids": args.captions,
        "shots": args.shots,
        "seeds": args.seeds,
        "shot_seeds": args.shot_seeds,
        "validation": args.validation,
        "checkpoints": args.checkpoints,
        "suffix": args.suffix,
        "tags": args.tag,
    }
    if args.exclude_flags is not None:
        request["exclude_flags"] = args.exclude_flags
    with client_of(args) as client:
        request["methods"] = method_specs(client.methods(), args.methods, args.preset, args.set, args.grid)
        if args.group is None:
            group = client.sweep(dataset_id=args.dataset_id, name=args.name, **request)
        else:
            group = client.extend_group(args.group, **request)
        if not args.wait:
            return _print_group(args, client, group, board=False)
        group = _wait(client, group)
        soups = _soups(client, group) if args.soup else []
        if soups:
            group = _wait(client, group)
        return _print_group(args, client, group, board=True)


def method_specs(
    known: Iterable[Method],
    names: Sequence[str],
    preset: str,
    settings: Sequence[tuple[str, Any]],
    grid: Sequence[tuple[str, list[Any]]],
) -> list[dict[str, Any]]:
    """`METHOD.NAME` sets a hyperparameter of one method, `NAME` that of every method that has it; a grid multiplies a
    method by its values. Raises ValueError for what no method of the sweep has."""
    schemas = {method.name: method.hyperparameters.get("properties", {}) for method in known}
    axes = [(name, [value]) for name, value in settings] + [(name, list(values)) for name, values in grid]
    for full, _ in axes:
        method, dot, name = full.partition(".")
        if dot and method not in names:
            raise ValueError(f"'{full}': the sweep has no method '{method}'; it has {', '.join(names)}")
        if not dot and not any(method in schemas.get(each, {}) for each in names):
            raise ValueError(f"'{full}': none of {', '.join(names)} has such a hyperparameter; see 'captune methods'")
    specs = []
    for each in names:
        mine: dict[str, list[Any]] = {}
        for full, values in axes:
            method, dot, name = full.partition(".")
            if dot and method == each:
                mine[name] = values
            elif not dot and full in schemas.get(each, {}):
                mine.setdefault(full, values)
        for combination in product(*mine.values()):
            chosen = dict(zip(mine, combination, strict=True))
            specs.append({"type": each, "preset": preset, "hyperparameters": chosen})
    return specs


def _wait(client: Client, group: Group) -> Group:
    """Until all of it is final; what failed is told as it happens."""
    told: set[str] = set()
    with ProgressBar(group.name or group.id) as bar:

        def on_update(now: Group) -> None:
            ended = now.scored + sum(now.counts.get(status, 0) for status in ("failed", "cancelled"))
            eta = round(bar.seconds / ended * (now.runs - ended), 1) if ended else None
            bar(Progress(stage="runs", done=ended, total=now.runs, eta_seconds=eta))
            if now.counts.get("failed", 0) > len(told):
                for job in client.jobs("ft", group_id=now.id, status="failed"):
                    if job.id not in told and isinstance(job, FineTuningJob):
                        told.add(job.id)
                        bar.line(f"{job.id}  {job.method.type} failed: {job.error.message if job.error else ''}")

        return client.wait_group(group.id, on_update)


def _soups(client: Client, group: Group) -> list[FineTuningJob]:
    """One soup for each set of fine-tunes that may be averaged: of one model, on the same images."""
    trained = {method.name for method in client.methods() if method.kind == "fine_tune"}
    sets: dict[tuple[Any, ...], int] = {}
    for job in client.jobs("ft", group_id=group.id, status="succeeded"):
        assert isinstance(job, FineTuningJob)
        if job.method.type in trained and job.validation != "none":
            key = (job.model, job.shots or "all", job.shot_seed, job.validation)
            sets[key] = sets.get(key, 0) + 1
    names = ("model", "shots", "shot_seed", "validation")
    enough = [dict(zip(names, key, strict=True)) for key, count in sets.items() if count > 1]
    if not enough:
        note("no soup: it needs two fine-tunes of a model on the same images, validated")
    return [client.soup(group.id, **each) for each in enough]


def _print_group(args: argparse.Namespace, client: Client, group: Group, *, board: bool) -> int:
    found = client.leaderboard(group.dataset_id, group_id=group.id) if board else None
    if args.json:
        body = group.model_dump()
        say_json(body if found is None else {"group": body, "leaderboard": found.model_dump()})
    else:
        counts = ", ".join(f"{n} {status}" for status, n in group.counts.items())
        say(f"{group.id}  {group.status}: {counts}; {group.scored} scored")
        if found is not None:
            say(f"\n{tables.leaderboard(found)}")
    return 0 if group.counts.get("failed", 0) == 0 else 1


def groups_list(args: argparse.Namespace) -> int:
    filters = {"dataset_id": args.dataset_id} if args.dataset_id else {}
    with client_of(args) as client:
        show(args, client.groups(**filters), ("id", "name", "dataset_id", "status", "runs", "scored"))
    return 0


def groups_show(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        return _print_group(args, client, client.group(args.id), board=False)


def groups_cancel(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        _print_group(args, client, client.cancel_group(args.id), board=False)
    return 0


def methods(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        found = client.methods()
    if args.name is None:
        show(args, found, ("name", "kind", "needs_captions", "summary"))
        return 0
    chosen = next((method for method in found if method.name == args.name), None)
    if chosen is None:
        raise ValueError(f"there is no method '{args.name}'; there are: {', '.join(m.name for m in found)}")
    if args.json:
        say_json(chosen)
    else:
        say(_method(chosen))
    return 0


def _method(method: Method) -> str:
    rows = []
    for name, field in method.hyperparameters.get("properties", {}).items():
        preset = [f"{key}: {values[name]}" for key, values in method.presets.items() if name in values]
        rows.append((name, _text(field.get("default")), _range(field), field.get("unit"), "; ".join(preset) or None))
    notes = [
        f"  {name}: {field['description']}"
        for name, field in method.hyperparameters.get("properties", {}).items()
        if "description" in field
    ]
    parts = [f"{method.name} ({method.kind}): {method.summary}", method.source]
    if method.needs_captions:
        parts.append("reads captions: --captions cap_…")
    if rows:
        parts += ["", tables.table(("hyperparameter", "default", "range", "unit", "preset"), rows), "", *notes]
    return "\n".join(parts)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


_BOUNDS = (("minimum", "≥ "), ("exclusiveMinimum", "> "), ("maximum", "≤ "), ("exclusiveMaximum", "< "))


def _range(field: dict[str, Any]) -> str:
    """`≥ 1, ≤ 1000`; `a | b` for a choice."""
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field:
        parts = [_range(each) for each in field["anyOf"] if each.get("type") != "null"]
        return " or ".join(part for part in parts if part)
    bounds = [sign + _text(field[key]) for key, sign in _BOUNDS if key in field]
    return ", ".join(bounds) or str(field.get("type", ""))


# -- parser ------------------------------------------------------------------------------------------------------------


def assignment(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, the value as JSON where it is that."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    return name, _value(value)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _values(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE,VALUE,…")
    return name, [_value(part) for part in values.split(",")]


def add(
    commands: Any, command: Callable[..., argparse.ArgumentParser], waiting: Callable[[argparse.ArgumentParser], None]
) -> None:
    """`command(group, name, run, help)` makes a command with the common options; `waiting` adds --no-wait."""
    tune = command(commands, "train", train, "make a classifier; one job per seed")
    tune.add_argument("dataset_id")
    tune.add_argument("--method", default="mmft", help="see 'captune methods' (default: mmft)")
    tune.add_argument("--captions", metavar="CAPTION_JOB_ID", help="needed by methods that read captions")
    tune.add_argument("--model", default="starter")
    tune.add_argument("--shots", type=arguments.shots, help="training images per class, or 'all' (default: all)")
    tune.add_argument("--shot-seed", type=int, default=0)
    tune.add_argument(
        "--seeds", type=arguments.integers, default=[0], help="training seeds, comma-separated (default: 0)"
    )
    tune.add_argument(
        "--set", type=assignment, action="append", default=[], metavar="NAME=VALUE", help="hyperparameter; repeatable"
    )
    _add_common(tune)
    waiting(tune)

    many = command(commands, "sweep", sweep, "every combination of lists, as one group; then its leaderboard")
    many.add_argument("dataset_id")
    many.add_argument("--methods", type=arguments.names, default=["mmft"], help="comma-separated (default: mmft)")
    many.add_argument("--models", type=arguments.names, default=["starter"], help="comma-separated (default: starter)")
    many.add_argument(
        "--captions",
        type=arguments.names,
        default=[],
        metavar="CAPTION_JOB_IDS",
        help="for the methods that read captions",
    )
    many.add_argument(
        "--shots", type=arguments.shot_list, default=[None], help="numbers or 'all', comma-separated (default: all)"
    )
    many.add_argument("--seeds", type=arguments.integers, default=[0, 1, 2], help="comma-separated (default: 0,1,2)")
    many.add_argument("--shot-seeds", type=arguments.integers, help="each with each seed (default: each seed's own)")
    many.add_argument(
        "--set", type=assignment, action="append", default=[], metavar="[METHOD.]NAME=VALUE",
        help="hyperparameter, of one method or of all that have it; repeatable",
    )  # fmt: skip
    many.add_argument(
        "--grid", type=_values, action="append", default=[], metavar="[METHOD.]NAME=V1,V2,…",
        help="a run for each value; repeatable, multiplied out",
    )  # fmt: skip
    many.add_argument("--name", default="")
    many.add_argument("--group", metavar="GROUP_ID", help="extend this group by the combinations that it has not yet")
    many.add_argument("--soup", action="store_true", help="also average the fine-tunes of the same images, greedily")
    _add_common(many)
    waiting(many)

    groups = commands.add_parser("groups", help="what 'captune sweep' made").add_subparsers(
        required=True, metavar="COMMAND"
    )
    command(groups, "list", groups_list, "list groups").add_argument("--dataset-id")
    command(groups, "show", groups_show, "how a group's runs stand").add_argument("id")
    command(groups, "cancel", groups_cancel, "end the runs that are not final").add_argument("id")

    command(commands, "methods", methods, "ways of making a classifier, and their hyperparameters").add_argument(
        "name", nargs="?", help="show this one's hyperparameters"
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="default", choices=PRESETS, help="what hyperparameters not set are")
    parser.add_argument(
        "--exclude-flags",
        type=arguments.names,
        metavar="FLAGS",
        help="leave out captions with one of these, comma-separated ('' for none; default: those that are wrong or "
        "say nothing new)",
    )
    parser.add_argument("--validation", default="full", choices=VALIDATION, help="what chooses (default: full)")
    parser.add_argument(
        "--checkpoints", default="best", choices=["best", "best_and_last"], help="weights to keep (default: best)"
    )
    parser.add_argument("--suffix", help="part of the setting: tells rows of the leaderboard apart")
    parser.add_argument("--tag", action="append", default=[], help="to find runs by; repeatable")
