"""500 open event streams, each on a job of its own, through the whole running system.

    python benchmarks/event_streams.py [--streams 500] [--events 100] [--seconds 60]

A process of its own commits events as workers do, one transaction each, `--events` a second over all jobs in turn;
every event carries the time just before its commit. First without streams, then with all of them open, while one client
asks for a job twenty times a second. Of the streams: the delay from that time to the event being received, and whether
the sequence numbers of each are complete and in order. Of the API and PostgreSQL: processor time and memory. Last, all
jobs end at once: until the last stream has brought its `done`. Client, writer and server share the machine. A table,
then one JSON line. About 3 minutes; `--seconds 10` for a quick look."""

import argparse
import asyncio
import gc
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from running.beside import beside
from running.processes import Usage, machine, quantiles, usage
from running.tiny import archive, plain_http, running, succeeded, upload
from sqlalchemy import Interval, cast, func, update

from captune.tables import table
from services.embedded.stack import OWNER, Stack
from shared.db.models import Job
from shared.db.session import Database
from shared.ids import new_id
from shared.jobs import ledger

LEASE = "1 hour"  # nobody renews these jobs' leases
PROBE_SECONDS = 0.05


def add_jobs(database: Database, dataset_id: str, count: int) -> list[str]:
    ids = [new_id("cap") for _ in range(count)]
    request = {"dataset_id": dataset_id, "characteristics": ["visual"]}
    for id in ids:
        with database.transaction() as session:
            ledger.create(session, id=id, kind="caption", owner=OWNER, request=request, dataset_id=dataset_id)
            held = {"status": "running", "attempt": 1, "lease_until": func.now() + cast(LEASE, Interval)}
            session.execute(update(Job).where(Job.id == id).values(**held))
    return ids


def write(url: str, ids: Sequence[str], rate: float) -> None:
    """Events to each job in turn until the process is ended."""
    database = Database(url, 1)
    began = time.monotonic()
    number = 0
    while True:
        with database.transaction() as session:
            ledger.add_event(session, ids[number % len(ids)], "log", f"{time.time():.6f}")
        number += 1
        time.sleep(max(0.0, began + number / rate - time.monotonic()))


@dataclass
class Received:
    delays: list[float] = field(default_factory=list)  # ms; of events that were written while the stream was open
    since: float = 0.0
    last: int = 0
    faults: int = 0  # sequence numbers missing, doubled or out of order
    done: bool = False


async def follow(stack: Stack, job_id: str, received: Received, opened: asyncio.Semaphore) -> None:
    """One stream on a connection of its own, read as bytes: a client library for each would measure itself."""
    host, port = stack.url.removeprefix("http://").split(":")
    async with opened:
        reader, writer = await asyncio.open_connection(host, int(port))
        asked = f"GET /v1/caption_jobs/{job_id}/events HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n"
        writer.write(f"{asked}Authorization: Bearer {stack.api_key}\r\n\r\n".encode())
        status = await reader.readline()
        if b" 200 " not in status:
            sys.exit(f"a stream was refused: {status!r}")
        while not received.last:
            await _line(reader, received)
        received.since = time.time()
    while not received.done and await _line(reader, received):
        pass
    writer.close()


async def _line(reader: asyncio.StreamReader, received: Received) -> bool:
    line = await reader.readline()
    now = time.time()
    if line.startswith(b"data: "):
        data = json.loads(line[6:])
        if data.get("object") == "job.event":
            received.faults += data["seq"] != received.last + 1
            received.last = data["seq"]
            if data["type"] == "log" and received.since and float(data["message"]) > received.since:
                received.delays.append(1000 * (now - float(data["message"])))
        else:
            received.done = data.get("status") == "succeeded"
    return bool(line)


async def probe(stack: Stack, job_id: str, seconds: float) -> list[float]:
    """Milliseconds of each request."""
    times = []
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    until = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=60, trust_env=False) as client:
        while time.monotonic() < until:
            began = time.perf_counter()
            answer = await client.get(f"/v1/caption_jobs/{job_id}")
            times.append(1000 * (time.perf_counter() - began))
            answer.raise_for_status()
            await asyncio.sleep(PROBE_SECONDS)
    return times[1:]  # the first one connects


def end_all(database: Database, ids: Sequence[str]) -> float:
    """Ends every job in one transaction; when it was committed."""
    with database.transaction() as session:
        for id in ids:
            ledger.finish(session.get_one(Job, id), session, "succeeded", result={"images": 0, "captions": 0})
    return time.time()


async def streams(stack: Stack, database: Database, ids: Sequence[str], seconds: float) -> dict[str, Any]:
    received = [Received() for _ in ids]
    began = time.monotonic()
    opening = asyncio.Semaphore(20)
    pairs = zip(ids, received, strict=True)
    tasks = [asyncio.create_task(follow(stack, id, each, opening)) for id, each in pairs]
    while not all(each.since for each in received):
        await asyncio.sleep(0.05)
        for task in tasks:
            if task.done():
                task.result()
    opened = time.monotonic() - began
    before = usage()
    times = await probe(stack, ids[0], seconds)
    after = usage()
    at = await asyncio.to_thread(end_all, database, ids)
    await asyncio.gather(*tasks)
    ended = time.time() - at
    delays = [delay for each in received for delay in each.delays]
    if faults := sum(each.faults for each in received):
        sys.exit(f"{faults} events were missing, doubled or out of order")
    figures = {"opened_seconds": round(opened, 2), "all_done_seconds": round(ended, 2), "received": len(delays)}
    p50, p95, p99 = quantiles(delays)
    figures |= {"delay_p50_ms": p50, "delay_p95_ms": p95, "delay_p99_ms": p99, "delay_max_ms": round(max(delays), 1)}
    return figures | _costs(before, after, seconds) | _probed(times)


def _costs(before: dict[str, Usage], after: dict[str, Usage], seconds: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ("api", "postgres"):
        spent = after[name].cpu_seconds - before[name].cpu_seconds
        found[f"{name}_cpu_percent"] = round(100 * spent / seconds, 1)
        found[f"{name}_mib"] = round(after[name].mib, 1)
    return found | {"api_files": after["api"].files}


def _probed(times: Sequence[float]) -> dict[str, float]:
    p50, p95, p99 = quantiles(times)
    return {"request_p50_ms": p50, "request_p95_ms": p95, "request_p99_ms": p99}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--events", type=float, default=100.0, help="a second, over all jobs (default: 100)")
    parser.add_argument("--seconds", type=float, default=60.0, help="with and without streams, each (default: 60)")
    args = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    limits = {"CAPTUNE_MAX_STREAMS": str(args.streams + 100), "CAPTUNE_MAX_STREAMS_PER_OWNER": str(args.streams)}
    with running(**limits) as (stack, client, database), plain_http(stack) as http:
        dataset = succeeded(client, client.job(upload(http, archive(2), "tiny").json()["id"])).id
        ids = add_jobs(database, dataset, args.streams)
        gc.freeze()
        with beside(write, stack.env["DATABASE_URL"], ids, args.events):
            before = usage()
            times = asyncio.run(probe(stack, ids[0], args.seconds))
            without = _costs(before, usage(), args.seconds) | _probed(times)
            figures = asyncio.run(streams(stack, database, ids, args.seconds))
    print(f"{machine()}; client, writer and server share it")
    names = list(figures)
    rows = [(name, without.get(name), figures[name]) for name in names]
    print(table(("", "no stream", f"{args.streams} streams"), rows))
    each = 1024 * (figures["api_mib"] - without["api_mib"]) / args.streams
    print(f"\n{each:.0f} KiB of the API's memory for each stream")
    found = {"streams": args.streams, "events_per_second": args.events, "kib_per_stream": round(each, 1)}
    print(json.dumps({"event_streams": found | figures, "without": without, "machine": machine()}))


if __name__ == "__main__":
    main()
