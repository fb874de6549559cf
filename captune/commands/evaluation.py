"""`captune evaluate`, `captune predict` and `captune classifiers …`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from captune import tables
from captune.printing import note, say, say_json
from captune.terminal import client_of, finish, show
from shared.schemas.common import Split
from shared.schemas.evaluations import Evaluation, Head
from shared.schemas.fine_tuning import Classifier

SPLITS: tuple[str, ...] = get_args(Split)
HEADS: tuple[str, ...] = get_args(Head)
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def evaluate(args: argparse.Namespace) -> int:
    request = {
        "model": args.model,
        "dataset_id": args.dataset,
        "split": args.split,
        "head": args.head,
        "corruptions": args.corruptions,
        "held_aside_dataset_id": args.held_aside,
        "caption_job_id": args.captions,
    }
    with client_of(args) as client:
        code = finish(args, client, job := client.evaluate(args.classifier_id, **request), "evaluate")
        done = client.job(job.id)
    if isinstance(done, Evaluation) and done.scores and not args.json:
        say(tables.table(("metric", "value"), [(name, f"{value:.4g}") for name, value in done.scores.items()]))
    return code


def rescore(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        show(args, client.rescore(args.id))
    return 0


def predict(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        found = list(client.predict(args.id, list(_files(args.files)), top_k=args.top))
    if args.json:
        say_json([each.model_dump() for each in found])
        return 0
    rows = []
    for each in found:
        rest = ", ".join(f"{c['display_name']} {c['probability']:.3f}" for c in each.classes[1:])
        rows.append((each.file, each.class_name, f"{each.probability:.3f}", rest))
    say(tables.table(("file", "class", "probability", "then"), rows))
    return 0


def _files(paths: list[Path]) -> list[Path]:
    """Files as they are, folders with the images below them."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGES) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"there is no image below {path}")
        found += inside
    return found


def classifiers_list(args: argparse.Namespace) -> int:
    filters = {"dataset_id": args.dataset} if args.dataset else {}
    with client_of(args) as client:
        show(args, client.classifiers(**filters), ("id", "method", "model", "shots", "seed", "protocol", "suffix"))
    return 0


def classifiers_download(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        made = client.download_classifier(args.id, args.path or Path(args.id))
    say(str(made))
    return 0


def classifiers_import(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        made = client.import_classifier(args.path, dataset_id=args.dataset_id, name=args.name)
    if args.json:
        say_json(made)
    else:
        say(f"{made.id}  {made.method} on {made.model}")
        note(f"score it with: captune evaluate {made.id}")
    return 0


def classifiers_tag(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        _print_marks(args, client.update_classifier(args.id, tags=args.tags))
    return 0


def classifiers_pin(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        _print_marks(args, client.update_classifier(args.id, pinned=args.pinned))
    return 0


def _print_marks(args: argparse.Namespace, changed: Classifier) -> None:
    if args.json:
        say_json(changed)
    else:
        say(f"{changed.id}  {'pinned' if changed.pinned else 'not pinned'}  tags: {', '.join(changed.tags) or 'none'}")


def classifiers_rm(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        client.delete_classifier(args.id)
    return 0


def add(
    commands: Any, command: Callable[..., argparse.ArgumentParser], waiting: Callable[[argparse.ArgumentParser], None]
) -> None:
    """`command(group, name, run, help)` makes a command with the common options; `waiting` adds --no-wait."""
    score = command(commands, "evaluate", evaluate, "score a classifier, or a bare model, on a data set")
    score.add_argument("classifier_id", nargs="?", help="or --model")
    score.add_argument("--model", help="a CLIP by name, scored by the class names: starter, ViT-B-32/openai, a folder")
    score.add_argument("--dataset", metavar="DATASET_ID", help="default: the one the classifier was trained on")
    score.add_argument("--split", default="test", choices=SPLITS)
    score.add_argument("--head", default="own", choices=HEADS, help="zero_shot: the data set's class names instead")
    score.add_argument("--corruptions", action="store_true", help="also on corrupted copies of the images (slow)")
    score.add_argument("--held-aside", metavar="DATASET_ID", help="also what was forgotten of this data set")
    score.add_argument("--captions", metavar="CAPTION_JOB_ID", help="also retrieval with the split's captions")
    waiting(score)
    again = command(commands, "rescore", rescore, "compute an evaluation's metrics anew, without the model")
    again.add_argument("id")

    guess = command(commands, "predict", predict, "classify image files")
    guess.add_argument("id", help="of the classifier")
    guess.add_argument("files", nargs="+", type=Path, help="files, or folders of them")
    guess.add_argument("--top", type=int, default=3, help="classes told of each (default: 3)")

    group = commands.add_parser("classifiers", help="what fine-tuning made").add_subparsers(
        required=True, metavar="COMMAND"
    )
    listing = command(group, "list", classifiers_list, "list classifiers")
    listing.add_argument("--dataset", metavar="DATASET_ID")
    get = command(group, "download", classifiers_download, "a folder that plain open_clip loads")
    get.add_argument("id")
    get.add_argument("path", nargs="?", type=Path, help="a new folder, or a .zip (default: a folder named by the id)")
    bring = command(group, "import", classifiers_import, "bring in a classifier that was downloaded elsewhere")
    bring.add_argument("path", type=Path, help="a folder, zip or tar")
    bring.add_argument("dataset_id", help="whose classes it tells apart")
    bring.add_argument("--name", default="imported", help="tells its row on the leaderboard apart")
    tag = command(group, "tag", classifiers_tag, "say which tags a classifier has, for 'captune leaderboard --tag'")
    tag.add_argument("id")
    tag.add_argument("tags", nargs="*", metavar="TAG", help="in place of those it has; none takes all away")
    for name, pinned in (("pin", True), ("unpin", False)):
        help = "show a classifier on the leaderboard whatever the filter" if pinned else "undo 'pin'"
        pin = command(group, name, classifiers_pin, help)
        pin.add_argument("id")
        pin.set_defaults(pinned=pinned)
    command(group, "rm", classifiers_rm, "delete a classifier, its scores and its files").add_argument("id")
