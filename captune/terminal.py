"""What the commands share: a client by the common options, printing, and waiting for a job."""

import argparse
from collections.abc import Iterable

from pydantic import BaseModel

from captune import tables
from captune.client import Client
from captune.printing import say, say_json
from captune.progress import ProgressBar
from shared.schemas.common import JobResource


def client_of(args: argparse.Namespace) -> Client:
    return Client(args.url, args.api_key, state_dir=args.state_dir)


def show(args: argparse.Namespace, rows: BaseModel | Iterable[BaseModel], header: tuple[str, ...] = ()) -> None:
    """JSON of everything, or a table of the fields named."""
    if isinstance(rows, BaseModel):
        say_json(rows)
        return
    found = list(rows)
    if args.json:
        say_json([row.model_dump() for row in found])
    else:
        say(tables.table(header, ([getattr(row, name) for name in header] for row in found)))


def finish(args: argparse.Namespace, client: Client, job: JobResource, label: str) -> int:
    """Wait (unless told not to), print the job, and say by the exit code whether it succeeded."""
    if args.wait:
        with ProgressBar(label) as bar:
            job = client.wait(job, bar)
    if args.json:
        say_json(job)
    else:
        say(f"{job.id}  {job.status}" + (f": {job.error.message}" if job.error else ""))
    return 0 if job.status in ("queued", "running", "succeeded") else 1
