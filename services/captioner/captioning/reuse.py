"""What a job finds done already, so that no model output is paid for twice.

The very caption, of the same image: the job takes it as it is, edits included. The same question asked about the same
bytes elsewhere among the owner's data sets: the answer is copied. Nothing is ever taken from another owner."""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from services.captioner.captioning.planning import ASKED, Picture, Wanted, asks, to_redo
from shared.clip.templates import display_name
from shared.db.models import Caption, CaptionJobItem
from shared.schemas.captions import CaptionJobRequest, Redo

# One row per question, however many images have the same bytes: one that was finished alike, if there is one.
_ANSWERED = text("""
    SELECT wanted.sha256, found.id, found.key, found.provenance
    FROM unnest(CAST(:sha256 AS text[]), CAST(:key AS text[]), CAST(:asked AS text[])) AS wanted(sha256, key, asked)
    CROSS JOIN LATERAL (
        SELECT captions.id, captions.key, captions.provenance
        FROM images JOIN captions ON captions.image_id = images.id
        WHERE images.sha256 = wanted.sha256 AND images.owner = :owner AND captions.owner = :owner
          AND starts_with(captions.key, wanted.asked)
        ORDER BY captions.key <> wanted.key
        LIMIT 1
    ) AS found
""")


class Answer(NamedTuple):
    """A caption that holds the answer to a question."""

    caption_id: str
    key: str
    provenance: dict[str, Any]

    @property
    def source(self) -> dict[str, Any]:
        """Of a copy's provenance."""
        return {"caption_id": self.caption_id, "job_id": self.provenance.get("job_id")}


class _There(NamedTuple):
    id: str
    image_id: str
    characteristic: str
    jobs: set[str]  # whose caption it is


@dataclass
class Survey:
    """What a page of images still needs."""

    images: int
    todo: list[tuple[Picture, list[Wanted]]] = field(default_factory=list)  # to ask the model for
    links: list[str] = field(default_factory=list)  # captions that are there and become the job's
    copies: list[tuple[Wanted, Answer]] = field(default_factory=list)


class Surveyor:
    """`names`: display names by class. `job_id`: None before there is a job (a preview)."""

    def __init__(
        self,
        request: CaptionJobRequest,
        model: dict[str, Any],
        names: Mapping[str, str],
        owner: str,
        job_id: str | None = None,
    ) -> None:
        self._request, self._model, self._names = request, model, names
        self._owner, self._job_id = owner, job_id
        self._asks: dict[tuple[str, int], list[tuple[str, str, int, str]]] = {}

    def display_name(self, class_name: str) -> str:
        return self._names.get(class_name) or display_name(class_name)

    def wanted(self, image: Picture, samples: int | None = None) -> list[Wanted]:
        """An image's captions; prompts and keys are made once per class. `samples`: see `planning.asks`."""
        samples = samples or self._request.samples_per_prompt
        found = self._asks.get((image.class_name, samples))
        if found is None:
            found = asks(self._request, self._model, self.display_name(image.class_name), samples)
            if len(self._asks) == 256:
                self._asks.clear()  # classes come in any order and number
            self._asks[image.class_name, samples] = found
        return [Wanted(image, *each) for each in found]

    def survey(self, session: Session, images: Sequence[Picture]) -> Survey:
        """A few queries, whatever the number of images."""
        survey = Survey(len(images))
        again: set[str] = set()
        if self._request.redo is None:
            pages = [(image, self.wanted(image)) for image in images]
            there = self._there(session, images, {each.key for _, wanted in pages for each in wanted})
        else:
            there = self._there(session, images)
            again = self._to_redo(session, self._request.redo, there)
            pages = self._redone(self._request.redo, images, there, again)
        missing: list[tuple[Picture, list[Wanted]]] = []
        for image, wanted in pages:
            lacking: list[Wanted] = []
            for each in wanted:
                found = there.get((image.id, each.key))
                if found is not None and self._job_id in found.jobs:
                    continue
                if self._request.mode == "overwrite" or (found is not None and found.id in again):
                    lacking.append(each._replace(replaces=True))
                elif found is not None:
                    survey.links.append(found.id)
                else:
                    lacking.append(each)
            if lacking:
                missing.append((image, lacking))
        answered = self._answered(session, [each for _, lacking in missing for each in lacking if not each.replaces])
        for image, lacking in missing:
            todo = []
            for each in lacking:
                answer = None if each.replaces else answered.get((image.sha256, each.asked))
                if answer is None:
                    todo.append(each)
                else:
                    survey.copies.append((each, answer))
            if todo:
                survey.todo.append((image, todo))
        return survey

    def _redone(
        self, redo: Redo, images: Sequence[Picture], there: Mapping[tuple[str, str], _There], again: Set[str]
    ) -> list[tuple[Picture, list[Wanted]]]:
        """As many of each image and characteristic as are selected, less those that an earlier attempt wrote. First
        those of the very keys that are selected, then by seeds counted up, over those that the job has already."""
        left, most = Counter[tuple[str, str]](), Counter[tuple[str, str]]()  # by image and characteristic
        taken, selected = set[tuple[str, str]](), set[tuple[str, str]]()  # image and key
        for place, each in there.items():
            about = each.image_id, each.characteristic
            earlier, mine = redo.caption_job_id in each.jobs, self._job_id in each.jobs
            most[about] += mine or earlier
            if each.id in again:
                selected.add(place)
                left[about] += 1
            elif mine or earlier:
                taken.add(place)
                left[about] -= not earlier
        samples = max(most.values(), default=1)  # enough, whichever seeds are taken
        pages = []
        for image in images:
            chosen = []
            free = [each for each in self.wanted(image, samples) if (image.id, each.key) not in taken]
            free.sort(key=lambda each: (each.image.id, each.key) not in selected)
            for wanted in free:
                about = image.id, wanted.characteristic
                if left[about] > 0:
                    left[about] -= 1
                    chosen.append(wanted)
            pages.append((image, chosen))
        return pages

    def _there(
        self, session: Session, images: Sequence[Picture], keys: Set[str] | None = None
    ) -> dict[tuple[str, str], _There]:
        """By (image, key); keys: these alone. Two look-ups by an index each: PostgreSQL takes a job that is new for one
        of few captions, and a join would read all that it has by now, for every page."""
        query = select(Caption.image_id, Caption.key, Caption.id, Caption.characteristic)
        query = query.where(Caption.image_id.in_([image.id for image in images]))
        if keys is not None:
            query = query.where(Caption.key == func.any(list(keys)))
        rows = session.execute(query).all()
        jobs: dict[str, set[str]] = {}
        items = select(CaptionJobItem.caption_id, CaptionJobItem.job_id)
        for id, job_id in session.execute(items.where(CaptionJobItem.caption_id == func.any([row.id for row in rows]))):
            jobs.setdefault(id, set()).add(job_id)
        none: set[str] = set()
        return {
            (row.image_id, row.key): _There(row.id, row.image_id, row.characteristic, jobs.get(row.id, none))
            for row in rows
        }

    def _to_redo(self, session: Session, redo: Redo, there: Mapping[tuple[str, str], _There]) -> set[str]:
        """Ids of those that are asked for anew; see `planning.to_redo`."""
        if self._job_id is not None:
            return {
                each.id for each in there.values() if redo.caption_job_id in each.jobs and self._job_id not in each.jobs
            }
        ids = [each.id for each in there.values()]
        return set(session.scalars(to_redo(redo).with_only_columns(Caption.id).where(Caption.id == func.any(ids))))

    def _answered(self, session: Session, wanted: Sequence[Wanted]) -> dict[tuple[str, str], Answer]:
        questions = {(each.image.sha256, each.asked): each.key for each in wanted}
        if not questions:
            return {}
        rows = session.execute(
            _ANSWERED,
            {
                "sha256": [sha256 for sha256, _ in questions],
                "asked": [asked for _, asked in questions],
                "key": list(questions.values()),
                "owner": self._owner,
            },
        )
        return {(row.sha256, row.key[:ASKED]): Answer(row.id, row.key, row.provenance) for row in rows}
