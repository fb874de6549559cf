"""What a caption job will ask for: which images, with which prompts, under which keys. The job, its preview and the
check at submission read it here; what of it exists already, `reuse.py` says. Images come in keyset pages, so that
memory does not grow with the data set."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, exists, func, insert, literal, select
from sqlalchemy.orm import Session, aliased

from services.captioner.prompts import characteristic_name, render
from shared.core import Core
from shared.datasets.splits import few_shot
from shared.db.models import FINAL, Caption, CaptionJobItem, Image, Job
from shared.errors import Conflict, InvalidInput, NotFound
from shared.schemas.captions import CaptionJobRequest, Redo
from shared.web.auth import Principal

PAGE = 256  # images
ASKED = 64  # characters of a key that say what the model was asked; the rest says how its answer is finished


class Picture(NamedTuple):
    """Of an image, what captioning it needs."""

    id: str
    path: str
    class_name: str
    sha256: str
    media_type: str


class Wanted(NamedTuple):
    """One caption of a job. `key`: see `asks`."""

    image: Picture
    characteristic: str
    prompt: str
    seed: int
    key: str
    replaces: bool = False  # what the image has under this key

    @property
    def asked(self) -> str:
        """Equal for all captions that the same model output serves, on images with the same bytes."""
        return self.key[:ASKED]


@dataclass(frozen=True)
class Selection:
    """The images of a job: those that `where` admits, or of them these ids (shots, limits and redos are drawn once)."""

    where: tuple[ColumnElement[bool], ...]
    ids: Sequence[str] | None = None


# -- which images ------------------------------------------------------------------------------------------------------


def select_images(session: Session, request: CaptionJobRequest, job_id: str | None = None) -> Selection:
    """The images of a request's split, shots, limit or redo. `job_id`: the job that does the request, where there is
    one already (a redo then goes by what `take_over` left to it). Shots are those that training draws."""
    if request.redo is not None:
        again = to_redo(request.redo, job_id).with_only_columns(Caption.image_id).distinct()
        return Selection((Image.dataset_id == request.dataset_id,), sorted(session.scalars(again)))
    where = (Image.dataset_id == request.dataset_id, Image.split == request.split)
    ids: list[str] | None = None
    if request.shots is not None:
        rows = session.execute(select(Image.class_name, Image.path, Image.id).where(*where)).all()
        by_class: dict[str, list[str]] = {}
        for row in rows:
            by_class.setdefault(row.class_name, []).append(row.path)
        chosen = set(few_shot(by_class, request.shots, request.shot_seed)[0])
        ids = sorted(row.id for row in rows if row.path in chosen)
    if request.limit is not None:
        numbered = select(
            Image.id,
            Image.class_name,
            func.row_number().over(partition_by=Image.class_name, order_by=Image.id).label("place"),
        ).where(*where)
        if ids is not None:
            numbered = numbered.where(Image.id == func.any(ids))
        by_place = numbered.subquery().c
        query = select(by_place.id).order_by(by_place.place, by_place.class_name).limit(request.limit)
        ids = sorted(session.scalars(query))
    return Selection(where, ids)


def count_images(session: Session, selection: Selection) -> int:
    if selection.ids is not None:
        return len(selection.ids)
    return session.execute(select(func.count()).select_from(Image).where(*selection.where)).scalar_one()


def image_pages(core: Core, selection: Selection, size: int = PAGE) -> Iterator[list[Picture]]:
    """The images in id order, each page in a transaction of its own."""
    columns = select(Image.id, Image.path, Image.class_name, Image.sha256, Image.media_type).order_by(Image.id)
    if selection.ids is not None:
        left = iter(selection.ids)
        while ids := list(islice(left, size)):
            yield _pictures(core, columns.where(Image.id.in_(ids)))
        return
    query = columns.where(*selection.where).limit(size)
    page = _pictures(core, query)
    while page:
        yield page
        page = _pictures(core, query.where(Image.id > page[-1].id))


def _pictures(core: Core, query: Select[str, str, str, str, str]) -> list[Picture]:
    with core.transaction() as session:
        return [Picture(*row) for row in session.execute(query)]


# -- which captions ----------------------------------------------------------------------------------------------------


def asks(
    request: CaptionJobRequest, model: dict[str, Any], display_name: str, samples: int | None = None
) -> list[tuple[str, str, int, str]]:
    """The captions of every image of a class: (characteristic, prompt, seed, key). `model`: what the captioner's model
    list says of it; `samples`: of each prompt, where not as many as the request says.

    A key's first part hashes what the model is asked: prompt, model, revision, generation parameters, seed, and the
    metadata that engines without a language model go by. Its second part hashes what decides how the answer is asked
    for in fewer words, cut and checked, so that a job for another CLIP has captions of its own, made from the same
    answers."""
    finishing = _digest([request.clip_model, request.reasks, request.shear_tokens, request.language])[:12]
    found = []
    for each in request.characteristics:
        told = metadata(request, characteristic_name(each), display_name, request.words)
        prompt = render(each, class_name=display_name, domain=told["domain"], words=request.words)
        for seed in range(request.seed, request.seed + (samples or request.samples_per_prompt)):
            identity = [prompt, told, request.engine, model["revision"], generation(request), seed]
            found.append((told["characteristic"], prompt, seed, f"{_digest(identity)}-{finishing}"))
    return found


def generation(request: CaptionJobRequest) -> dict[str, Any]:
    """Parameters of the generation besides its seed; two tokens a word leave room to end the sentence."""
    return {"temperature": request.temperature, "max_tokens": 2 * request.words + 20}


def metadata(request: CaptionJobRequest, characteristic: str, display_name: str, words: int) -> dict[str, str]:
    """What is told to the engine besides the prompt."""
    assert request.domain is not None  # filled at submission
    return {
        "class_name": display_name,
        "domain": request.domain,
        "characteristic": characteristic,
        "words": str(words),
    }


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


# -- redoing a selection of an earlier job's captions ------------------------------------------------------------------


def to_redo(redo: Redo, job_id: str | None = None) -> Select[Caption]:
    """The captions to be asked for anew. Once the job has taken over the others, what is left is the selection: flags
    may change while it works, and its own captions come to belong to it one by one."""
    query = select(Caption).join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id)
    query = query.where(CaptionJobItem.job_id == redo.caption_job_id)
    if job_id is not None:
        mine = aliased(CaptionJobItem)
        return query.where(~exists().where(mine.job_id == job_id, mine.caption_id == Caption.id))
    if redo.caption_ids is not None:
        query = query.where(Caption.id.in_(redo.caption_ids))
    if redo.class_name is not None:
        of_class = aliased(Image)
        query = query.join(of_class, of_class.id == Caption.image_id).where(of_class.class_name == redo.class_name)
    if redo.flag is not None:
        query = query.where((Caption.flags + CaptionJobItem.flags).contains([redo.flag]))
    if redo.excluded is not None:
        query = query.where(Caption.excluded == redo.excluded)
    return query


def take_over(session: Session, redo: Redo, job_id: str) -> None:
    """Makes the captions that are not redone the job's own; once, whatever is resumed later."""
    if session.scalar(select(exists().where(CaptionJobItem.job_id == job_id))):
        return
    others = (
        select(CaptionJobItem.caption_id)
        .where(CaptionJobItem.job_id == redo.caption_job_id)
        .except_(to_redo(redo).with_only_columns(Caption.id))
        .subquery()
    )
    rows = select(literal(job_id), others.c.caption_id)
    session.execute(insert(CaptionJobItem).from_select(["job_id", "caption_id"], rows))


def check_redo(session: Session, who: Principal, request: CaptionJobRequest) -> None:
    """Called at submission. Raises NotFound, Conflict or InvalidInput where the redo cannot be done."""
    redo = request.redo
    if redo is None:
        return
    query = select(Job).where(Job.id == redo.caption_job_id, Job.kind == "caption", who.sees(Job.owner))
    job = session.scalar(query)
    if job is None or job.dataset_id != request.dataset_id:
        raise NotFound(
            f"there is no caption job '{redo.caption_job_id}' of {request.dataset_id} among yours",
            param="redo.caption_job_id",
        )
    if job.status not in FINAL:
        raise Conflict(
            f"{job.id} is {job.status}; cancel it or wait until it has ended",
            code="caption_job_not_ready",
            param="redo.caption_job_id",
        )
    if request.shots is not None or request.limit is not None:
        raise InvalidInput(
            "a redo's images are those of the selected captions; leave out 'shots' and 'limit'",
            code="redo_has_its_images",
            param="limit" if request.shots is None else "shots",
        )
    selected = set(session.scalars(to_redo(redo).with_only_columns(Caption.characteristic).distinct()))
    if not selected:
        raise InvalidInput(f"the redo selects none of the captions of {job.id}", code="empty_redo", param="redo")
    given = {characteristic_name(each) for each in request.characteristics}
    if missing := sorted(selected - given):
        raise InvalidInput(
            f"the redo selects captions of the characteristics {', '.join(missing)}, and the request says nothing of "
            "how to ask for these; add them to 'characteristics'",
            code="characteristic_missing",
            param="characteristics",
        )
