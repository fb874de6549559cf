"""What users do while things break: careful ones, who send a request again with the same Idempotency-Key until it is
answered. Each actor is a thread with random numbers of its own, so what is asked follows from the seed; when each
request is answered does not."""

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import httpx

from tests.e2e import pictures
from tests.faults.journal import Journal
from tests.faults.world import RUNS, World

FINAL = ("succeeded", "failed", "cancelled")
PATHS = {
    "ingest": "/v1/datasets",
    "caption": "/v1/caption_jobs",
    "fine_tune": "/v1/fine_tuning/jobs",
    "evaluate": "/v1/evaluations",
    "group": "/v1/fine_tuning/groups",
}
#: Refusals that pass: the same request is sent again.
PASSING = {"in_flight", "dataset_not_ready", "captions_not_ready"}
UNAVAILABLE = (503, 507)  # the answers of a server that knows what it lacks; any other 5xx is a defect
PAUSE = 0.25  # seconds between tries
SILENCE = 20.0  # of an event stream, which says every 15 s that it is still there


class Clock:
    """When actors begin nothing new (`over`), and when they give up what is unanswered (`give_up`)."""

    def __init__(self, seconds: float, patience: float) -> None:
        self.began = time.monotonic()
        self.over, self.give_up = self.began + seconds, self.began + seconds + patience

    def going(self) -> bool:
        return time.monotonic() < self.over


class User:
    def __init__(self, world: World, journal: Journal, rng: random.Random, clock: Clock) -> None:
        self.world, self.journal, self.rng, self.clock = world, journal, rng, clock
        self.http = world.client()

    def send(self, method: str, path: str, **arguments: Any) -> httpx.Response | None:
        """One try; None where no answer came."""
        try:
            answer = self.http.request(method, path, **arguments)
        except httpx.TransportError as error:
            self.journal.add("unanswered", path=f"{method} {path}", error=type(error).__name__)
            return None
        if answer.status_code >= 500 and answer.status_code not in UNAVAILABLE:
            self.journal.add("server_error", path=f"{method} {path}", status=answer.status_code, body=answer.text[:500])
        return answer

    def persist(self, method: str, path: str, **arguments: Any) -> httpx.Response | None:
        """Until there is an answer that says something of the request; None at `give_up`."""
        while time.monotonic() < self.clock.give_up:
            answer = self.send(method, path, **arguments)
            told = answer is not None and answer.status_code < 500 and answer.status_code != 429
            if answer is not None and told and (answer.is_success or _code(answer) not in PASSING):
                return answer
            time.sleep(PAUSE)
        return None

    def submit(self, kind: str, expect: dict[str, Any] | None = None, **arguments: Any) -> str | None:
        """The id of the job that was accepted."""
        key = f"{self.world.schedules}/{UUID(int=self.rng.getrandbits(128))}"  # a seed may be replayed in one world
        self.journal.add(
            "sent", key=key, kind=kind, expect=expect or {}, body=arguments.get("json", arguments.get("data"))
        )
        answer = self.persist("POST", PATHS[kind], headers={"Idempotency-Key": key}, **arguments)
        if answer is None:
            return None
        if not answer.is_success:
            self.journal.add("refused", key=key, status=answer.status_code, code=_code(answer))
            return None
        id = str(answer.json()["id"])
        self.journal.add("acknowledged", key=key, id=id, status=answer.status_code)
        if self.rng.random() < 0.2:  # a client that is not sure asks again, and must be told the same
            again = self.send("POST", PATHS[kind], headers={"Idempotency-Key": key}, **arguments)
            if again is not None and again.is_success:
                self.journal.add("acknowledged", key=key, id=again.json()["id"], status=again.status_code)
        return id

    def act(self, kind: str, id: str, action: str) -> int | None:
        """cancel, pause or resume, once. What a job was seen to be by the answer is noted."""
        answer = self.send("POST", f"{PATHS[kind]}/{id}/{action}")
        status = None if answer is None else answer.status_code
        state = answer.json().get("status") if answer is not None and answer.is_success else None
        self.journal.add("action", action=action, id=id, status=status, state=state)
        if state in FINAL:
            self.journal.add("seen", id=id, state=state)
        return status

    def look(self, kind: str, id: str) -> dict[str, Any] | None:
        answer = self.send("GET", f"{PATHS[kind]}/{id}")
        if answer is None or not answer.is_success:
            return None
        job: dict[str, Any] = answer.json()
        if job["status"] in FINAL:
            self.journal.add("seen", id=id, state=job["status"])
        return job

    def await_final(self, kind: str, id: str) -> str | None:
        """The final state, while the load goes on."""
        while self.clock.going():
            job = self.look(kind, id)
            if job is not None and job["status"] in FINAL:
                return str(job["status"])
            time.sleep(PAUSE)
        return None

    def interfere(self, kind: str, id: str) -> None:
        """Cancels, pauses and resumes; or lets it be."""
        choice = self.rng.random()
        if choice < 0.4:
            return
        time.sleep(self.rng.choice([0.0, self.rng.uniform(0, 2.0)]))
        if choice < 0.65:
            self.act(kind, id, "cancel")
            return
        self.act(kind, id, "pause")
        time.sleep(self.rng.uniform(0, 0.7))
        self.act(kind, id, "resume")
        if self.rng.random() < 0.3:
            self.act(kind, id, "cancel")


def _code(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["code"])
    except (ValueError, KeyError, TypeError):
        return f"http_{answer.status_code}"


# -- the actors --------------------------------------------------------------------------------------------------------


def archive(rng: random.Random) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files of a small data set, and what is to become of them."""
    if rng.random() < 0.1:
        return {f"a/{n}.png": b"no picture" for n in range(3)}, {"fails": ["no_images"]}
    first = rng.randrange(1000)
    good = pictures.by_class(rng.randint(5, 9), first)
    some = sorted(good)
    for n in range(rng.choice([0, 0, 2])):  # the same bytes again, under another name
        good[some[n].replace(".png", "_again.png")] = good[some[n]]
    bad = {f"red_disc/bad_{n}.png": png for n, png in enumerate((b"no picture", b"", good[some[0]][:60]))}
    bad = dict(rng.sample(sorted(bad.items()), rng.choice([0, 1, 3])))
    images = {path: hashlib.sha256(data).hexdigest() for path, data in good.items()}
    return good | bad, {"images": images, "refused": len(bad)}


def upload(user: User) -> str | None:
    files, expect = archive(user.rng)
    path = user.world.folder / f"upload-{user.rng.getrandbits(64):x}.zip"
    pictures.write_zip(path, files)
    data = path.read_bytes()
    path.unlink()
    fields = {"name": "small", "domain": "simple shapes", "split_seed": str(user.rng.randrange(100))}
    return user.submit("ingest", expect, data=fields, files={"file": ("small.zip", data)})


def uploader(user: User) -> None:
    """Uploads, captions what was uploaded, scores a bare model on it, and tries to delete it in the middle."""
    while user.clock.going():
        dataset = upload(user)
        if dataset is None:
            continue
        if user.rng.random() < 0.2:
            delete(user, dataset)  # in use: refused, or its ingestion was quicker
        if user.await_final("ingest", dataset) != "succeeded":
            continue
        body = {"dataset_id": dataset, "words": 12, "engine": user.rng.choice(["remote", "attributes"])}
        captions = user.submit("caption", json=body)
        if user.rng.random() < 0.5:
            user.submit("evaluate", json={"model": user.world.clip, "dataset_id": dataset})
        if captions is not None:
            user.interfere("caption", captions)
        if user.rng.random() < 0.4:
            delete(user, dataset)


def delete(user: User, dataset: str) -> None:
    user.journal.add("deleting", id=dataset)
    answer = user.send("DELETE", f"/v1/datasets/{dataset}")
    user.journal.add("deleted", id=dataset, status=None if answer is None else answer.status_code)


def trainer(user: User) -> None:
    """Runs whose weights are known."""
    if user.rng.random() < 0.3:
        runs = {"models": [user.world.clip], "methods": [{"type": "linear_probe"}, {"type": "zero_shot"}], "seeds": [5]}
        user.submit("group", {"members": 2}, json={"name": "both", "dataset_id": user.world.base, **runs})
    waiting: list[str] = []
    for number in range(4):
        name = user.rng.choice(["mmft", "mmft", *RUNS])
        body = {**user.world.run_body(name), "suffix": f"{name}-{user.rng.randrange(3)}"}
        job = user.submit("fine_tune", {"run": name}, json=body)
        if job is not None:
            waiting.append(job)
        if number >= 1 and waiting:  # one is always queued
            user.interfere("fine_tune", waiting.pop(0))
            time.sleep(user.rng.uniform(0, 1))
        if not user.clock.going():
            return


def captioner(user: User) -> None:
    """Captions that nobody asked for before, so that none is a copy."""
    waiting: list[str] = []
    while user.clock.going():
        body = {
            "dataset_id": user.world.base,
            "words": 12,
            "engine": user.rng.choice(["remote", "remote", "attributes"]),
            "seed": user.rng.randrange(2**30),
        }
        if user.rng.random() < 0.3:
            body |= {"samples_per_prompt": 2, "temperature": 0.7}
        job = user.submit("caption", json=body)
        if job is not None:
            waiting.append(job)
        if len(waiting) > 1:
            user.interfere("caption", waiting.pop(0))
            time.sleep(user.rng.uniform(0.2, 1.0))


def scorer(user: User) -> None:
    """The same few classifiers again and again: one evaluation of each stands."""
    for _ in range(3):
        body = {"classifier_id": user.rng.choice(user.world.classifiers), "split": user.rng.choice(["test", "val"])}
        if user.rng.random() < 0.3:
            body["head"] = "zero_shot"
        job = user.submit("evaluate", json=body)
        if job is not None:
            user.interfere("evaluate", job)
        time.sleep(user.rng.uniform(0.3, 1.5))
        if not user.clock.going():
            return


def reader(user: User) -> None:
    """Pages a dashboard shows."""
    while user.clock.going():
        user.send("GET", "/v1/leaderboard", params={"dataset_id": user.world.base})
        kind = user.rng.choice(["caption", "fine_tune", "evaluate", "ingest"])
        user.send("GET", PATHS[kind], params={"limit": 50})
        ids = list(user.journal.acknowledged().items())
        for id, submission in user.rng.sample(ids, min(3, len(ids))):
            if submission.kind != "group":
                user.look(submission.kind, id)
        time.sleep(0.3)


def follower(user: User) -> None:
    """Reads jobs' event streams to their end, cutting the connection now and then."""
    followed: set[str] = set()
    while user.clock.going():
        left = [(i, s) for i, s in user.journal.acknowledged().items() if i not in followed and s.kind != "group"]
        if not left:
            time.sleep(0.1)
            continue
        id, submission = left[0] if user.rng.random() < 0.5 else user.rng.choice(left)
        followed.add(id)
        follow(user, submission.kind, id)


def follow(user: User, kind: str, id: str) -> None:
    seen: list[int] = []
    done: str | None = None
    while done is None and time.monotonic() < user.clock.give_up:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(seen[-1])} if seen else {})
        cut_after = user.rng.choice([1, 3, 1000])
        try:
            with user.http.stream("GET", f"{PATHS[kind]}/{id}/events", headers=headers, timeout=SILENCE) as answer:
                if answer.status_code == 404:  # deleted meanwhile
                    break
                if answer.status_code != 200:
                    time.sleep(PAUSE)
                    continue
                for event, number, data in messages(answer.iter_lines()):
                    if event == "done":
                        done = json.loads(data)["status"]
                    elif event == "event":
                        seen.append(int(number))
                        cut_after -= 1
                    if done is not None or not cut_after or time.monotonic() > user.clock.give_up:
                        break
        except httpx.TransportError:
            time.sleep(PAUSE)
    user.journal.add("stream", id=id, seqs=seen, done=done)
    if done is not None:
        user.journal.add("seen", id=id, state=done)


def messages(lines: Iterator[str]) -> Iterator[tuple[str, str, str]]:
    """(event, id, data) of a text/event-stream."""
    message: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if not line and message:
            yield message.get("event", ""), message.get("id", ""), message.get("data", "")
            message = {}
        elif name:
            message[name] = value


ACTORS: dict[str, Callable[[User], None]] = {
    "uploader": uploader,
    "trainer": trainer,
    "captioner": captioner,
    "scorer": scorer,
    "reader": reader,
    "follower": follower,
}


class Load:
    """Every actor at work."""

    def __init__(self, world: World, journal: Journal, seed: int, seconds: float, patience: float) -> None:
        self.clock = Clock(seconds, patience)
        self._journal = journal
        self._threads = []
        for name, actor in ACTORS.items():
            user = User(world, journal, random.Random(f"{seed}/{name}"), self.clock)
            self._threads.append(threading.Thread(target=self._run, args=(name, actor, user), name=name, daemon=True))
        for thread in self._threads:
            thread.start()

    def _run(self, name: str, actor: Callable[[User], None], user: User) -> None:
        try:
            actor(user)
        except Exception as error:
            self._journal.add("driver_error", actor=name, error=f"{type(error).__name__}: {error}")
        finally:
            user.http.close()

    def going(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> bool:
        """Whether every actor came to its end."""
        for thread in self._threads:
            thread.join(max(0.1, self.clock.give_up + 10 - time.monotonic()))
        return not self.going()
