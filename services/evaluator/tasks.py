"""The evaluation job: a classifier's logits over a split, every metric of them, and what else was asked for."""

from dataclasses import asdict
from typing import Any

import torch

from services.evaluator.metrics import Predictions, scores
from services.evaluator.scoring import bare, predictions, tables, temperature
from services.evaluator.scoring.classes import check_classes
from services.evaluator.scoring.gathering import Sources, deleted, gather
from services.evaluator.scoring.measuring import embedded, measure
from services.evaluator.scoring.predictions import Kept
from services.evaluator.scoring.recording import Scored
from services.evaluator.scoring.subject import OnBase, Subject, open_subject
from services.evaluator.scoring.temperature import Temperature
from services.evaluator.settings import EvaluatorSettings
from shared.classifier.head import Head
from shared.clip.warm import place, row_cache, warm_model
from shared.errors import NotFound
from shared.jobs.claim import Claim
from shared.jobs.worker import Finish
from shared.schemas.evaluations import EvaluationRequest


def evaluate(claim: Claim) -> Finish:
    request = EvaluationRequest.model_validate(claim.request)
    settings = EvaluatorSettings()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with claim.core.db.snapshot() as session:
        sources = gather(session, request)
    claim.progress("loading the model", 0, 1)
    subject, head = _open(claim, request, sources, settings)

    logits = head.logits(embedded(claim, subject, sources.images, "scoring"))
    fitted = _temperature(claim, subject, head, sources)
    predicted = Predictions(logits, sources.labels(sources.images), None if fitted is None else fitted.value)
    found = scores(predicted)
    result: dict[str, Any] = {
        "images": len(sources.images),
        "classes": len(sources.class_names),
        "per_class": tables.per_class(predicted, sources.class_names),
        "confusions": tables.confusions(predicted, sources.class_names),
        "temperature": None if fitted is None else asdict(fitted),
    }
    for name, values, detail in measure(claim, request, sources, subject, head, settings):
        found |= values
        result[name] = detail

    claim.progress("saving", 0, 1)
    key = f"predictions/{claim.id}-{claim.attempt}.parquet"
    ids, paths = [image.id for image in sources.images], [image.path for image in sources.images]
    kept = Kept(ids, paths, predicted.labels, logits.numpy(), sources.class_names)
    predictions.write(claim.core.store, key, kept)
    folder = None
    if sources.classifier is None:
        assert request.model is not None
        folder = f"classifiers/{claim.id}/{claim.attempt}"
        bare.save(claim.core.store, folder, subject.clip, head, request.model, sources.dataset, claim.id)
    scored = Scored(found, result, predicted.predicted == predicted.labels, key, folder)
    return lambda session: scored.write(session, claim, request, sources)


def _open(
    claim: Claim, request: EvaluationRequest, sources: Sources, settings: EvaluatorSettings
) -> tuple[Subject, Head]:
    """What embeds, and the head to score by. Raises InvalidInput where the head is for other classes."""
    core, device = claim.core.settings, place(settings.device)
    if sources.classifier is None:
        assert request.model is not None
        bare_model = OnBase(warm_model(request.model, core, device))
        return bare_model, bare_model.zero_shot(sources.display_names)
    try:
        with claim.core.store.local_folder(sources.classifier.storage_key) as folder:
            subject, own, class_names = open_subject(
                folder, lambda name: warm_model(name, core, device), row_cache(core), str(device)
            )
    except NotFound as error:
        raise deleted(request, sources.classifier.id) from error
    if request.head == "zero_shot":
        return subject, subject.zero_shot(sources.display_names)
    check_classes(
        class_names,
        sources.class_names,
        "Score it with the head 'zero_shot', which takes the data set's class names, or on data with its own classes",
    )
    return subject, own


def _temperature(claim: Claim, subject: Subject, head: Head, sources: Sources) -> Temperature | None:
    """Fitted on the val split; None where there is none, and where val is what is scored."""
    if not sources.val:
        return None
    logits = head.logits(embedded(claim, subject, sources.val, "scoring the val split"))
    return temperature.fit(logits, sources.labels(sources.val))
