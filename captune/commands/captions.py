"""`captune caption` and `captune captions …`."""

import argparse
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from captune import arguments, tables
from captune.printing import note, say, say_json
from captune.terminal import client_of, finish, show
from shared.schemas.captions import FLAGS, TransferFormat

FORMATS: tuple[str, ...] = get_args(TransferFormat)
_SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".zip": "txt"}
_SAME_NAME = (  # options that are fields of the request under the same name
    "dataset_id", "engine", "words", "domain", "split", "shot_seed", "seed", "limit", "temperature",
    "clip_model", "shear_tokens", "reasks",
)  # fmt: skip


def request_of(args: argparse.Namespace) -> dict[str, Any]:
    """The caption job asked for. What was not said is left to the server: with --redo, that is the earlier job's."""
    request = {name: value for name in _SAME_NAME if (value := getattr(args, name)) is not None}
    if args.samples is not None:
        request["samples_per_prompt"] = args.samples
    if args.overwrite:
        request["mode"] = "overwrite"
    if args.agreement:
        request["agreement"] = True
    if args.language is not None:
        request["language"] = None if args.language == "any" else args.language
    if "shots" in args:
        request["shots"] = args.shots
    if args.characteristics or args.template:
        own = [{"name": name, "template": text} for name, text in args.template]
        request["characteristics"] = args.characteristics + own
    selection = {"caption_ids": args.redo_caption, "class_name": args.redo_class, "flag": args.redo_flag}
    if args.redo_excluded:
        selection["excluded"] = True
    selection = {name: value for name, value in selection.items() if value is not None}
    if args.redo is not None:
        request["redo"] = {"caption_job_id": args.redo, **selection}
    elif selection:
        raise ValueError(
            "--redo-caption, --redo-class, --redo-flag and --redo-excluded select among the captions of --redo cap_…"
        )
    return request


def caption(args: argparse.Namespace) -> int:
    request = request_of(args)
    if args.live and not args.dry_run:
        raise ValueError("--live captions one image of a --dry-run; leave it out or give both")
    with client_of(args) as client:
        if args.dry_run:
            found = client.preview_captions(live=args.live, **request)
            if args.json:
                say_json(found)
            else:
                say(tables.preview(found))
            return 0
        return finish(args, client, client.caption(**request), "caption")


def captions_list(args: argparse.Namespace) -> int:
    filters = {
        "caption_job_id": args.job,
        "class_name": args.class_name,
        "characteristic": args.characteristic,
        "flag": args.flag,
        "flagged": args.flagged,
        "excluded": args.excluded,
        "edited": args.edited,
        "q": args.search,
    }
    with client_of(args) as client:
        found = islice(client.captions(args.dataset_id, **filters), args.limit)
        if args.json:
            show(args, found)
        else:
            say(tables.captions(found))
    return 0


def captions_show(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        show(args, client.get_caption(args.id))
    return 0


def captions_edit(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        changed = client.edit_caption(args.id, text=args.text, version=args.version)
    if args.json:
        say_json(changed)
    else:
        say(tables.captions([changed]))
    return 0


def captions_mark(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        changed = [client.edit_caption(id, excluded=args.excluded) for id in args.ids]
    if args.json:
        show(args, changed)
    else:
        say(tables.captions(changed))
    return 0


def captions_report(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        found = client.caption_report(args.id)
    if args.json:
        say_json(found)
    else:
        say(tables.caption_report(found))
    return 0


def captions_export(args: argparse.Namespace) -> int:
    format = args.format or _SUFFIXES.get(args.path.suffix.lower())
    if format is None:
        raise ValueError(
            f"'{args.path.name}' does not say its format; end it in .json, .jsonl, .csv or .zip (sidecars)"
        )
    with client_of(args) as client:
        client.export_captions(args.id, args.path, format=format, include="usable" if args.usable else "all")
    return 0


def captions_import(args: argparse.Namespace) -> int:
    fields = {"format": args.format, "clip_model": args.clip_model, "language": args.language}
    fields = {name: value for name, value in fields.items() if value is not None}
    with client_of(args) as client:
        job = client.import_captions(args.dataset_id, args.path, **fields)
        code = finish(args, client, job, "import")
        result = (client.job(job.id).model_dump().get("result") or {}) if args.wait else {}
    for failure in result.get("failures", [])[:20]:
        note(f"left out: {failure['path']}: {failure['message']}")
    if (more := result.get("failed", 0) - 20) > 0:
        note(f"left out: {more} more")
    return code


# -- parser ------------------------------------------------------------------------------------------------------------


def _template(text: str) -> tuple[str, str]:
    name, equals, template = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=TEXT")
    return name, template


def _yes_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither yes nor no")
    return text == "yes"


def add(
    commands: Any, command: Callable[..., argparse.ArgumentParser], waiting: Callable[[argparse.ArgumentParser], None]
) -> None:
    """`command(group, name, run, help)` makes a command with the common options; `waiting` adds --no-wait."""
    _add_caption(command(commands, "caption", caption, "caption a data set"), waiting)
    group = commands.add_parser("captions", help="review, import and export captions")
    captions = group.add_subparsers(required=True, metavar="COMMAND")

    listing = command(captions, "list", captions_list, "list and search a data set's captions")
    listing.add_argument("dataset_id")
    listing.add_argument("--job", metavar="CAPTION_JOB_ID", help="of this job only")
    listing.add_argument("--class", dest="class_name")
    listing.add_argument("--characteristic")
    listing.add_argument("--flag", choices=FLAGS)
    listing.add_argument("--flagged", choices=["any", "none"], help="with a flag at all, or without")
    listing.add_argument("--excluded", type=_yes_no, metavar="yes|no", help="left out of training by hand")
    listing.add_argument("--edited", type=_yes_no, metavar="yes|no")
    listing.add_argument("--search", metavar="WORDS", help="""as on the web: '"soft coat" -grey or brown'""")
    listing.add_argument("--limit", type=int, default=100, help="at most this many (default: 100)")

    command(captions, "show", captions_show, "one caption, with where it came from").add_argument("id")
    edit = command(captions, "edit", captions_edit, "write a caption anew; the original is kept")
    edit.add_argument("id")
    edit.add_argument("--text", required=True)
    edit.add_argument("--version", type=int, help="refuse where it was changed since this version")
    for name, excluded in (("exclude", True), ("include", False)):
        help = "leave captions out of training" if excluded else "take captions back in"
        mark = command(captions, name, captions_mark, help)
        mark.add_argument("ids", nargs="+", metavar="id")
        mark.set_defaults(excluded=excluded)
    command(captions, "report", captions_report, "a caption job in figures").add_argument("id")

    export = command(captions, "export", captions_export, "write a job's captions to a file")
    export.add_argument("id")
    export.add_argument("path", type=Path, help=".json, .jsonl, .csv, or .zip of .txt sidecars")
    export.add_argument("--format", choices=FORMATS, help="default: by the file's name")
    export.add_argument("--usable", action="store_true", help="without what training leaves out by default")
    bring = command(captions, "import", captions_import, "import captions made elsewhere, as a caption job")
    bring.add_argument("dataset_id")
    bring.add_argument("path", type=Path, help="JSON, JSONL, CSV, or a zip or tar of .txt sidecars")
    bring.add_argument("--format", choices=FORMATS, help="default: guessed from the file")
    bring.add_argument("--clip-model", help="whose tokenizer sets the length budget (default: starter)")
    bring.add_argument("--language", choices=["en", "any"], help="default: en")
    waiting(bring)


def _add_caption(cap: argparse.ArgumentParser, waiting: Callable[[argparse.ArgumentParser], None]) -> None:
    cap.add_argument("dataset_id")
    cap.add_argument("--engine", help="a model the server lists (default: attributes)")
    cap.add_argument(
        "--characteristics", type=arguments.names, default=[], help="comma-separated (default: visual,shape,texture)"
    )
    cap.add_argument(
        "--template", type=_template, action="append", default=[], metavar="NAME=TEXT",
        help="a prompt of your own; {class_name}, {domain}, {words}, {characteristic} are filled in; repeatable",
    )  # fmt: skip
    cap.add_argument("--words", type=int, help="per caption (default: 50)")
    cap.add_argument("--samples", type=int, help="captions per prompt (default: 1)")
    cap.add_argument("--temperature", type=float, help="default: 0.2")
    cap.add_argument("--domain", help="default: the data set's")
    cap.add_argument("--split", choices=["train", "val", "test"], help="default: train")
    cap.add_argument(
        "--shots", type=arguments.shots, default=argparse.SUPPRESS,  # None is 'all'
        help="images per class: only those that a run with these shots takes, or 'all' (default: all)",
    )  # fmt: skip
    cap.add_argument("--shot-seed", type=int)
    cap.add_argument("--seed", type=int)
    cap.add_argument("--limit", type=int, help="at most this many images, evenly by class")
    cap.add_argument("--overwrite", action="store_true", help="ask again for what was written before")
    cap.add_argument("--redo", metavar="CAPTION_JOB_ID", help="ask again for a selection of this job's captions")
    cap.add_argument("--redo-flag", choices=FLAGS, help="select by flag")
    cap.add_argument("--redo-excluded", action="store_true", help="select what was left out of training by hand")
    cap.add_argument("--redo-class", metavar="CLASS", help="select by class")
    cap.add_argument("--redo-caption", action="append", metavar="CAPTION_ID", help="select one by one; repeatable")
    cap.add_argument("--clip-model", help="whose tokenizer sets the length budget (default: starter)")
    cap.add_argument("--shear-tokens", type=int, help="cut every caption to at most this many CLIP tokens")
    cap.add_argument("--reasks", type=int, choices=range(3), help="how often to ask for fewer words (default: 2)")
    cap.add_argument("--language", choices=["en", "any"], help="any: not checked (default: en)")
    cap.add_argument("--agreement", action="store_true", help="measure how well texts and images agree")
    cap.add_argument("--dry-run", action="store_true", help="only say what it would do and cost")
    cap.add_argument("--live", action="store_true", help="with --dry-run: caption one image now, storing nothing")
    waiting(cap)
