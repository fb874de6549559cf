"""The caption job: every image of a split, one call per characteristic, committed in chunks. Repeating any step is
harmless: a caption is unique by (image, key)."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.captioner.prompts import caption_prompt, clean, flags
from services.captioner.remote import Captioner, Reply
from services.captioner.settings import CaptionWorkerSettings
from shared.datasets.images import decode
from shared.datasets.lookup import draw_shots, split_images
from shared.db.models import Caption, CaptionJobItem, Image
from shared.errors import InvalidInput
from shared.ids import new_id
from shared.jobs.claim import Claim
from shared.jobs.worker import Finish
from shared.schemas.captions import CaptionJobRequest
from shared.templates import display_name

CHUNK = 32  # images per commit
KEPT_FAILURES = 100
BROWSER_TYPES = ("image/jpeg", "image/png", "image/webp")  # other formats are sent as PNG


@dataclass(frozen=True)
class Wanted:
    image: Image
    characteristic: str
    prompt: str
    key: str


def caption(claim: Claim) -> Finish:
    request = CaptionJobRequest.model_validate(claim.request)
    settings = CaptionWorkerSettings()
    with claim.core.transaction() as session:
        images, _ = draw_shots(
            split_images(session, request.dataset_id, request.split), request.shots, request.shot_seed
        )
    if not images:
        raise InvalidInput(f"the split '{request.split}' has no images to caption", code="empty_split", param="split")
    failures: list[dict[str, str]] = []
    failed = 0
    with Captioner(settings.captioner_url, settings.service_token.get_secret_value(), claim.check) as remote:
        model = remote.model(request.engine)
        with ThreadPoolExecutor(settings.caption_concurrency) as pool:
            for start in range(0, len(images), CHUNK):
                claim.check()
                claim.progress("captioning", start, len(images))
                chunk = [wanted for image in images[start : start + CHUNK] for wanted in _wanted(image, request, model)]
                todo = _missing(claim, chunk)
                answers = list(pool.map(lambda w: _ask(claim, remote, request, model, w), todo))
                rows = [
                    _row(claim, model, request, w, answer)
                    for w, answer in zip(todo, answers, strict=True)
                    if isinstance(answer, Reply)
                ]
                for w, answer in zip(todo, answers, strict=True):
                    if isinstance(answer, InvalidInput):
                        failed += 1
                        failures.append({"path": w.image.path, "code": answer.code, "message": answer.message})
                with claim.transaction() as session:
                    _write(session, claim.id, chunk, rows)
                    if rows:  # walking over what is there already is no progress, or attempts would have no bound
                        claim.advanced(session)
    claim.progress("captioning", len(images), len(images))
    return lambda session: _summary(session, claim, request, model, len(images), failed, failures[:KEPT_FAILURES])


def _wanted(image: Image, request: CaptionJobRequest, model: dict[str, Any]) -> list[Wanted]:
    assert request.domain is not None  # filled at submission
    found = []
    for characteristic in request.characteristics:
        prompt = caption_prompt(display_name(image.class_name), request.domain, characteristic, request.words)
        identity = [prompt, request.engine, model["revision"], _generation(request)]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        found.append(Wanted(image, characteristic, prompt, key))
    return found


def _generation(request: CaptionJobRequest) -> dict[str, Any]:
    """Parameters of the generation; two tokens a word leave room to end the sentence."""
    return {"temperature": request.temperature, "seed": request.seed, "max_tokens": 2 * request.words + 20}


def _missing(claim: Claim, chunk: Sequence[Wanted]) -> list[Wanted]:
    """Those not written yet, by this job or an earlier one."""
    with claim.core.transaction() as session:
        query = select(Caption.image_id, Caption.key).where(Caption.image_id.in_({w.image.id for w in chunk}))
        have = {(image_id, key) for image_id, key in session.execute(query)}
    return [w for w in chunk if (w.image.id, w.key) not in have]


def _ask(
    claim: Claim, remote: Captioner, request: CaptionJobRequest, model: dict[str, Any], wanted: Wanted
) -> Reply | InvalidInput:
    """A refusal of one image is an answer, not the end of the job."""
    metadata = {
        "class_name": display_name(wanted.image.class_name),
        "domain": str(request.domain),
        "characteristic": wanted.characteristic,
        "words": str(request.words),
    }
    data, media_type = _sendable(claim.core.store.read_blob(wanted.image.sha256), wanted.image.media_type)
    try:
        return remote.caption(
            request.engine,
            model["revision"],
            data,
            media_type,
            wanted.prompt,
            metadata=metadata,
            **_generation(request),
        )
    except InvalidInput as refused:
        return refused


def _sendable(data: bytes, media_type: str) -> tuple[bytes, str]:
    if media_type in BROWSER_TYPES:
        return data, media_type
    out = BytesIO()
    decode(data).save(out, "PNG")
    return out.getvalue(), "image/png"


def _row(
    claim: Claim, model: dict[str, Any], request: CaptionJobRequest, wanted: Wanted, reply: Reply
) -> dict[str, Any]:
    text = clean(reply.text)
    provenance = {
        "prompt": wanted.prompt,
        "engine": request.engine,
        "revision": model["revision"],
        "precision": model["precision"],
        **_generation(request),
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "milliseconds": reply.milliseconds,
        "job_id": claim.id,
        "attempt": claim.attempt,
        "raw": reply.text,
    }
    return {
        "id": new_id("cpt"),
        "owner": claim.owner,
        "dataset_id": request.dataset_id,
        "image_id": wanted.image.id,
        "key": wanted.key,
        "characteristic": wanted.characteristic,
        "text": text,
        "flags": flags(text),
        "provenance": provenance,
    }


def _write(session: Session, job_id: str, chunk: Sequence[Wanted], rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        session.execute(insert(Caption).on_conflict_do_nothing(), rows)
    wanted = {(w.image.id, w.key) for w in chunk}
    query = select(Caption.id, Caption.image_id, Caption.key).where(Caption.image_id.in_({w.image.id for w in chunk}))
    items = [{"job_id": job_id, "caption_id": i} for i, image, key in session.execute(query) if (image, key) in wanted]
    if items:
        session.execute(insert(CaptionJobItem).on_conflict_do_nothing(), items)


def _summary(
    session: Session,
    claim: Claim,
    request: CaptionJobRequest,
    model: dict[str, Any],
    images: int,
    failed: int,
    failures: list[dict[str, str]],
) -> dict[str, Any]:
    mine = Caption.provenance["job_id"].astext == claim.id
    flagged = func.cardinality(Caption.flags) > 0
    query = select(func.count(), func.count().filter(mine), func.count().filter(flagged)).select_from(Caption)
    query = query.join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id).where(CaptionJobItem.job_id == claim.id)
    captions, written, set_aside = session.execute(query).one()
    if not captions:
        raise InvalidInput(
            f"the captioner refused all {failed} requests; the first: {failures[0]['message']}",
            code="nothing_captioned",
        )
    return {
        "images": images,
        "captions": captions,
        "written": written,
        "reused": captions - written,
        "flagged": set_aside,
        "failed": failed,
        "failures": failures,
        "captioner": {"engine": request.engine, "revision": model["revision"], "precision": model["precision"]},
    }
