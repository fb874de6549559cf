"""Which passes an evaluation makes, and what each is given."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from services.evaluator.passes import corruptions
from services.evaluator.passes.base import Pass, sample
from services.evaluator.passes.caption_statistics import CaptionStatistics
from services.evaluator.passes.corruptions import Corruptions
from services.evaluator.passes.cost import Cost
from services.evaluator.passes.forgetting import Forgetting
from services.evaluator.passes.retrieval import Retrieval
from services.evaluator.scoring import bare
from services.evaluator.scoring.gathering import Sources, labels_of
from services.evaluator.scoring.subject import OnBase, Subject
from services.evaluator.settings import EvaluatorSettings
from shared.classifier.card import read_card
from shared.classifier.folder import check_base
from shared.classifier.head import Head
from shared.clip.pixels import load_pixels
from shared.clip.warm import place, row_cache, warm_model
from shared.datasets.lookup import display_names
from shared.db.models import Image
from shared.jobs.claim import Claim
from shared.schemas.evaluations import EvaluationRequest

Measured = tuple[str, dict[str, float], dict[str, Any]]  # the pass's name, metrics, details


def measure(
    claim: Claim,
    request: EvaluationRequest,
    sources: Sources,
    subject: Subject,
    head: Head,
    settings: EvaluatorSettings,
) -> Iterator[Measured]:
    """The passes that were asked for, the cost always."""
    run = partial(_run, claim)
    if request.corruptions:
        yield run("corruptions", _corruptions(claim, sources, subject, head))
    if sources.held_aside is not None:
        yield run("forgetting", _forgetting(claim, sources, subject, settings))
    if sources.captions:
        yield run("retrieval", _retrieval(claim, sources, subject))
    row = sources.classifier
    if row is not None and row.caption_job_id is not None:
        with claim.core.transaction() as session:
            yield run("captions", CaptionStatistics(session, row.caption_job_id))
    name, values, detail = run("cost", Cost(subject.clip, len(head.bias), lambda x: head.logits(subject.embed(x))))
    spent = _spent(bare.DETAILS if row is None else row.details)
    yield name, values | spent, detail | spent


def embedded(claim: Claim, subject: Subject, images: Sequence[Image], stage: str) -> Tensor:
    """(N, D); says how far it is, and stops where the job must."""

    def on_chunk(done: int) -> None:
        claim.check()
        claim.progress(stage, done, len(images))

    return subject.images(claim.core.store, images, on_chunk)


def _run(claim: Claim, name: str, each: Pass) -> Measured:
    def on_step(done: int, total: int) -> None:
        claim.check()
        claim.progress(f"measuring {name}", done, total)

    values = dict(each.run(on_step))
    return name, values, each.detail


def _corruptions(claim: Claim, sources: Sources, subject: Subject, head: Head) -> Corruptions:
    chosen = [sources.images[i] for i in sample(len(sources.images), corruptions.LIMIT)]
    cache = row_cache(claim.core.settings)
    pixels = load_pixels(cache, claim.core.store, chosen, subject.clip, lambda _: claim.check())
    return Corruptions(
        pixels[:],
        sources.labels(chosen),
        [image.sha256 for image in chosen],
        lambda batch: head.logits(subject.embed(batch)),
    )


def _forgetting(claim: Claim, sources: Sources, subject: Subject, settings: EvaluatorSettings) -> Forgetting:
    assert sources.held_aside is not None
    before: Subject = subject
    if sources.classifier is not None:
        with claim.core.store.local_folder(sources.classifier.storage_key) as folder:
            card = read_card(folder)
        base = warm_model(card.base_model, claim.core.settings, place(settings.device))
        check_base(card, base.clip)
        before = OnBase(base)
    images = sources.held_aside_images
    return Forgetting(
        (lambda: embedded(claim, before, images, "scoring data held aside, base model"), before.texts),
        (lambda: embedded(claim, subject, images, "scoring data held aside"), subject.texts),
        labels_of(sources.held_aside, images),
        list(display_names(sources.held_aside).values()),
    )


def _retrieval(claim: Claim, sources: Sources, subject: Subject) -> Retrieval:
    images = embedded(claim, subject, sources.captioned, "embedding captioned images")
    own, texts = zip(*sources.captions, strict=True)
    return Retrieval(images, subject.texts(texts), torch.tensor(own))


def _spent(details: Mapping[str, Any]) -> dict[str, float]:
    """What making the classifier cost, as far as it was recorded."""
    names = ("train_seconds", "caption_seconds", "trainable_parameters")
    found = {name: float(details[name]) for name in names if details.get(name) is not None}
    if details.get("peak_memory_bytes") is not None:
        found["peak_memory_mib"] = details["peak_memory_bytes"] / 2**20
    return found
