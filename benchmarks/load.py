"""Everything at once: 200 clients that poll, 20 that submit jobs, 5 that upload 100 MB each, against a running system.

    python benchmarks/load.py [--seconds 300] [--pollers 200] [--submitters 20] [--uploaders 5] [--megabytes 100]

Captune runs as `captune up` starts it. A poller asks every 2 s, in turn for the leaderboard (with its ETag), the lists
of jobs, one job and its events. A submitter sends a job (captions of one picture, an evaluation or a zero-shot run, on
30 small pictures), looks at it twice a second until it has ended, and sends the next. An uploader sends a tar of 100 MB
of distinct pictures at 5 MB/s, waits until it is ingested, deletes the data set and sends the next; all data is made
up. Clients and servers share the machine, so the clients' work slows the servers down.

Per route: requests, p50, p95, p99 and the longest, as the client waits. Every answer that was no success; one that is
not 429 ends the benchmark with an error. Of each process: memory and open files at the start, after a third, after two
thirds and at the end, and processor time. Of each table: its growth. Tables, then one JSON line. About 6 minutes and 6
GB of disk; `--seconds 20` for a quick look."""

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from running.clients import KINDS, Load, Seen, run
from running.processes import Usage, machine, quantiles, table_sizes, usage
from running.tiny import archive, plain_http, running, say, succeeded, upload

from captune.client import Client
from captune.tables import table
from services.embedded.stack import Stack

EARLIER_RUNS = 12  # fine-tuning jobs to look at, and rows of the leaderboard
WARM_SECONDS = 20.0  # until the workers have loaded what they need and every client has begun
MEGABYTES_PER_SECOND = 5.0


def prepare(stack: Stack, client: Client) -> tuple[str, str, list[str]]:
    """A data set with a leaderboard: its id, a classifier's, and the ids of the runs."""
    with plain_http(stack) as http:
        dataset = succeeded(client, client.job(upload(http, archive(10), "load").json()["id"])).id
        succeeded(client, client.caption(dataset_id=dataset, limit=1))
        runs = []
        for number in range(EARLIER_RUNS):
            runs.append(client.train(dataset_id=dataset, method={"type": "zero_shot"}, suffix=f"earlier {number}"))
        ended = [succeeded(client, run) for run in runs]
        for evaluation in list(client.jobs("eval", dataset_id=dataset)):
            succeeded(client, evaluation)
    return dataset, str(ended[0].model_dump()["fine_tuned_model"]), [run.id for run in ended]


def watch(clients: list["Future[Seen]"], began: float, seconds: float) -> list[dict[str, Usage]]:
    """The processes' use at the start, after a third, after two thirds and at the end."""
    found = [usage()]
    for part in (1, 2, 3):
        while time.time() < began + part * seconds / 3:
            for client in clients:
                if client.done():
                    client.result()  # raises what ended it early
            time.sleep(0.2)
        found.append(usage())
        say(f"{part * seconds / 3:.0f} s: {sum(each.mib for each in found[-1].values()):.0f} MiB in all")
    return found


def processes(found: list[dict[str, Usage]], seconds: float) -> tuple[list[str], list[tuple[Any, ...]]]:
    rows = []
    for name in found[-1]:
        used = [each.get(name, Usage(0, 0, 0, 0)) for each in found]
        cpu = round(100 * (used[-1].cpu_seconds - used[0].cpu_seconds) / seconds, 1)
        rows.append((name, *(round(each.mib) for each in used), *(each.files for each in used), cpu))
    points = ("start", "third", "two_thirds", "end")
    return ["process", *(f"mib_{at}" for at in points), *(f"files_{at}" for at in points), "cpu_percent"], rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="after a warm-up of 20 s (default: 300)")
    parser.add_argument("--pollers", type=int, default=200)
    parser.add_argument("--submitters", type=int, default=20)
    parser.add_argument("--uploaders", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=100.0, help="of each upload")
    args = parser.parse_args()
    need = args.uploaders * MEGABYTES_PER_SECOND * args.seconds * 2e6
    if shutil.disk_usage(tempfile.gettempdir()).free < need + 5e9:
        sys.exit(f"{tempfile.gettempdir()} needs {need / 1e9 + 5:.0f} GB of free space")
    counts = {"poll": args.pollers, "submit": args.submitters, "upload": args.uploaders}
    assert counts.keys() == KINDS.keys()
    with running() as (stack, client, database):
        dataset, classifier, runs = prepare(stack, client)
        sizes = table_sizes(database)
        began = time.time() + WARM_SECONDS
        size = int(args.megabytes * 1e6)
        work = (dataset, classifier, runs, began + args.seconds, size, MEGABYTES_PER_SECOND * 1e6)
        load = Load(stack.url, stack.api_key, *work)
        seen = Seen()
        with ProcessPoolExecutor(len(counts), multiprocessing.get_context("spawn")) as pool:
            clients = [pool.submit(run, kind, count, load) for kind, count in counts.items() if count]
            time.sleep(max(0.0, began - time.time()))
            found = watch(clients, began, args.seconds)
            for each in clients:
                seen.add(each.result())
        grown = table_sizes(database)
    names = ["route", "requests", "p50_ms", "p95_ms", "p99_ms", "max_ms"]
    rows = [(route, len(ms), *quantiles(ms), round(max(ms))) for route, ms in sorted(seen.times.items())]
    heads, used = processes(found, args.seconds)
    tables = [
        (name, round((grown[name][0] - before[0]) / 2**20, 2), round((grown[name][1] - before[1]) / 2**20, 2))
        for name, before in sizes.items()
        if grown[name] != before
    ]
    print(f"{machine()}; clients and servers share it. {counts}, {args.seconds:.0f} s\n")
    print(table(names, rows))
    print(f"\nanswers that were no success: {dict(seen.answers) or 'none'}\njobs ended: {dict(seen.ended)}\n")
    print(table(heads, used))
    print()
    print(table(["table", "grown_mib", "indexes_grown_mib"], tables))
    figures = {
        "routes": [dict(zip(names, row, strict=True)) for row in rows],
        "refused": dict(seen.answers),
        "jobs_ended": dict(seen.ended),
        "processes": [dict(zip(heads, row, strict=True)) for row in used],
        "grown_mib": {name: data + indexes for name, data, indexes in tables},
    }
    print(json.dumps({"load": figures | {"clients": counts, "seconds": args.seconds}, "machine": machine()}))
    if errors := [each for each in seen.answers if not each.endswith(" 429")] or seen.ended["failed"]:
        sys.exit(f"errors that are not 429, or failed jobs: {errors}")


if __name__ == "__main__":
    main()
