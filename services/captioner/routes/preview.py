"""A caption job's dry run: what `POST /v1/caption_jobs/preview` answers."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastapi.concurrency import run_in_threadpool
from PIL import Image as Picture
from sqlalchemy import select

from services.captioner.captioning import planning
from services.captioner.captioning.reuse import Surveyor
from services.captioner.engines.base import CaptionRequest, Generation, fit
from services.captioner.quality.inspect import Inspector
from services.captioner.routes.submission import resolve
from services.captioner.serving.batcher import Batcher
from shared.clip.tokens import token_counter
from shared.core import Core
from shared.datasets.images import decode
from shared.datasets.lookup import display_names
from shared.db.models import Image
from shared.errors import InvalidInput, NotFound, Unavailable
from shared.schemas.captions import CaptionJobRequest, CaptionPreview, CaptionPreviewRequest, PromptExample
from shared.web.auth import Principal


class _Plan(NamedTuple):
    batcher: Batcher
    request: CaptionJobRequest
    names: dict[str, str]  # display names by class
    image: planning.Picture  # the example
    prompts: list[planning.Wanted]  # of that image, one sample each
    images: int
    reusable: int
    calls: int


async def preview(
    batchers: Mapping[str, Batcher], core: Core, who: Principal, body: CaptionPreviewRequest
) -> CaptionPreview:
    """Stores nothing. Raises what submission raises, and Unavailable where this process does not serve the model or has
    not loaded it: its revision decides what can be reused."""
    plan = await run_in_threadpool(_plan, batchers, core, who, body)
    rate = plan.batcher.rate()
    return CaptionPreview(
        images=plan.images,
        captions=plan.reusable + plan.calls,
        reusable=plan.reusable,
        model_calls=plan.calls,
        estimated_prompt_tokens=round(plan.calls * rate.prompt_tokens_per_caption) if rate else None,
        estimated_completion_tokens=round(plan.calls * rate.completion_tokens_per_caption) if rate else None,
        estimated_seconds=round(plan.calls / rate.captions_per_second, 1) if rate else None,
        captions_per_second=round(rate.captions_per_second, 3) if rate else None,
        image_id=plan.image.id,
        path=plan.image.path,
        class_name=plan.image.class_name,
        display_name=plan.names[plan.image.class_name],
        examples=await _live(core, plan) if body.live else [_example(each) for each in plan.prompts],
    )


def _example(wanted: planning.Wanted) -> PromptExample:
    return PromptExample(characteristic=wanted.characteristic, prompt=wanted.prompt)


def _plan(batchers: Mapping[str, Batcher], core: Core, who: Principal, body: CaptionPreviewRequest) -> _Plan:
    asked = CaptionJobRequest.model_validate(body.model_dump(exclude={"image_id", "live"}, exclude_unset=True))
    with core.transaction() as session:
        dataset, request = resolve(session, core.settings, who, asked, batchers)
        batcher = _serving(batchers, request.engine)
        selection = planning.select_images(session, request)
        chosen = (
            None
            if body.image_id is None
            else session.scalar(select(Image).where(Image.id == body.image_id, Image.dataset_id == dataset.id))
        )
    if body.image_id is not None and chosen is None:
        raise NotFound(f"{dataset.id} has no image '{body.image_id}'", param="image_id")
    names = display_names(dataset)
    surveyor = Surveyor(request, {"revision": batcher.engine.revision}, names, dataset.owner)
    first: planning.Picture | None = None
    images = reusable = calls = 0
    for page in planning.image_pages(core, selection):
        if not page:  # the images were deleted meanwhile
            continue
        first = first or page[0]
        with core.db.snapshot() as session:
            survey = surveyor.survey(session, page)
        images += survey.images
        reusable += len(survey.links) + len(survey.copies)
        calls += sum(len(wanted) for _, wanted in survey.todo)
    if first is None:
        raise InvalidInput(f"the split '{request.split}' has no images to caption", code="empty_split", param="split")
    if chosen is not None:
        first = planning.Picture(chosen.id, chosen.path, chosen.class_name, chosen.sha256, chosen.media_type)
    prompts = [each for each in surveyor.wanted(first) if each.seed == request.seed]
    return _Plan(batcher, request, names, first, prompts, images, reusable, calls)


def _serving(batchers: Mapping[str, Batcher], engine: str) -> Batcher:
    batcher = batchers.get(engine)
    if batcher is None:
        raise Unavailable(
            "this process serves no caption models; send the preview to the captioner's API", code="engine_unavailable"
        )
    if not batcher.ready:
        reason = batcher.error or f"it is {batcher.state}"
        raise Unavailable(f"the model '{engine}' cannot be used: {reason}", code="engine_unavailable", retry_after=5)
    return batcher


async def _live(core: Core, plan: _Plan) -> list[PromptExample]:
    """The image's captions as the job would ask for them the first time, and what it would keep of them."""
    image = await run_in_threadpool(_picture, core, plan)
    inspector = await run_in_threadpool(_inspector, core, plan)
    name = plan.names[plan.image.class_name]
    requests = [
        CaptionRequest(
            (image,),
            each.prompt,
            **planning.generation(plan.request),
            seed=each.seed,
            metadata=planning.metadata(plan.request, each.characteristic, name, plan.request.words),
        )
        for each in plan.prompts
    ]
    answers = await asyncio.gather(*(plan.batcher.submit(request) for request in requests))
    return await run_in_threadpool(_examples, plan, inspector, answers)


def _examples(plan: _Plan, inspector: Inspector, answers: Sequence[Generation]) -> list[PromptExample]:
    examples = []
    for wanted, answer in zip(plan.prompts, answers, strict=True):
        raw = answer.text.encode(errors="replace").decode()  # half a surrogate pair is no JSON
        kept = inspector.finish(raw, plan.names[plan.image.class_name], answer.finish_reason)
        result = {"raw": raw, "text": kept.text, "clip_tokens": kept.clip_tokens, "flags": kept.flags}
        examples.append(_example(wanted).model_copy(update=result))
    return examples


def _picture(core: Core, plan: _Plan) -> Picture.Image:
    return fit(decode(core.store.read_blob(plan.image.sha256)), plan.batcher.engine.spec.max_pixels)


def _inspector(core: Core, plan: _Plan) -> Inspector:
    settings, request = core.settings, plan.request
    counter = token_counter(request.clip_model, settings.model_cache, settings.model_roots)
    return Inspector(counter, list(plan.names.values()), shear_tokens=request.shear_tokens, language=request.language)
