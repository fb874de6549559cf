"""`captune`: the command line. Exit codes: 0 done, 1 the server refused or a job did not succeed, 2 wrong usage,
3 no server, 130 interrupted."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from captune import local, tables
from captune.commands import bench, captions, evaluation, keys, leaderboard, training
from captune.connection import default_state_dir
from captune.errors import CaptuneAPIError, ConnectionNotFound
from captune.printing import note, say, say_json
from captune.progress import ProgressBar
from captune.terminal import client_of, finish, show
from shared.schemas.common import JobEvent, JobResource

Command = Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    try:
        sys.exit(args.run(args))
    except CaptuneAPIError as error:
        _fail(1, error.detail)
    except (ConnectionNotFound, httpx.TransportError) as error:
        where = "" if isinstance(error, ConnectionNotFound) else "the server does not answer: "
        _fail(3, f"{where}{error}")
    except ValidationError as error:
        _fail(2, "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()))
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        _fail(2, str(error))
    except KeyboardInterrupt:
        _fail(130, "interrupted; jobs already submitted go on")
    except BrokenPipeError:
        sys.exit(0)


def _fail(code: int, message: str) -> None:
    note(f"captune: {message}")
    sys.exit(code)


# -- commands ----------------------------------------------------------------------------------------------------------


def datasets_push(args: argparse.Namespace) -> int:
    fields = {k: getattr(args, k) for k in ("split_seed", "val_fraction", "test_fraction")}
    fields = {k: v for k, v in fields.items() if v is not None}
    with client_of(args) as client:
        job = client.push(args.path, name=args.name or args.path.stem, domain=args.domain, **fields)
        code = finish(args, client, job, "ingest")
        report = (client.job(job.id).model_dump().get("report") or {}) if args.wait else {}
    for notice in report.get("notices", []):
        note(f"note: {notice['message']}")
    for refusal in report.get("refusals", [])[:20]:
        note(f"refused: {refusal['path']}: {refusal['message']}")
    return code


def datasets_list(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        show(args, client.datasets(), ("id", "name", "domain", "status"))
    return 0


def datasets_rename_classes(args: argparse.Namespace) -> int:
    display_names: dict[str, Any] = {}
    for names in args.names:
        display_names |= names
    with client_of(args) as client:
        dataset = client.update_dataset(args.id, display_names=display_names)
    if args.json:
        say_json(dataset)
    else:
        say(tables.table(("name", "display_name"), [(c.name, c.display_name) for c in dataset.classes or []]))
    return 0


def datasets_rm(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        client.delete_dataset(args.id)
    return 0


def jobs_list(args: argparse.Namespace) -> int:
    kinds = [args.kind] if args.kind else ["ds", "cap", "ft", "eval"]
    filters = {k: v for k, v in (("dataset_id", args.dataset_id), ("status", args.status)) if v}
    with client_of(args) as client:
        show(args, [job for kind in kinds for job in client.jobs(kind, **filters)], ("id", "status", "attempt"))
    return 0


def jobs_show(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        show(args, client.job(args.id))
    return 0


def jobs_watch(args: argparse.Namespace) -> int:
    with client_of(args) as client, ProgressBar(args.id) as bar:
        for update in client.watch(args.id):
            if args.json:
                say_json(update, indent=None)
            elif isinstance(update, JobResource):
                bar.line(f"{update.id}  {update.status}" + (f": {update.error.message}" if update.error else ""))
            elif isinstance(update, JobEvent):
                bar.line(f"{update.seq:>4}  {update.type}: {update.message}")
            else:
                bar(update)
        assert isinstance(update, JobResource)
        return 0 if update.status == "succeeded" else 1


def jobs_act(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        job = getattr(client, args.action)(args.id)
    if args.json:
        say_json(job)
    else:
        say(f"{job.id}  {job.status}")
    return 0


# -- parser ------------------------------------------------------------------------------------------------------------


def _class_names(text: str) -> dict[str, Any]:
    """`CODE=NAME`, or a JSON file of many."""
    code, equals, name = text.partition("=")
    if equals:
        return {code: name}
    try:
        found = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' is neither CODE=NAME nor a JSON file ({error})") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object of display names by class name")
    return found


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--url", help="the server (default: CAPTUNE_URL, else the local one)")
    common.add_argument("--api-key", help="default: CAPTUNE_API_KEY, else the local one's")
    common.add_argument("--state-dir", type=Path, help=f"of the local server (default: {default_state_dir()})")
    common.add_argument("--json", action="store_true", help="print JSON")

    top = argparse.ArgumentParser(prog="captune", description="From labelled images to a better CLIP classifier.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(group: Any, name: str, run: Command, help: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = group.add_parser(name, parents=[common], help=help, description=help)
        parser.set_defaults(run=run)
        return parser

    def local_command(name: str, run: Command, help: str, state_dir: str) -> argparse.ArgumentParser:
        """Of this machine alone. An option that names another server must not be taken and then ignored."""
        parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
        parser.add_argument("--state-dir", type=Path, help=f"{state_dir} (default: {default_state_dir()})")
        parser.set_defaults(run=run)
        return parser

    def waiting(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--no-wait", dest="wait", action="store_false", help="do not wait for the job's end")

    own = "where this machine's server keeps all it has"
    up = local_command("up", local.up, "start everything on this machine, until Ctrl-C", own)
    up.add_argument("--port", type=int, default=8000, help="0 chooses a free one (default: 8000)")
    demo = local_command("demo", local.demo, "run the main job on the sample pictures", own)
    demo.add_argument("--port", type=int, default=0, help="default: a free one")

    collect = local_command(
        "collect", local.collect, "remove what nothing needs any more from this machine's server", own
    )
    collect.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    backup = local_command(
        "backup", local.backup, "copy all that this machine's server must not lose into a folder", own
    )
    backup.add_argument("folder", type=Path, help="a new one")
    restore = local_command(
        "restore",
        local.restore,
        "make a state directory from a backup, and check it",
        "where to restore to, a new or an empty folder",
    )
    restore.add_argument("folder", type=Path, help="the backup")

    datasets = commands.add_parser("datasets", help="labelled images").add_subparsers(required=True, metavar="COMMAND")
    push = command(datasets, "push", datasets_push, "upload a folder or an archive")
    push.add_argument("path", type=Path)
    push.add_argument("--name", help="default: the file's or folder's")
    push.add_argument("--domain", required=True, help="what the images are of: pets, birds, satellite, …")
    push.add_argument("--split-seed", type=int)
    push.add_argument("--val-fraction", type=float)
    push.add_argument("--test-fraction", type=float)
    waiting(push)
    command(datasets, "list", datasets_list, "list data sets")
    command(datasets, "show", jobs_show, "classes, counts and the report of what was refused").add_argument("id")
    rename = command(datasets, "rename-classes", datasets_rename_classes, "what prompts call classes named by a code")
    rename.add_argument("id")
    rename.add_argument("names", nargs="+", type=_class_names, metavar="CODE=NAME", help="or a JSON file of many")
    command(datasets, "rm", datasets_rm, "delete a data set").add_argument("id")

    captions.add(commands, command, waiting)
    training.add(commands, command, waiting)
    evaluation.add(commands, command, waiting)
    bench.add(commands, command)

    jobs = commands.add_parser("jobs", help="jobs of every kind").add_subparsers(required=True, metavar="COMMAND")
    listing = command(jobs, "list", jobs_list, "list jobs")
    listing.add_argument("--kind", choices=["ds", "cap", "ft", "eval"])
    listing.add_argument("--dataset-id")
    listing.add_argument("--status")
    command(jobs, "show", jobs_show, "one job").add_argument("id")
    command(jobs, "watch", jobs_watch, "events and progress until the job ends").add_argument("id")
    for action in ("cancel", "pause", "resume"):
        act = command(jobs, action, jobs_act, f"{action} a job")
        act.add_argument("id")
        act.set_defaults(action=action)

    leaderboard.add(commands, command)

    keys.add(commands, command)
    return top


if __name__ == "__main__":
    main()
