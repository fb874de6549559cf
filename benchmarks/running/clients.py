"""The clients of `load.py`: each on a connection of its own, because 200 users are 200 clients and a pool that they
shared would measure itself. Pollers, submitters and uploaders run in a process each."""

import asyncio
import gc
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx

from running.uploading import BOUNDARY, form, noise_picture

POLL_SECONDS = 2.0  # between the requests of one poller, as a dashboard does it
WAIT_SECONDS = 0.5  # between the looks of a submitter at its job
FINAL = ("succeeded", "failed", "cancelled")


@dataclass
class Load:
    """What the clients work on, and until when."""

    url: str
    key: str
    dataset_id: str
    classifier_id: str
    job_ids: list[str]  # ended jobs to look at, `ft_…`
    until: float  # time.time()
    upload_bytes: int
    upload_rate: float  # bytes a second, of each uploader


@dataclass
class Seen:
    times: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # ms by route
    answers: Counter[str] = field(default_factory=Counter)  # "route status", of all that were no success
    ended: Counter[str] = field(default_factory=Counter)  # jobs by final state

    def add(self, other: "Seen") -> None:
        for route, times in other.times.items():
            self.times[route] += times
        self.answers += other.answers
        self.ended += other.ended


class Caller:
    def __init__(self, load: Load, seen: Seen) -> None:
        self.load, self.seen = load, seen
        headers = {"Authorization": f"Bearer {load.key}"}
        self.http = httpx.AsyncClient(
            base_url=load.url, headers=headers, timeout=httpx.Timeout(600, connect=60), trust_env=False, verify=False
        )

    async def ask(self, method: str, route: str, **options: Any) -> httpx.Response | None:
        """One request, timed. `route` may hold `{}` for `id`. None where the connection failed."""
        path = route.replace("{}", options.pop("id", ""))
        name = f"{method} {route}"
        began = time.perf_counter()
        try:
            answer = await self.http.request(method, path, **options)
        except httpx.TransportError as error:
            self.seen.answers[f"{name} {type(error).__name__}"] += 1
            return None
        self.seen.times[name].append(1000 * (time.perf_counter() - began))
        if not answer.is_success and answer.status_code != 304:
            self.seen.answers[f"{name} {answer.status_code}"] += 1
        return answer

    @property
    def going(self) -> bool:
        return time.time() < self.load.until


async def poll(caller: Caller, number: int) -> None:
    """The leaderboard with its ETag, the lists of jobs, one job and its events, in turn."""
    load, tag = caller.load, ""
    await asyncio.sleep(random.random() * POLL_SECONDS)
    turn = number  # not in step
    while caller.going:
        began = time.monotonic()
        job = random.choice(load.job_ids)
        match turn % 6:
            case 0 | 3:
                headers = {"If-None-Match": tag} if tag else {}
                found = {"dataset_id": load.dataset_id}
                answer = await caller.ask("GET", "/v1/leaderboard", params=found, headers=headers)
                tag = answer.headers.get("ETag", "") if answer is not None else ""
            case 1:
                await caller.ask("GET", "/v1/fine_tuning/jobs")
            case 2:
                await caller.ask("GET", "/v1/fine_tuning/jobs/{}", id=job)
            case 4:
                await caller.ask("GET", "/v1/caption_jobs", params={"dataset_id": load.dataset_id})
            case 5:
                await caller.ask("GET", "/v1/fine_tuning/jobs/{}/events", id=job)
        turn += 1
        await asyncio.sleep(max(0.0, POLL_SECONDS - (time.monotonic() - began)))


async def submit(caller: Caller, number: int) -> None:
    """A job, looked at until it has ended, then the next: captions of one picture, an evaluation, a zero-shot run."""
    load, turn = caller.load, number
    while caller.going:
        seed = random.randrange(2**30)
        match turn % 3:
            case 0:
                route = "/v1/caption_jobs"
                body: dict[str, Any] = {"limit": 1, "characteristics": ["visual"], "seed": seed}
                body["dataset_id"] = load.dataset_id
            case 1:
                route, body = "/v1/evaluations", {"classifier_id": load.classifier_id, "split": "test"}
            case _:
                route, body = "/v1/fine_tuning/jobs", {"dataset_id": load.dataset_id, "suffix": f"n{seed}"}
                body["method"] = {"type": "zero_shot"}
        turn += 1
        answer = await caller.ask("POST", route, json=body)
        if answer is None or answer.status_code != 202:
            await asyncio.sleep(1.0)
            continue
        await _ended(caller, route, answer.json()["id"])


async def _ended(caller: Caller, route: str, id: str) -> bool:
    while caller.going:
        await asyncio.sleep(WAIT_SECONDS)
        answer = await caller.ask("GET", f"{route}/{{}}", id=id)
        if answer is not None and answer.is_success and (status := answer.json()["status"]) in FINAL:
            caller.seen.ended[status] += 1
            return True
    return False


async def upload(caller: Caller, _: int) -> None:
    """An archive at the pace of a network, its ingestion, its deletion, then the next."""
    load, picture = caller.load, noise_picture()
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    while caller.going:
        body = form(picture, load.upload_bytes, load.upload_rate)
        answer = await caller.ask("POST", "/v1/datasets", content=body, headers=headers)
        if answer is None or answer.status_code != 202:
            await asyncio.sleep(1.0)
            continue
        id = answer.json()["id"]
        if await _ended(caller, "/v1/datasets", id):
            await caller.ask("DELETE", "/v1/datasets/{}", id=id)


KINDS: dict[str, Callable[[Caller, int], Coroutine[Any, Any, None]]] = {
    "poll": poll,
    "submit": submit,
    "upload": upload,
}


def run(kind: str, count: int, load: Load) -> Seen:
    """All clients of a kind, in this process."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    seen = Seen()

    async def all_of_them() -> None:
        callers = [Caller(load, seen) for _ in range(count)]
        gc.freeze()  # a collection here would be taken for the API's
        await asyncio.gather(*(KINDS[kind](caller, number) for number, caller in enumerate(callers)))
        for caller in callers:
            await caller.http.aclose()

    asyncio.run(all_of_them())
    return seen
