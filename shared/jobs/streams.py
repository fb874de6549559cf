"""Event streams: one thread of an API process reads the ledger for all that are open.

A stream that has sent all it had asks for what comes after its last event, and waits. The thread looks every tick
whether there is something new of the jobs asked about, in one query for all of them, and answers those it found
something for. So what is read follows from the ledger and the number of the last event sent, and from nothing else:
there is no gap and no doubling, whichever process a client reconnects to, and while the database is away the streams
wait. A slow reader asks for nothing meanwhile, holds nobody up and costs no more than the page it is being sent.

(LISTEN/NOTIFY would save the queries of idle times, 10 a second, and need this besides, for what is notified while its
connection is being made anew; and every commit that notifies takes one lock of the whole server.)"""

import asyncio
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from sqlalchemy import Row, text
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Message, Receive, Scope, Send

from shared.db.models import FINAL
from shared.db.session import Database, answered_within
from shared.errors import TooBusy
from shared.schemas import common
from shared.web import auth

log = logging.getLogger(__name__)

TICK = 0.1  # seconds between two looks; more where a look takes long, so that the thread is idle 9/10 of the time
BACK_OFF = 1.0  # seconds, while the database is away
ANSWER = 10.0  # seconds
PAGE = 200  # events that a stream is handed at a time
JOBS = 50  # whose events are read at a time
KEEP_ALIVE, STALLED = 15.0, 60.0  # seconds: without news; that a reader may take to receive one page
KEY_CHECK = 5.0  # seconds after which a revoked key's streams have ended
CHANGED = text("""
    SELECT w.n, j.id, j.status, j.event_seq, j.progress::text AS progress
    FROM unnest(CAST(:ids AS text[]), CAST(:seqs AS int[]), CAST(:progress AS text[]))
        WITH ORDINALITY AS w (id, seq, progress, n)
    LEFT JOIN jobs AS j ON j.id = w.id
    WHERE j.id IS NULL OR j.event_seq > w.seq OR j.progress::text IS DISTINCT FROM w.progress OR j.status = ANY(:final)
""")
EVENTS = text("""
    SELECT w.n, e.seq, e.level, e.type, e.message, e.data, e.created_at
    FROM unnest(CAST(:ids AS text[]), CAST(:seqs AS int[])) WITH ORDINALITY AS w (id, seq, n)
    CROSS JOIN LATERAL (
        SELECT * FROM job_events WHERE job_id = w.id AND seq > w.seq ORDER BY seq LIMIT :page
    ) AS e
    ORDER BY w.n, e.seq
""")


@dataclass(frozen=True)
class Position:
    """What a stream has sent: everything up to the event `seq`, and this progress (as PostgreSQL writes it)."""

    job_id: str
    seq: int
    progress: str | None = None


@dataclass(frozen=True)
class News:
    """Messages ready to be sent, and the position after them. `over`: the job is final and all of it was sent.
    `refused`: nothing more may be told, because the job is gone or the key is valid no more."""

    messages: str
    position: Position
    over: bool = False
    refused: bool = False


@dataclass(frozen=True, eq=False)
class _Question:
    position: Position
    key_hash: str | None
    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[News]"


class Streams:
    """The open streams of one API process."""

    def __init__(self, db: Database, most: int, most_per_owner: int) -> None:
        self._db, self._most, self._most_per_owner = db, most, most_per_owner
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()  # by owner
        self._questions: set[_Question] = set()
        self._thread: threading.Thread | None = None

    def open(self, owner: str) -> None:
        """Counts a stream in. Raises TooBusy."""
        with self._lock:
            total = self._open.total()
            if total >= self._most or self._open[owner] >= self._most_per_owner:
                limit = f"{self._most_per_owner} of yours" if total < self._most else f"{total}"
                raise TooBusy(
                    f"{limit} event streams are open, which is the limit; close some, or read the events page by page",
                    code="too_many_streams",
                    retry_after=5,
                )
            self._open[owner] += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._read, name="event-streams", daemon=True)
                self._thread.start()

    def close(self, owner: str) -> None:
        with self._lock:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]

    async def after(self, position: Position, key_hash: str | None) -> News:
        """Waits until there is something to tell. May be cancelled: what was not received is told to the next call."""
        loop = asyncio.get_running_loop()
        question = _Question(position, key_hash, loop, loop.create_future())
        with self._lock:
            self._questions.add(question)
        try:
            return await question.answer
        finally:
            with self._lock:
                self._questions.discard(question)

    def _read(self) -> None:
        """The thread: until no stream is open."""
        keys_checked, away = time.monotonic(), False
        while True:
            with self._lock:
                if not self._open:
                    self._thread = None
                    return
                questions = list(self._questions)
            began = time.monotonic()
            try:
                with answered_within(ANSWER):
                    if questions and began - keys_checked >= KEY_CHECK:
                        keys_checked = began
                        questions = self._refuse_revoked(questions)
                    if questions:
                        self._look(questions)
                away = False
                pause = min(BACK_OFF, max(TICK, 9 * (time.monotonic() - began)))
            except SQLAlchemyError as error:
                if not away:  # once an outage
                    log.warning("event streams wait for the database", extra={"error": str(error)})
                away, pause = True, BACK_OFF
            except Exception:  # the thread must live: everybody waits for it
                log.exception("event streams")
                pause = BACK_OFF
            time.sleep(pause)

    def _refuse_revoked(self, questions: list[_Question]) -> list[_Question]:
        hashes = {each.key_hash for each in questions if each.key_hash is not None}
        with self._db.transaction() as session:
            valid = auth.valid_hashes(session, hashes) | {None}
        self._answer(
            [(each, News("", each.position, refused=True)) for each in questions if each.key_hash not in valid]
        )
        return [each for each in questions if each.key_hash in valid]

    def _look(self, questions: Iterable[_Question]) -> None:
        """Answers what there is something new for."""
        asked: defaultdict[Position, list[_Question]] = defaultdict(list)
        for question in questions:
            asked[question.position].append(question)
        positions = list(asked)
        with self._db.autocommit() as connection:
            states = connection.execute(
                CHANGED,
                {
                    "ids": [each.job_id for each in positions],
                    "seqs": [each.seq for each in positions],
                    "progress": [each.progress for each in positions],
                    "final": list(FINAL),
                },
            ).all()
        for first in range(0, len(states), JOBS):
            found = [(positions[state.n - 1], state) for state in states[first : first + JOBS]]
            events: defaultdict[int, list[Row[Any]]] = defaultdict(list)
            with self._db.autocommit() as connection:  # after the states: a final job's last event is never missed
                at = {"ids": [each.job_id for each, _ in found], "seqs": [each.seq for each, _ in found], "page": PAGE}
                for row in connection.execute(EVENTS, at):
                    events[row.n].append(row)
            for number, (position, state) in enumerate(found, start=1):
                news = _news(position, state, events[number])
                self._answer([(question, news) for question in asked[position]])

    def _answer(self, answers: list[tuple[_Question, News]]) -> None:
        """From the thread, into the event loops."""
        with self._lock:
            self._questions.difference_update(question for question, _ in answers)
        for loop in {question.loop for question, _ in answers}:
            with suppress(RuntimeError):  # the loop was closed, and its streams with it
                loop.call_soon_threadsafe(_resolve, [each for each in answers if each[0].loop is loop])


def _resolve(answers: list[tuple[_Question, News]]) -> None:
    for question, news in answers:
        if not question.answer.done():  # it may have been cancelled
            question.answer.set_result(news)


def _news(position: Position, state: Row[Any], events: Sequence[Row[Any]]) -> News:
    if state.id is None:
        return News("", position, refused=True)
    messages = [_message("event", common.JobEvent.model_validate(row).model_dump_json(), row.seq) for row in events]
    seq = events[-1].seq if events else position.seq
    if len(events) == PAGE:  # there may be more, and they come first
        return News("".join(messages), Position(position.job_id, seq, position.progress))
    if state.progress is not None and state.progress != position.progress:
        messages.append(_message("progress", common.Progress.model_validate_json(state.progress).model_dump_json()))
    # All events up to the state are among those sent: they were read after it.
    return News("".join(messages), Position(position.job_id, seq, state.progress), over=state.status in FINAL)


def _message(event: str, data: str, id: int | None = None) -> str:
    number = "" if id is None else f"id: {id}\n"
    return f"{number}event: {event}\ndata: {data}\n\n"


class EventStream(StreamingResponse):
    """A job's events with their sequence number as id, `progress` messages between, the job itself (`done`) last. A
    stream that ends without `done` (the server stopped, the key was revoked, nothing was taken from it for a minute) is
    to be taken up again with Last-Event-ID."""

    def __init__(
        self,
        streams: Streams,
        owner: str,
        key_hash: str | None,
        start: Position,
        done: Callable[[], common.JobResource],
    ) -> None:
        """Counts the stream in, so raises TooBusy. `done` reads the finished job; it runs in a thread."""
        super().__init__(self._messages(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._streams, self._owner, self._key_hash, self._position, self._done = streams, owner, key_hash, start, done
        streams.open(owner)

    async def _messages(self) -> AsyncIterator[str]:
        while True:
            try:
                news = await asyncio.wait_for(self._streams.after(self._position, self._key_hash), KEEP_ALIVE)
            except TimeoutError:
                yield ": still here\n\n"  # keeps proxies from closing the stream
                continue
            if news.refused:
                return
            if news.messages:
                yield news.messages
            self._position = news.position
            if news.over:
                yield _message("done", (await run_in_threadpool(self._done)).model_dump_json())
                return

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the stream or the connection ends. (What Starlette does by itself depends on the server: with
        some, who has left is noticed at the next message only.)"""

        async def patiently(message: Message) -> None:
            async with asyncio.timeout(STALLED):
                await send(message)

        sending = asyncio.create_task(self.stream_response(patiently))
        leaving = asyncio.create_task(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except (TimeoutError, SQLAlchemyError) as error:
            log.info("an event stream was broken off", extra={"job_id": self._position.job_id, "error": str(error)})
        finally:
            self._streams.close(self._owner)
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
