"""The caption job: every image of a selection, one call per characteristic and sample, written in batches. Repeating
any step is harmless: a caption is unique by (image, key), and what the job has already it does not ask for again.

    job (this) -> flow -> planning, reuse (what to ask) -> asking -> remote (the captioner) ; writing (the rows)
"""

import asyncio
from collections.abc import Callable
from typing import Any

from sqlalchemy import Integer, cast, func, select
from sqlalchemy.orm import Session

from services.captioner.captioning.asking import Asker
from services.captioner.captioning.flow import Flow, Outcome, watched
from services.captioner.captioning.planning import Selection, count_images, select_images, take_over
from services.captioner.captioning.remote import CaptionClient, Captioner
from services.captioner.captioning.reuse import Surveyor
from services.captioner.captioning.writing import unlink_other_revisions
from services.captioner.quality.inspect import Inspector
from services.captioner.quality.passes import mark_duplicates, measure_agreement
from services.captioner.settings import CaptionWorkerSettings
from services.captioner.transfer.importing import import_captions
from shared.clip.tokens import token_counter
from shared.datasets.lookup import display_names
from shared.db.models import Caption, CaptionJobItem, Dataset
from shared.errors import InvalidInput
from shared.jobs.claim import Claim
from shared.jobs.worker import Finish
from shared.schemas.captions import CaptionJobRequest

Connect = Callable[[CaptionWorkerSettings], CaptionClient]


def caption(claim: Claim, settings: CaptionWorkerSettings | None = None, connect: Connect = Captioner) -> Finish:
    """The task of kind "caption". `connect`: how to reach the captioner."""
    if claim.request.get("source") == "import":
        return import_captions(claim)
    request = CaptionJobRequest.model_validate(claim.request)
    with claim.core.transaction() as session:
        names = display_names(session.get_one(Dataset, request.dataset_id))
    core = claim.core.settings
    counter = token_counter(request.clip_model, core.model_cache, core.model_roots)
    inspector = Inspector(
        counter,
        list(names.values()),
        shear_tokens=request.shear_tokens,
        language=request.language,
    )
    work = _work(claim, request, names, inspector, settings or CaptionWorkerSettings(), connect)
    model, outcome = asyncio.run(work)
    mark_duplicates(claim, claim.id)
    if request.agreement:
        measure_agreement(claim, claim.id, request.clip_model)
    return lambda session: _result(session, claim, request, model, outcome) | {"budget": counter.context_length}


async def _work(
    claim: Claim,
    request: CaptionJobRequest,
    names: dict[str, str],
    inspector: Inspector,
    settings: CaptionWorkerSettings,
    connect: Connect,
) -> tuple[dict[str, Any], Outcome]:
    async with connect(settings) as remote, watched(claim):
        model = await remote.model(request.engine)
        selection, total = await asyncio.to_thread(_prepare, claim, request, model)
        if not total and request.redo is None:
            raise InvalidInput(
                f"the split '{request.split}' has no images to caption", code="empty_split", param="split"
            )
        surveyor = Surveyor(request, model, names, claim.owner, claim.id)
        asker = Asker(request, model, inspector, remote, {"job_id": claim.id, "attempt": claim.attempt})
        flow = Flow(claim, selection, total, surveyor, asker, settings.caption_concurrency)
        return model, await flow.run()


def _prepare(claim: Claim, request: CaptionJobRequest, model: dict[str, Any]) -> tuple[Selection, int]:
    """The images, and how many. What the job has of another model, or takes over, is settled first."""
    with claim.transaction() as session:
        if claim.attempt > 1:
            unlink_other_revisions(session, claim.id, model["revision"], only_own=request.redo is not None)
        if request.redo is not None:
            take_over(session, request.redo, claim.id)
        selection = select_images(session, request, claim.id)
        return selection, count_images(session, selection)


def _result(
    session: Session, claim: Claim, request: CaptionJobRequest, model: dict[str, Any], outcome: Outcome
) -> dict[str, Any]:
    """Counted over the captions that the job delivered, whichever attempt or job wrote them."""
    provenance = Caption.provenance
    mine = (provenance["job_id"].astext == claim.id) & provenance["reused_from"].is_(None)
    query = (
        select(
            func.count(),
            func.count().filter(mine),
            func.count().filter(cast(provenance["reasks"].astext, Integer) > 0),
            func.count().filter(provenance["trimmed"].astext == "true"),
        )
        .select_from(Caption)
        .join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id)
        .where(CaptionJobItem.job_id == claim.id)
    )
    captions, written, reasked, trimmed = session.execute(query).one()
    if not captions:
        raise InvalidInput(
            f"the captioner refused all {outcome.failed} requests; the first: {outcome.failures[0]['message']}",
            code="nothing_captioned",
        )
    each = select(func.unnest(Caption.flags + CaptionJobItem.flags).label("flag"))
    each = each.join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id)
    flag = each.where(CaptionJobItem.job_id == claim.id).subquery().c.flag
    flags = session.execute(select(flag, func.count()).group_by(flag).order_by(flag))
    return {
        "images": outcome.images,
        "captions": captions,
        "written": written,
        "reused": captions - written,
        "failed": outcome.failed,
        "failures": outcome.failures,
        "reasked": reasked,
        "trimmed": trimmed,
        "flags": {name: count for name, count in flags},
        "captioner": {"engine": request.engine, "revision": model["revision"], "precision": model["precision"]},
    }
