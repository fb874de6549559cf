"""The flow of a caption job: pages of images in, captions out, with as many requests in flight as the captioner takes.

    page of images -> survey (what is there, what can be copied) -> pictures, read ahead -> requests -> rows -> batches

One event loop does the asking; the database and the store are read and written by threads beside it. There is no
barrier: while a batch is written and the next page is surveyed, requests stay in flight. Memory is that of a page, the
pictures in flight and a few batches of rows, whatever the number of images."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from io import BytesIO

from sqlalchemy.exc import SQLAlchemyError

from services.captioner.asking import Asker
from services.captioner.planning import PAGE, Picture, Selection, Wanted, image_pages
from services.captioner.remote import encode_picture
from services.captioner.reuse import Answer, Survey, Surveyor
from services.captioner.writing import Row, write
from shared.datasets.images import decode
from shared.errors import CaptuneError, InvalidInput, NotFound
from shared.jobs import Interrupted, LeaseLost
from shared.jobs.claim import Claim

log = logging.getLogger(__name__)

CHECK_SECONDS = 0.2  # between looks at whether the job must stop
FLUSH_SECONDS = 0.5  # the most work that a kill costs
BATCH = 1000  # rows that are written without waiting for that
BACKLOG = 4 * BATCH  # rows that wait for a slow database before the asking waits too
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

    picture: asyncio.Future[bytes]
    left: int


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
            self.outcome.images += survey.images - len(survey.todo)
            for start in range(0, len(survey.copies), PAGE):
                await self._turn()
                for row in await asyncio.gather(*map(self._copy, survey.copies[start : start + PAGE])):
                    self._add(row)
            for image, todo in survey.todo:
                await self._turn()
                begun = _Begun(loop.run_in_executor(self._reading, self._read, image), len(todo))
                self._begun += len(todo)
                for each in todo:
                    group.create_task(self._one(each, begun))
            await self._turn()

    async def _copy(self, found: tuple[Wanted, Answer]) -> Row:
        wanted, answer = found
        return await self._asker.copy(wanted, answer, self._surveyor.display_name(wanted.image.class_name))

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

    async def _one(self, wanted: Wanted, begun: _Begun) -> None:
        """A refusal of one caption is an answer, not the end of the job; so is a picture that the store has lost."""
        try:
            picture = await begun.picture
            self._add(await self._asker.ask(wanted, picture, self._surveyor.display_name(wanted.image.class_name)))
        except (InvalidInput, NotFound) as refused:
            self.outcome.refuse(wanted.image.path, refused)
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
            self._full.clear()
            await self._flush()
        await self._flush()

    async def _flush(self) -> None:
        rows, self._rows = self._rows, []
        links, self._links = self._links, []
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writing, self._commit, rows, links, self.outcome.images)
        self._room.set()

    def _commit(self, rows: list[Row], links: list[str], images: int) -> None:
        claim = self._claim
        if rows or links:
            assert claim.dataset_id is not None
            with claim.transaction() as session:
                where = {"job_id": claim.id, "owner": claim.owner, "dataset_id": claim.dataset_id}
                if write(session, **where, rows=rows, links=links):
                    claim.advanced(session)  # what is there already is no progress, or attempts would have no bound
        claim.progress("captioning", images, self._total)
