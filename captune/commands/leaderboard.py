"""`captune leaderboard` and `captune compare`."""

import argparse
from collections.abc import Callable
from typing import Any

from captune import arguments, tables
from captune.client import Client
from captune.printing import note, say, say_json
from captune.terminal import client_of

FORMATS = ("table", "json", "csv", "markdown", "latex")
_FILTERS = ("metric", "split", "head", "model", "method", "captioner", "protocol", "tag", "order", "limit")


def leaderboard(args: argparse.Namespace) -> int:
    filters = {name: value for name in _FILTERS if (value := getattr(args, name)) is not None}
    if "shots" in args:
        filters["shots"] = args.shots or "full"
    filters["group_id"] = args.group
    format = "json" if args.json else args.format
    with client_of(args) as client:
        if args.watch:
            if format not in ("table", "json"):
                raise ValueError(f"--watch shows the table, or JSON; leave out --format {format}")
            for board in client.watch_leaderboard(args.dataset_id, **filters):
                if format == "json":
                    say_json(board, indent=None)
                else:
                    say("\n" + tables.leaderboard(board))
        elif format == "json":
            say_json(client.leaderboard(args.dataset_id, **filters))
        elif format == "table":
            say(tables.leaderboard(client.leaderboard(args.dataset_id, **filters)))
        else:
            text, more = client.leaderboard_text(args.dataset_id, format, **filters)
            say(text, end="")
            if more:
                note("there are more rows than these: --limit can be up to 1000, and --format json has all")
    return 0


def compare(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        a, b = row_ids(client, args, args.a, args.b)
        found = client.compare(args.dataset_id, a, b, split=args.split, head=args.head)
    if args.json:
        say_json(found)
    else:
        say(tables.comparison(found))
    return 0


def row_ids(client: Client, args: argparse.Namespace, *given: str) -> list[str]:
    """The ids whose beginnings were given. Raises ValueError where a beginning fits no row, or several."""
    rows = client.leaderboard(args.dataset_id, split=args.split, head=args.head).rows
    found = []
    for start in given:
        fitting = sorted((row.id for row in rows if row.id.startswith(start)), key=len)
        if not fitting:
            raise ValueError(f"no row's id begins with '{start}'; 'captune leaderboard {args.dataset_id}' shows them")
        if len({id.partition(".")[0] for id in fitting}) > 1:
            raise ValueError(f"'{start}' could be {', '.join(fitting[:5])}; give more of the id")
        found.append(fitting[0])  # what does not train has an id for each protocol's ranking; they are one row
    return found


def add(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    board = command(commands, "leaderboard", leaderboard, "every setting on a data set, ranked")
    board.add_argument("dataset_id")
    board.add_argument("--metric", help="what it is ranked by (default: top1)")
    _scored(board)
    board.add_argument(
        "--shots", type=arguments.shots, default=argparse.SUPPRESS,  # None is 'all'
        help="only rows of so many images per class, or 'all': of every image",
    )  # fmt: skip
    board.add_argument("--method")
    board.add_argument("--model")
    board.add_argument("--captioner")
    board.add_argument("--protocol", choices=["none", "few_shot", "full", "zero_shot"], help="of validation")
    board.add_argument("--tag")
    board.add_argument("--group", metavar="GROUP_ID", help="only the runs of one sweep")
    board.add_argument("--order", choices=["best", "asc", "desc"], help="default: best first")
    board.add_argument(
        "--limit", type=int,
        help="rows, up to 1000 (default: all; 1000 with --format csv, markdown or latex, 100 with --watch)",
    )  # fmt: skip
    board.add_argument("--format", choices=FORMATS, default="table")
    board.add_argument("--watch", action="store_true", help="again whenever it has changed, until Ctrl-C")
    pair = command(commands, "compare", compare, "two rows of a leaderboard, image by image")
    pair.add_argument("dataset_id")
    pair.add_argument("a", help="a row's id, or its beginning, as the leaderboard shows it")
    pair.add_argument("b")
    _scored(pair)


def _scored(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument(
        "--head", default="own", choices=["own", "zero_shot"], help="the classifier's own, or its text tower's"
    )
