"""For every route of the API: the requests by which one owner could look for another's things.

A probe is made twice: of the other's real ids, and of ids that differ in their last character and so exist nowhere, but
sort to the same place. Whoever may not see the things must not be able to tell the two apart."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import select

from shared.core import Core
from shared.db.models import Classifier, Image
from shared.web.auth import create_key
from tests.integration.evaluations import card_of
from tests.integration.factories import (
    add_caption,
    add_checkpoint,
    add_classifier,
    add_dataset,
    add_group,
    add_job,
    add_predictions,
    archive,
    caption_request,
    fine_tune_request,
)

SSE = {"Accept": "text/event-stream", "Last-Event-ID": "0"}


@dataclass(frozen=True)
class Things:
    """One of every kind; every value is in no other."""

    dataset: str
    image: str
    caption_job: str
    caption: str
    fine_tuning_job: str
    checkpoint: str
    classifier: str
    evaluation: str
    group: str
    key: str
    row: str  # of the leaderboard
    etag: str  # of the leaderboard
    idempotency_key: str
    word: str  # in captions, tags, names of classes, models and methods

    def ghosts(self) -> "Things":
        return Things(**{name: value[:-1] + ("x" if value[-1] != "x" else "y") for name, value in asdict(self).items()})

    def unnamed(self, text: str) -> str:
        """With what kind of thing it is in place of each."""
        for name, value in asdict(self).items():
            text = text.replace(value, f"<{name}>")
        return text


def things_of(core: Core, owner: str) -> Things:
    """One of every kind, on the very same pictures as everybody else's."""
    word = f"{owner}sword"
    classes = [{"name": name, "display_name": name} for name in ("cat", "dog", word)]
    dataset = add_dataset(core, owner, images=1, classes=classes)
    with core.transaction() as session:
        image = session.scalars(select(Image).where(Image.dataset_id == dataset).order_by(Image.id)).first()
        key, _ = create_key(session, owner=owner, name=word, scopes=("read",))
    assert image is not None
    about: dict[str, Any] = {"owner": owner, "dataset_id": dataset, "status": "succeeded"}  # a stream of events ends
    group = add_group(core, dataset, owner=owner, name=word)
    caption_job = add_job(core, "caption", request=caption_request(dataset), **about)
    caption = add_caption(core, image, caption_job, text=f"a soft {word}")
    fine_tuning_job = add_job(core, "fine_tune", request=fine_tune_request(dataset), group_id=group, **about)
    checkpoint = add_checkpoint(core, fine_tuning_job)
    core.store.put_bytes(f"classifiers/{owner}/captune.json", card_of().model_dump_json().encode())
    classifier = add_classifier(
        core,
        dataset,
        {"top1": 0.5},
        owner=owner,
        correct=[True, False],
        **{"storage_key": f"classifiers/{owner}", "group_id": group, "tags": [word]},
        **dict.fromkeys(("model", "method", "captioner", "suffix"), word),
    )
    evaluation = add_job(core, "evaluate", request={"classifier_id": classifier, "split": "val"}, **about)
    add_predictions(core, evaluation, classifier, dataset)
    with core.transaction() as session:
        row = session.get_one(Classifier, classifier).setting
    return Things(
        dataset=dataset,
        image=image.id,
        caption_job=caption_job,
        caption=caption,
        fine_tuning_job=fine_tuning_job,
        checkpoint=checkpoint,
        classifier=classifier,
        evaluation=evaluation,
        group=group,
        key=key.id,
        row=row,
        etag="",
        idempotency_key=f"of {owner}",
        word=word,
    )


@dataclass(frozen=True)
class Request:
    """`of_ones_own`: the things looked through are the caller's own, so that an admin sees no more than the caller."""

    params: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    json: Any = None
    data: dict[str, str] | None = None
    files: Any = None
    of_ones_own: bool = False
    id: str = ""  # for `{id}` in the path, where it is not the other's


Probe = Callable[[Things, Things], Request]  # (the other's or ghosts, the caller's own)


def plain(of: Things, mine: Things) -> Request:
    return Request()


def _job_routes(prefix: str, kind: str) -> dict[tuple[str, str], list[Probe]]:
    one = f"{prefix}/{{id}}"
    return {
        ("GET", prefix): [
            plain,
            lambda of, mine: Request({"dataset_id": of.dataset}),
            lambda of, mine: Request({"dataset_id": of.dataset, "status": "succeeded", "limit": 1}),
            lambda of, mine: Request({"after": getattr(of, kind)}),
        ],
        ("GET", one): [plain],
        ("GET", f"{one}/events"): [
            plain,
            lambda of, mine: Request({"after": 1}),
            lambda of, mine: Request(headers=SSE),
        ],
        **{("POST", f"{one}/{action}"): [plain] for action in ("cancel", "pause", "resume")},
    }


def _runs(of: Things, **more: Any) -> dict[str, Any]:
    return {"dataset_id": of.dataset, "methods": [{"type": "zero_shot"}], **more}


def _sent(of: Things, **more: Any) -> Request:
    return Request(json=more, headers={"Idempotency-Key": of.idempotency_key})


PROBES: dict[tuple[str, str], list[Probe]] = {
    **_job_routes("/v1/datasets", "dataset"),
    **_job_routes("/v1/caption_jobs", "caption_job"),
    **_job_routes("/v1/fine_tuning/jobs", "fine_tuning_job"),
    **_job_routes("/v1/evaluations", "evaluation"),
    # -- data sets and images
    ("PATCH", "/v1/datasets/{id}"): [
        lambda of, mine: Request(json={"name": "ours"}),
        lambda of, mine: Request(json={"display_names": {of.word: "ours"}}),
    ],
    ("DELETE", "/v1/datasets/{id}"): [plain],
    ("GET", "/v1/datasets/{id}/images"): [
        plain,
        lambda of, mine: Request({"after": of.image, "split": "train"}),
        lambda of, mine: Request({"after": of.image}, id=mine.dataset, of_ones_own=True),
        lambda of, mine: Request({"class_name": of.word}, id=mine.dataset, of_ones_own=True),
    ],
    ("GET", "/v1/images/{id}/content"): [plain, lambda of, mine: Request(headers={"If-None-Match": of.etag})],
    # -- captions
    ("POST", "/v1/caption_jobs"): [
        lambda of, mine: _sent(of, dataset_id=of.dataset),
        lambda of, mine: _sent(of, dataset_id=mine.dataset, redo={"caption_job_id": of.caption_job}),
        lambda of, mine: _sent(
            of,
            dataset_id=mine.dataset,
            redo={"caption_job_id": of.caption_job, "caption_ids": [of.caption], "class_name": of.word},
        ),
        lambda of, mine: _sent(
            of, dataset_id=mine.dataset, redo={"caption_job_id": mine.caption_job, "caption_ids": [of.caption]}
        ),
    ],
    ("POST", "/v1/caption_jobs/preview"): [
        lambda of, mine: Request(json={"dataset_id": of.dataset, "live": True}),
        lambda of, mine: Request(json={"dataset_id": mine.dataset, "image_id": of.image}, of_ones_own=True),
        lambda of, mine: Request(
            json={
                "dataset_id": mine.dataset,
                "redo": {"caption_job_id": of.caption_job, "caption_ids": [of.caption]},
            }
        ),
    ],
    ("POST", "/v1/caption_jobs/import"): [
        lambda of, mine: Request(
            data={"dataset_id": of.dataset},
            files={"file": ("a.json", b'{"cat/0.png": ["a soft coat"]}')},
            headers={"Idempotency-Key": of.idempotency_key},
        )
    ],
    ("GET", "/v1/caption_jobs/{id}/export"): [
        plain,
        *(lambda of, mine, f=f: Request({"format": f, "include": "usable"}) for f in ("jsonl", "csv", "txt")),
    ],
    ("GET", "/v1/caption_jobs/{id}/report"): [plain],
    ("GET", "/v1/datasets/{id}/captions"): [
        plain,
        lambda of, mine: Request({"q": of.word}),
        lambda of, mine: Request({"caption_job_id": of.caption_job}, id=mine.dataset),
        *(
            lambda of, mine, name=name, value=value: Request(
                {name: getattr(of, value)}, id=mine.dataset, of_ones_own=True
            )
            for name, value in {
                "image_id": "image",
                "after": "caption",
                "q": "word",
                "class_name": "word",
                "characteristic": "word",
            }.items()
        ),
    ],
    ("GET", "/v1/captions/{id}"): [plain, lambda of, mine: Request(headers={"If-None-Match": '"1"'})],
    ("PATCH", "/v1/captions/{id}"): [
        lambda of, mine: Request(json={"text": "ours"}),
        lambda of, mine: Request(json={"text": "ours"}, headers={"If-Match": "*"}),
        lambda of, mine: Request(json={"excluded": True}, headers={"If-Match": '"1"'}),
        lambda of, mine: Request(json={"excluded": True}, headers={"If-Match": '"2"'}),
    ],
    # -- fine-tuning
    ("POST", "/v1/fine_tuning/jobs"): [
        lambda of, mine: _sent(of, dataset_id=of.dataset, method={"type": "zero_shot"}),
        lambda of, mine: _sent(
            of, dataset_id=mine.dataset, caption_job_id=of.caption_job, method={"type": "mmft"}, shots=1
        ),
        lambda of, mine: _sent(
            of,
            dataset_id=mine.dataset,
            method={"type": "soup", "hyperparameters": {"group_id": of.group, "classifier_ids": [of.classifier]}},
        ),
    ],
    ("GET", "/v1/fine_tuning/jobs"): [
        *_job_routes("/v1/fine_tuning/jobs", "fine_tuning_job")["GET", "/v1/fine_tuning/jobs"],
        lambda of, mine: Request({"group_id": of.group}),
    ],
    ("GET", "/v1/fine_tuning/jobs/{id}/checkpoints"): [plain, lambda of, mine: Request({"after": of.checkpoint})],
    ("POST", "/v1/fine_tuning/groups"): [
        lambda of, mine: _sent(of, **_runs(of)),
        lambda of, mine: _sent(
            of, **_runs(mine, methods=[{"type": "mmft"}], caption_job_ids=[mine.caption_job, of.caption_job])
        ),
    ],
    ("GET", "/v1/fine_tuning/groups"): [
        plain,
        lambda of, mine: Request({"dataset_id": of.dataset}),
        lambda of, mine: Request({"after": of.group}),
    ],
    ("GET", "/v1/fine_tuning/groups/{id}"): [plain],
    ("POST", "/v1/fine_tuning/groups/{id}/cancel"): [plain],
    ("POST", "/v1/fine_tuning/groups/{id}/runs"): [
        lambda of, mine: _sent(of, methods=[{"type": "zero_shot"}]),
        lambda of, mine: Request(
            json={"methods": [{"type": "mmft"}], "caption_job_ids": [of.caption_job]}, id=mine.group
        ),
    ],
    ("POST", "/v1/fine_tuning/groups/{id}/soup"): [lambda of, mine: _sent(of)],
    # -- classifiers
    ("GET", "/v1/classifiers"): [
        plain,
        *(
            lambda of, mine, name=name, value=value: Request({name: getattr(of, value)})
            for name, value in {
                "dataset_id": "dataset",
                "group_id": "group",
                "tag": "word",
                "after": "classifier",
            }.items()
        ),
    ],
    ("GET", "/v1/classifiers/{id}"): [plain],
    ("PATCH", "/v1/classifiers/{id}"): [lambda of, mine: Request(json={"tags": ["ours"], "pinned": True})],
    ("DELETE", "/v1/classifiers/{id}"): [plain],
    ("POST", "/v1/classifiers/{id}/predict"): [
        plain,
        lambda of, mine: Request({"top_k": 1}, files={"images": ("a.png", b"no picture")}),
    ],
    ("GET", "/v1/classifiers/{id}/download"): [plain],
    ("POST", "/v1/classifiers/import"): [
        lambda of, mine: Request(
            data={"dataset_id": of.dataset},
            files={"file": ("a.zip", archive())},
            headers={"Idempotency-Key": of.idempotency_key},
        )
    ],
    # -- evaluations
    ("POST", "/v1/evaluations"): [
        lambda of, mine: _sent(of, classifier_id=of.classifier),
        lambda of, mine: _sent(of, model="starter", dataset_id=of.dataset),
        lambda of, mine: _sent(of, classifier_id=mine.classifier, dataset_id=of.dataset),
        lambda of, mine: _sent(of, classifier_id=mine.classifier, held_aside_dataset_id=of.dataset),
        lambda of, mine: _sent(of, classifier_id=mine.classifier, caption_job_id=of.caption_job),
    ],
    ("POST", "/v1/evaluations/{id}/rescore"): [plain],
    ("GET", "/v1/evaluations/{id}/predictions"): [plain],
    # -- the leaderboard
    ("GET", "/v1/leaderboard"): [
        lambda of, mine: Request({"dataset_id": of.dataset}),
        lambda of, mine: Request({"dataset_id": of.dataset}, headers={"If-None-Match": of.etag}),
        lambda of, mine: Request({"dataset_id": of.dataset}, headers={"If-None-Match": "*"}),
        *(lambda of, mine, f=f: Request({"dataset_id": of.dataset, "format": f}) for f in ("csv", "markdown", "latex")),
        lambda of, mine: Request({"dataset_id": mine.dataset}, headers={"If-None-Match": of.etag}, of_ones_own=True),
        *(
            lambda of, mine, name=name, value=value: Request(
                {"dataset_id": mine.dataset, name: getattr(of, value)}, of_ones_own=True
            )
            for name, value in {
                "after": "row",
                "group_id": "group",
                "tag": "word",
                "model": "word",
                "method": "word",
                "captioner": "word",
            }.items()
        ),
    ],
    ("GET", "/v1/leaderboard/compare"): [
        lambda of, mine: Request({"dataset_id": of.dataset, "a": of.row, "b": of.row}),
        lambda of, mine: Request(
            {"dataset_id": of.dataset, "a": of.row, "b": mine.row}, headers={"If-None-Match": of.etag}
        ),
        lambda of, mine: Request({"dataset_id": mine.dataset, "a": mine.row, "b": of.row}, of_ones_own=True),
        lambda of, mine: Request({"dataset_id": mine.dataset, "a": of.row, "b": mine.row}, of_ones_own=True),
    ],
    # -- keys: an admin's
    ("POST", "/v1/keys"): [lambda of, mine: _sent(of, owner="carl", name=of.word)],
    ("GET", "/v1/keys"): [plain, lambda of, mine: Request({"after": of.key})],
    ("DELETE", "/v1/keys/{id}"): [plain],
}

# Routes that nothing of an owner's goes into or comes out of.
OWNERLESS = {
    ("POST", "/v1/datasets"): "makes what is the caller's; the archive is its own",
    ("GET", "/v1/fine_tuning/methods"): "the code's",
    ("GET", "/v1/models"): "the operator's",
    ("GET", "/v1/models/{model}"): "the operator's",
    ("POST", "/v1/chat/completions"): "takes pictures in its body, by no id",
}
# Text parameters whose values are the code's, not an owner's.
NOT_AN_OWNERS = {"metric"}

KINDS = {
    "/v1/datasets/": "dataset",
    "/v1/images/": "image",
    "/v1/caption_jobs/": "caption_job",
    "/v1/captions/": "caption",
    "/v1/fine_tuning/jobs/": "fine_tuning_job",
    "/v1/fine_tuning/groups/": "group",
    "/v1/classifiers/": "classifier",
    "/v1/evaluations/": "evaluation",
    "/v1/keys/": "key",
}


def address(path: str, request: Request, of: Things) -> str:
    if "{id}" not in path:
        return path
    kind = next(kind for prefix, kind in KINDS.items() if path.startswith(prefix))
    return path.replace("{id}", request.id or getattr(of, kind))
