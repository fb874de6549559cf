"""What a run's owner is warned of before it starts."""

import logging
from collections.abc import Sequence

from services.trainer.methods.base import Method
from services.trainer.runs.gathering import Sources
from shared.clip.tokens import token_counter
from shared.config import CoreSettings
from shared.errors import CaptuneError
from shared.jobs.claim import Claim
from shared.schemas.fine_tuning import FineTuningRequest

log = logging.getLogger(__name__)
LISTED = 20  # names in a message; the event's data hold more


def warn(claim: Claim, request: FineTuningRequest, method: Method, sources: Sources) -> None:
    for split, fewer in (("training", sources.fewer), ("val", sources.fewer_val)):
        if fewer:
            detail = ", ".join(f"{name} ({n})" for name, n in sorted(fewer.items())[:LISTED])
            message = f"these classes have fewer than {request.shots} {split} images, all of them are used: {detail}"
            claim.event("warning.fewer_shots", message, {"split": split, "classes": fewer}, level="warning")
    if not method.needs_captions:
        return
    if left_out := sources.left_out.total():
        reasons = ", ".join(f"{reason} {n}" for reason, n in sources.left_out.most_common())
        message = f"{left_out} captions are left out ({reasons}); 'exclude_flags' of the job decides which"
        claim.event("warning.captions_left_out", message, dict(sources.left_out), level="warning")
    if sources.measured_for not in (None, request.model):
        message = (
            f"the captions were measured for '{sources.measured_for}', so '{request.model}' may cut some of them; "
            "a caption job with this 'clip_model' reuses the captions and measures them anew"
        )
        claim.event("warning.captions_of_another_clip", message, level="warning")
    if bare := [image.path for image in sources.train if image.id not in sources.captions]:
        message = f"{len(bare)} of {len(sources.train)} training images have no caption: their class name stands in"
        claim.event("warning.images_without_caption", message, {"paths": bare[:100]}, level="warning")
    if classes := sources.bare_classes():
        message = f"{len(classes)} classes have no caption at all, so their name alone is their prototype: "
        message += ", ".join(classes[:LISTED])
        claim.event("warning.classes_without_caption", message, {"classes": classes[:1000]}, level="warning")
    _warn_of_truncation(claim, request.model, [text for texts in sources.prototype_texts(method) for text in texts])


def _warn_of_truncation(claim: Claim, model: str, texts: Sequence[str]) -> None:
    cut, budget = truncated(texts, model, claim.core.settings)
    if cut:
        message = (
            f"{cut} of {len(texts)} texts are longer than the {budget} tokens that '{model}' reads; what is beyond is "
            "not seen. A caption job with this 'clip_model' keeps captions within the budget"
        )
        data = {"texts": cut, "of": len(texts), "tokens": budget}
        claim.event("warning.truncated_texts", message, data, level="warning")


def truncated(texts: Sequence[str], model: str, core: CoreSettings) -> tuple[int, int]:
    """How many of the texts the model's tokenizer would cut, and its context in tokens. (0, 0) where it can't be told:
    a published model's tokenizer may be on a hub that is out of reach."""
    try:
        counter = token_counter(model, core.model_cache, core.model_roots)
    except CaptuneError as error:
        log.info("texts are not measured", extra={"model": model, "error": error.message})
        return 0, 0
    return sum(count > counter.context_length for count in counter.counts(texts)), counter.context_length
