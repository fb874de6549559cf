"""`captune bench mmft`: the paper's protocol on published data sets, from folders in their official layouts."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import httpx

from captune import arguments, tables
from captune.bench import READERS, LayoutError, Reading, plan, read
from captune.bench.data import SPLITS, shortfall
from captune.bench.protocol import Protocol
from captune.bench.results import PAPER_NOTE, report
from captune.bench.splits import cut
from captune.bench.upload import metadata, too_large, unpacked_bytes
from captune.errors import CaptuneAPIError, ConnectionNotFound
from captune.printing import note, say, say_json
from captune.terminal import client_of
from shared.schemas.fine_tuning import Method, MethodSpec, Validation

LISTED = 10  # refusals shown per data set


def mmft(args: argparse.Namespace) -> int:
    settings = _settings(args)
    readings = {name: _read(name, path, args) for name, path in args.datasets.items()}
    if args.dry_run:
        known = _methods(args)
        found = [_described(name, reading, settings, known) for name, reading in readings.items()]
        if args.json:
            say_json(found)
        else:
            say("\n\n".join(map(_shown, found)))
        return 0
    for reading in readings.values():
        if reason := too_large(reading, metadata(reading)):
            raise LayoutError(reason)
    with client_of(args) as client:
        protocol = Protocol(client, settings, note)
        results = [protocol.submit(name, READERS[name], reading) for name, reading in readings.items()]
        results = [protocol.collect(result, READERS[result.dataset]) for result in results]
    if args.json:
        body = {"settings": asdict(settings), "results": [result.model_dump() for result in results]}
        say_json({**body, "paper": PAPER_NOTE})
    else:
        say(report(results, settings))
    failed = any(result.error or any(row.missing for row in result.rows) for result in results)
    return 1 if failed else 0


def _settings(args: argparse.Namespace) -> plan.Settings:
    if args.pool is not None and (None in args.shots or max(args.shots) > args.pool):
        raise ValueError(
            f"--pool {args.pool} leaves {args.pool} train images per class: --shots can be no more, and not all"
        )
    return plan.Settings(
        model=args.model,
        methods=tuple(dict.fromkeys(args.methods)),
        shots=tuple(dict.fromkeys(args.shots)),
        seeds=args.seeds,
        engine=args.engine,
        validation=args.validation,
        preset=args.preset,
    )


def _read(name: str, path: Path, args: argparse.Namespace) -> Reading:
    reading = read(name, path, args.split_seed)
    if args.pool is not None:
        cut(reading, args.pool, args.split_seed)
    reading.notes += shortfall(reading, READERS[name])
    if reading.refused:
        reading.notes.append(f"{len(reading.refused)} images that the lists name cannot be used")
    return reading


def _methods(args: argparse.Namespace) -> list[Method] | None:
    """What the server offers; None where there is no server, which a dry run can do without."""
    try:
        with client_of(args) as client:
            return client.methods()
    except (ConnectionNotFound, CaptuneAPIError, httpx.TransportError):
        return None


def _described(name: str, reading: Reading, settings: plan.Settings, known: list[Method] | None) -> dict[str, Any]:
    counts = reading.counts()
    found: dict[str, Any] = {
        "dataset": name,
        "title": READERS[name].title,
        "folder": str(reading.root),
        "domain": READERS[name].domain,
        "classes": reading.classes,
        "images": {split: sum(counts[split].values()) for split in SPLITS},
        "per_class": {split: [min(counts[split].values()), max(counts[split].values())] for split in SPLITS},
        "upload_bytes": unpacked_bytes(reading),
        "notes": list(reading.notes),
        "refused": len(reading.refused),
        "refusals": [{"path": path, "reason": reason} for path, reason in reading.refused[:LISTED]],
        "runs": None,
        "captions_at_most": None,
        "caption_jobs": None,
    }
    if reason := too_large(reading, metadata(reading)):
        found["notes"].append(f"too large for an upload: {reason}")
    if known is not None:
        chosen = plan.plan(settings, known)
        found["runs"] = plan.count_runs(settings, known)
        found["captions_at_most"] = plan.count_captions(chosen, settings, reading)
        found["caption_jobs"] = len(chosen.captions)
    return found


def _shown(found: dict[str, Any]) -> str:
    classes: list[str] = found["classes"]
    names = ", ".join(classes[:5]) + (f" … {classes[-1]}" if len(classes) > 5 else "")
    parts = [f"{found['title']} in {found['folder']}: {len(classes)} classes ({names}), domain '{found['domain']}'"]
    rows = [(split, f"{found['images'][split]:,}", "{} to {}".format(*found["per_class"][split])) for split in SPLITS]
    parts.append(tables.table(("split", "images", "per class"), rows))
    parts.append(f"  upload of about {found['upload_bytes'] / 2**20:,.1f} MiB")
    parts += [f"  {note}" for note in found["notes"]]
    parts += [f"  refused: {each['path']}: {each['reason']}" for each in found["refusals"]]
    if found["refused"] > len(found["refusals"]):
        parts.append(f"  refused: {found['refused'] - len(found['refusals'])} more")
    if found["runs"] is None:
        parts.append("  runs and captions are counted once a server is up: it says which methods read captions")
    else:
        parts.append(
            f"  {found['runs']:,} runs; at most {found['captions_at_most']:,} captions by {found['caption_jobs']} jobs"
        )
    return "\n".join(parts)


# -- parser ------------------------------------------------------------------------------------------------------------


def _datasets(text: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for part in text.split(","):
        name, equals, path = part.strip().partition("=")
        if not equals or not path:
            raise argparse.ArgumentTypeError(f"'{part}' is not NAME=FOLDER")
        if name not in READERS:
            raise argparse.ArgumentTypeError(f"there is no data set '{name}'; there are {', '.join(READERS)}")
        if name in found:
            raise argparse.ArgumentTypeError(f"'{name}' is given twice")
        found[name] = Path(path).expanduser()
    return found


def add(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """`command(group, name, run, help)` makes a command with the common options."""
    group = commands.add_parser("bench", help="published protocols").add_subparsers(required=True, metavar="PROTOCOL")
    bench = command(group, "mmft", mmft, "MMFT's protocol on the paper's data sets; it takes up what was done before")
    bench.add_argument(
        "--datasets", type=_datasets, required=True, metavar="NAME=FOLDER,…",
        help=f"folders in their official layouts, or with a CoOp split_zhou_*.json: {', '.join(READERS)}",
    )  # fmt: skip
    bench.add_argument(
        "--shots", type=arguments.shot_list, default=[1, 2, 4, 8, 16, None],
        help="train images per class, or 'all' (default: 1,2,4,8,16,all)",
    )  # fmt: skip
    bench.add_argument(
        "--seeds", type=arguments.positive, default=5, help="how many; each draws its own shots (default: 5)"
    )
    bench.add_argument("--model", default="ViT-B-32/openai", help="default: ViT-B-32/openai")
    bench.add_argument("--engine", default="attributes", help="the captioner (default: attributes, which is no MLLM)")
    bench.add_argument(
        "--methods", type=arguments.names, default=list(plan.METHODS), help=f"default: {','.join(plan.METHODS)}"
    )
    bench.add_argument(
        "--validation", default="few_shot", choices=get_args(Validation),
        help="what chooses the epoch; with few_shot, runs on all of train take all of val (default: few_shot)",
    )  # fmt: skip
    presets = get_args(MethodSpec.model_fields["preset"].annotation)
    bench.add_argument("--preset", default="paper", choices=presets, help="whose hyperparameters (default: paper)")
    bench.add_argument("--split-seed", type=int, default=0, help="draws the splits that a release lacks (default: 0)")
    bench.add_argument(
        "--pool", type=arguments.positive, help="upload at most this many train images per class (ImageNet)"
    )
    bench.add_argument("--dry-run", action="store_true", help="only read the folders, and say what would be done")
