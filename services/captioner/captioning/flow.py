"""The flow of a caption job: pages of images in, captions out, with as many requests in flight as the captioner takes.

    page of images -> survey (what is there, what can be copied) -> pictures, read ahead -> requests -> rows -> batches

One event loop does the asking; the database and the store are read and written by threads beside it. There is no
barrier: while a batch is written and the next page is surveyed, requests stay in flight. Memory is that of a page, the
pictures in flight and a few batches of rows, whatever the number of images."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from io import BytesIO

from sqlalchemy.exc import OperationalError, SQLAlchemyError

from services.captioner.captioning.asking import Asker
from services.captioner.captioning.planning import PAGE, Picture, Selection, Wanted, image_pages
from services.captioner.captioning.remote import encode_picture
from services.captioner.captioning.reuse import Answer, Survey, Surveyor
from services.captioner.captioning.writing import Row, write
from shared.datasets.images import decode
from shared.errors import CaptuneError, InvalidInput, NotFound
from shared.jobs import Interrupted, LeaseLost
from shared.jobs.claim import Claim

log = logging.getLogger(__name__)

CHECK_SECONDS = 0.2  # between looks at whether the job must stop
FLUSH_SECONDS = 0.5  # the most work that a kill costs
BATCH = 1000  # rows that are written without waiting for that
BACKLOG = 4 * BATCH  # rows that wait for a slow database before the asking waits too
FLUSH_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries to reach a database that is away
REMEMBERED = BACKLOG  # questions, with their answers, that later images with the same bytes may share
READERS = 4  # threads that read pictures
KEPT_FAILURES = 100
BROWSER_TYPES = ("image/jpeg", "image/png", "image/webp")  # other formats are sent as PNG


@dataclass
class Outcome:
    images: int = 0
    failed: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)  # the first ones

    def refuse(self, path: str, error: CaptuneError) -> None:
        self.failed += 1
        if len(self.failures) < KEPT_FAILURES:
            self.failures.append({"path": path, "code": error.code, "message": error.message})


@asynccontextmanager
async def watched(claim: Claim) -> AsyncIterator[None]:
    """Cancels what runs in the block as soon as the claim says stop, and raises what it said. An error of the block is
    raised as it is, not as a group."""

    async def watch() -> None:
        while True:
            claim.check()
            await asyncio.sleep(CHECK_SECONDS)

    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(watch())
            yield
            watcher.cancel()
    except BaseExceptionGroup as errors:
        raised = list(_leaves(errors))
        raise next((each for each in raised if isinstance(each, Interrupted)), raised[0]) from None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


@dataclass
class _Begun:
    """An image whose captions are being asked for. Its bytes are read once and held until the last is answered."""

    left: int
    picture: asyncio.Future[bytes] | None = None  # until the first of its captions is asked for itself


Question = tuple[str, str]  # sha256, `Wanted.asked`
Answered = asyncio.Future[Row | CaptuneError]  # the caption, or its refusal


class Flow:
    """One run over the images of a job. Use once, inside an event loop."""

    def __init__(
        self, claim: Claim, selection: Selection, total: int, surveyor: Surveyor, asker: Asker, concurrency: int
    ) -> None:
        self._claim, self._selection, self._total = claim, selection, total
        self._surveyor, self._asker = surveyor, asker
        self._most = concurrency + max(8, concurrency // 8)  # captions begun: a few pictures are read before their turn
        self._begun = 0
        self._rows: list[Row] = []
        self._links: list[str] = []
        self._room, self._full = asyncio.Event(), asyncio.Event()
        self._asked_all = False
        self._questions: OrderedDict[Question, Answered] = OrderedDict()  # the last ones, answered or in flight
        self._surveying = ThreadPoolExecutor(1, "survey")
        self._reading = ThreadPoolExecutor(READERS, "read")
        self._writing = ThreadPoolExecutor(1, "write")
        self.outcome = Outcome()

    async def run(self) -> Outcome:
        """Whatever ends it early, what was finished is written first."""
        with closing(self._asker), self._surveying, self._reading, self._writing:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._write())
                    async with asyncio.TaskGroup() as asking:
                        await self._ask(asking)
                    self._asked_all = True
                    self._full.set()
            except BaseException:
                try:
                    await self._flush()
                except (LeaseLost, SQLAlchemyError) as error:
                    log.warning(
                        "finished captions were not kept", extra={"job_id": self._claim.id, "error": str(error)}
                    )
                raise
        return self.outcome

    # -- asking ----------------------------------------------------------------------------------------------------

    async def _ask(self, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        async for survey in self._surveys():
            self._links += survey.links
            self._ripe()
            todo: dict[Picture, list[tuple[Wanted, Answer | None]]]
            todo = {image: [(each, None) for each in wanted] for image, wanted in survey.todo}
            for start in range(0, len(survey.copies), PAGE):
                await self._turn()
                copies = survey.copies[start : start + PAGE]
                for (wanted, answer), row in zip(copies, await asyncio.gather(*map(self._copy, copies)), strict=True):
                    if row is None:
                        todo.setdefault(wanted.image, []).append((wanted, answer))
                    else:
                        self._add(row)
            self.outcome.images += survey.images - len(todo)
            for image, asked in todo.items():
                await self._turn()
                begun = _Begun(len(asked))
                self._begun += len(asked)
                for wanted, first in asked:
                    question = image.sha256, wanted.asked
                    known = None if wanted.replaces else self._questions.get(question)
                    if known is not None:
                        group.create_task(self._twin(wanted, known, begun))
                        continue
                    if begun.picture is None:
                        begun.picture = loop.run_in_executor(self._reading, self._read, image)
                    answered: Answered = loop.create_future()
                    if not wanted.replaces:
                        self._remember(question, answered)
                    group.create_task(self._one(wanted, first, begun.picture, answered, begun))
            await self._turn()

    def _remember(self, question: Question, answered: Answered) -> None:
        self._questions[question] = answered
        if len(self._questions) > REMEMBERED:
            self._questions.popitem(last=False)

    async def _copy(self, found: tuple[Wanted, Answer]) -> Row | None:
        wanted, answer = found
        return await self._asker.copy(wanted, answer, self._name(wanted))

    def _name(self, wanted: Wanted) -> str:
        return self._surveyor.display_name(wanted.image.class_name)

    async def _surveys(self) -> AsyncIterator[Survey]:
        """Each while the next one is made."""
        loop, pages = asyncio.get_running_loop(), self._pages()
        ahead = loop.run_in_executor(self._surveying, next, pages, None)
        while (survey := await ahead) is not None:
            ahead = loop.run_in_executor(self._surveying, next, pages, None)
            yield survey

    def _pages(self) -> Iterator[Survey]:
        for page in image_pages(self._claim.core, self._selection):
            with self._claim.core.transaction() as session:
                survey = self._surveyor.survey(session, page)
            yield survey

    async def _turn(self) -> None:
        """Waits while enough is begun, or the database is behind."""
        while self._begun >= self._most or len(self._rows) + len(self._links) >= BACKLOG:
            self._room.clear()
            await self._room.wait()

    def _read(self, image: Picture) -> bytes:
        data, media_type = self._claim.core.store.read_blob(image.sha256), image.media_type
        if media_type not in BROWSER_TYPES:
            out = BytesIO()
            decode(data).save(out, "PNG")
            data, media_type = out.getvalue(), "image/png"
        return encode_picture(data, media_type)

    async def _one(
        self,
        wanted: Wanted,
        first: Answer | None,
        picture: asyncio.Future[bytes],
        answered: Answered,
        begun: _Begun,
    ) -> None:
        """A refusal of one caption is an answer, not the end of the job; so is a picture that the store has lost."""
        result: Row | CaptuneError
        try:
            result = await self._asker.ask(wanted, await picture, self._name(wanted), first)
        except (InvalidInput, NotFound) as refused:
            result = refused
        self._end(wanted, result, begun)
        answered.set_result(result)

    async def _twin(self, wanted: Wanted, known: Answered, begun: _Begun) -> None:
        """The same question about the same bytes as in another image of the job: its answer is copied."""
        result = await asyncio.shield(known)  # whoever is cancelled here does not cancel it for the others
        if not isinstance(result, CaptuneError):
            copied = await self._copy((wanted, Answer(result["id"], result["key"], result["provenance"])))
            assert copied is not None  # finished alike
            result = copied
        self._end(wanted, result, begun)

    def _end(self, wanted: Wanted, result: Row | CaptuneError, begun: _Begun) -> None:
        if isinstance(result, CaptuneError):
            self.outcome.refuse(wanted.image.path, result)
        else:
            self._add(result)
        self._begun -= 1
        begun.left -= 1
        self.outcome.images += not begun.left
        self._room.set()

    # -- writing ---------------------------------------------------------------------------------------------------

    def _add(self, row: Row) -> None:
        self._rows.append(row)
        self._ripe()

    def _ripe(self) -> None:
        if len(self._rows) + len(self._links) >= BATCH:
            self._full.set()

    async def _write(self) -> None:
        while not self._asked_all:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), FLUSH_SECONDS)
            await self._flush_patiently()
            self._full.clear()
            self._ripe()
        await self._flush_patiently()

    async def _flush_patiently(self) -> None:
        """A database that restarts, or broke a deadlock at this transaction's cost, is asked again."""
        for pause in FLUSH_PAUSES:
            try:
                return await self._flush()
            except OperationalError as error:
                log.warning(
                    "captions wait for the database", extra={"job_id": self._claim.id, "error": str(error.orig)}
                )
            await asyncio.sleep(pause)
        await self._flush()

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writing, self._commit, self.outcome.images)
        self._room.set()

    def _commit(self, images: int) -> None:
        """Runs on the one writing thread, while more is appended. What is not committed stays for the next time."""
        claim = self._claim
        rows, links = self._rows[:], self._links[:]
        if rows or links:
            assert claim.dataset_id is not None
            with claim.transaction() as session:
                where = {"job_id": claim.id, "owner": claim.owner, "dataset_id": claim.dataset_id}
                if write(session, **where, rows=rows, links=links):
                    claim.advanced(session)  # what is there already is no progress, or attempts would have no bound
            del self._rows[: len(rows)]
            del self._links[: len(links)]
        claim.progress("captioning", images, self._total)
