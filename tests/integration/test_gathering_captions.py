"""Which captions a fine-tuning job trains on."""

from typing import Any

import pytest
from sqlalchemy import select

from services.trainer import methods
from services.trainer.runs.gathering import gather
from shared.core import Core
from shared.db.models import Image
from shared.schemas.fine_tuning import FineTuningRequest
from tests.integration.factories import (
    add_caption,
    add_dataset,
    add_job,
    caption_request,
    fine_tune_request,
    share_caption,
)


@pytest.mark.parametrize(
    ("chosen", "texts", "left_out"),
    [
        ({}, {"plain", "low", "fine here"}, {"duplicate": 1, "refusal": 1, "by_hand": 1}),
        ({"exclude_flags": []}, {"plain", "low", "fine here", "doubled", "refused"}, {"by_hand": 1}),
        (
            {"exclude_flags": ["low_agreement"]},
            {"plain", "fine here", "doubled", "refused"},
            {"low_agreement": 1, "by_hand": 1},
        ),
    ],
)
def test_flags_of_the_caption_and_of_the_job_decide(
    core: Core, chosen: dict[str, Any], texts: set[str], left_out: dict[str, int]
) -> None:
    """What a later job says of the same captions changes nothing for those that name the earlier one."""
    dataset = add_dataset(core, images=1)
    with core.transaction() as session:
        cat, dog = session.scalars(select(Image).order_by(Image.class_name)).all()
    job, later = (
        add_job(
            core,
            request=caption_request(dataset),
            dataset_id=dataset,
            status="succeeded",
            result={"captioner": {"revision": "r"}},
        )
        for _ in range(2)
    )
    ids = [
        add_caption(core, cat, job, "plain", "1"),
        add_caption(core, cat, job, "low", "2", job_flags=["low_agreement"]),
        add_caption(core, dog, job, "doubled", "1", job_flags=["duplicate"]),
        add_caption(core, dog, job, "refused", "2", flags=["refusal"]),
        add_caption(core, dog, job, "left out", "3", excluded=True, job_flags=["duplicate"]),
        add_caption(core, dog, job, "fine here", "4"),
    ]
    for id in ids:
        share_caption(core, id, later, ["duplicate_other_class"])
    values = fine_tune_request(
        dataset, caption_job_id=job, method={"type": "mmft", "hyperparameters": {}}, validation="none"
    )
    request = FineTuningRequest.model_validate(values | chosen)
    with core.transaction() as session:
        found = gather(session, request, methods.build("mmft", {}))
    assert {text for some in found.captions.values() for text in some} == texts
    assert dict(found.left_out) == left_out
    assert set(found.captions) <= {cat.id, dog.id}
