"""What a caption job was asked for, made whole: everything that can be refused is refused before a job is made."""

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.captioner.captioning.planning import check_redo
from services.captioner.prompts import check_template
from services.captioner.quality.inspect import Inspector
from services.captioner.serving.batcher import Batcher
from shared.clip.tokens import published, token_counter
from shared.config import CoreSettings
from shared.datasets.lookup import display_names, usable_dataset
from shared.datasets.report import listed
from shared.db.models import CaptionJobItem, Dataset, Job
from shared.errors import InvalidInput
from shared.jobs.routes import get_job
from shared.schemas.captions import CaptionJobRequest, Redo, Template
from shared.web.auth import Principal

NEXT_SEED = 1009  # a redo is drawn anew: further than any job's samples reach, and prime
MAX_SEED = 2**31 - 10  # exclusive


def batchers_of(request: Request) -> Mapping[str, Batcher]:
    """The models this process serves; none where it serves routes alone."""
    batchers: Mapping[str, Batcher] = getattr(request.app.state, "batchers", {})
    return batchers


def resolve(
    session: Session, settings: CoreSettings, who: Principal, body: CaptionJobRequest, batchers: Mapping[str, Batcher]
) -> tuple[Dataset, CaptionJobRequest]:
    """The data set, locked, and the request with nothing left to fill in. Raises what a user can mend.

    An engine is known here only where this process serves models; elsewhere the job finds out."""
    dataset = usable_dataset(session, who, body.dataset_id, lock=True)
    if body.redo is not None:
        body = _inherit(session, who, body, body.redo)
        check_redo(session, who, body)
    if body.domain is None:
        body = body.model_copy(update={"domain": dataset.domain})
    for each in body.characteristics:
        if isinstance(each, Template):
            check_template(each)
    if not published(body.clip_model):  # a published one's tokenizer may be on a hub: the job fetches it
        counter = token_counter(body.clip_model, settings.model_cache, settings.model_roots)
        if body.shear_tokens is not None:
            Inspector(counter, list(display_names(dataset).values()), shear_tokens=body.shear_tokens)
    if batchers and body.engine not in batchers:
        raise InvalidInput(
            f"the captioner does not serve '{body.engine}'; it serves: {', '.join(sorted(batchers))}",
            code="unknown_engine",
            param="engine",
        )
    return dataset, body


def _inherit(session: Session, who: Principal, body: CaptionJobRequest, redo: Redo) -> CaptionJobRequest:
    """Fields that were not sent are the earlier job's; the seed is another, so that the texts are too. Which images
    are captioned, the selection says."""
    base = get_job(session, who, "caption", redo.caption_job_id)
    known = CaptionJobRequest.model_fields.keys() - {"source", "dataset_id", "redo", "shots", "limit"}
    inherited: dict[str, Any] = {name: value for name, value in base.request.items() if name in known}
    if "seed" in inherited:
        inherited["seed"] = (inherited["seed"] + NEXT_SEED) % MAX_SEED
    sent = body.model_dump(exclude_unset=True)
    try:
        whole = CaptionJobRequest.model_validate(inherited | sent)
    except ValidationError as error:  # what was sent does not go with what is inherited
        reasons = "; ".join(each["msg"] for each in error.errors())
        raise InvalidInput(
            f"with what is taken over from {base.id}: {reasons}", code="invalid_request", param="redo"
        ) from error
    _check_ids(session, base, redo)
    return whole


def _check_ids(session: Session, base: Job, redo: Redo) -> None:
    """Captions named one by one are the job's."""
    wanted = set(redo.caption_ids or ())
    mine = (CaptionJobItem.job_id == base.id, CaptionJobItem.caption_id.in_(wanted))
    foreign = wanted.difference(session.scalars(select(CaptionJobItem.caption_id).where(*mine)))
    if foreign:
        raise InvalidInput(
            f"{base.id} has no caption {listed(sorted(foreign))}; GET /v1/datasets/{base.dataset_id}/captions"
            f"?caption_job_id={base.id} lists those it has",
            code="unknown_captions",
            param="redo.caption_ids",
        )
