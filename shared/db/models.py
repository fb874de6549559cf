"""The schema. Every row a user owns carries `owner` from the first migration on."""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Index,
    MetaData,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

STATUSES = ("queued", "running", "paused", "succeeded", "failed", "cancelled")
FINAL = ("succeeded", "failed", "cancelled")


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {
        str: Text,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(none_as_null=True),
        list[Any]: JSONB(none_as_null=True),
        list[str]: ARRAY(Text),
    }


class ApiKey(Base):
    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    name: Mapped[str]
    key_hash: Mapped[str] = mapped_column(unique=True)  # SHA-256 of a 256-bit random key: nothing to brute-force
    prefix: Mapped[str] = mapped_column(server_default="")  # how the key begins, for a person to tell it apart
    scopes: Mapped[list[str]]
    rate_limit: Mapped[str | None]  # None: the server's
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    last_used_at: Mapped[datetime | None]  # to the minute
    expires_at: Mapped[datetime | None]  # None: never
    revoked_at: Mapped[datetime | None]


class IdempotencyKey(Base):
    __tablename__ = "idempotency_keys"
    owner: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_hash: Mapped[str]
    resource_id: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Job(Base):
    """The ledger: one row per job of any kind. Its id is also the id of the thing it makes (a data set's ingest job
    has the data set's id)."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"status IN {STATUSES}", name="status"),
        Index("ix_jobs_owner_kind_id", "owner", "kind", "id"),
        Index("ix_jobs_live", "status", "lease_until", postgresql_where=text("status IN ('queued', 'running')")),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    owner: Mapped[str]
    dataset_id: Mapped[str | None] = mapped_column(index=True)
    group_id: Mapped[str | None] = mapped_column(ForeignKey("run_groups.id", ondelete="SET NULL"), index=True)
    status: Mapped[str] = mapped_column(server_default="queued")
    request: Mapped[dict[str, Any]]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    progress: Mapped[dict[str, Any] | None]
    attempt: Mapped[int] = mapped_column(server_default="0")  # fencing token: raised by every claim
    failures: Mapped[int] = mapped_column(server_default="0")  # lost leases and unexpected errors; bounded
    worker: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    run_after: Mapped[datetime | None]  # back-off after a failure
    cancel_requested: Mapped[bool] = mapped_column(server_default="false")
    pause_requested: Mapped[bool] = mapped_column(server_default="false")
    event_seq: Mapped[int] = mapped_column(server_default="0")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    queued_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class RunGroup(Base):
    """Fine-tuning jobs that were submitted together to be compared. How it stands follows from its jobs."""

    __tablename__ = "run_groups"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    dataset_id: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class JobEvent(Base):
    __tablename__ = "job_events"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Dataset(Base):
    __tablename__ = "datasets"
    id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    domain: Mapped[str]
    archive_key: Mapped[str]
    archive_sha256: Mapped[str]
    archive_bytes: Mapped[int] = mapped_column(BigInteger)
    split_seed: Mapped[int]
    val_fraction: Mapped[float]
    test_fraction: Mapped[float]
    classes: Mapped[list[Any] | None]  # [{"name", "display_name"}], sorted by name; the index is the label
    counts: Mapped[dict[str, Any] | None]  # {split: {class: n}}
    report: Mapped[dict[str, Any] | None]
    fingerprint: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Image(Base):
    __tablename__ = "images"
    __table_args__ = (
        UniqueConstraint("dataset_id", "path"),
        Index("ix_images_dataset_id_split_id", "dataset_id", "split", "id"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"))
    path: Mapped[str]
    class_name: Mapped[str]
    split: Mapped[str]
    sha256: Mapped[str] = mapped_column(index=True)
    media_type: Mapped[str]
    width: Mapped[int]
    height: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigInteger)


class Caption(Base):
    """A caption is unique by (image, key): the key is a hash of the prompt, the captioner's revision, the generation
    parameters and the seed, so doing a step twice cannot double it. The same key of an image with the same bytes, in
    any data set of the owner, holds the same model output: it is copied instead of asked for again."""

    __tablename__ = "captions"
    __table_args__ = (
        UniqueConstraint("image_id", "key"),
        Index("ix_captions_search", text("to_tsvector('english'::regconfig, text)"), postgresql_using="gin"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    dataset_id: Mapped[str] = mapped_column(index=True)
    image_id: Mapped[str] = mapped_column(ForeignKey("images.id", ondelete="CASCADE"))
    key: Mapped[str]
    characteristic: Mapped[str]
    text: Mapped[str]
    clip_tokens: Mapped[int]  # of the prefixed caption, for the tokenizer of the job's CLIP
    flags: Mapped[list[str]] = mapped_column(server_default="{}")  # what the text shows by itself
    excluded: Mapped[bool] = mapped_column(server_default="false")
    version: Mapped[int] = mapped_column(server_default="1")  # the ETag; raised by every change of this row
    original_text: Mapped[str | None]  # before the first edit
    edited_by: Mapped[str | None]
    provenance: Mapped[dict[str, Any]]  # prompt, engine, revision, parameters, tokens, milliseconds, attempt, raw text
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class CaptionJobItem(Base):
    """Which captions a caption job delivered: its own, and the ones it found already written; and what holds of each
    among the captions of that job alone."""

    __tablename__ = "caption_job_items"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    caption_id: Mapped[str] = mapped_column(ForeignKey("captions.id", ondelete="CASCADE"), primary_key=True, index=True)
    flags: Mapped[list[str]] = mapped_column(server_default="{}")  # duplicate, duplicate_other_class, low_agreement
    agreement: Mapped[dict[str, Any] | None]


class Checkpoint(Base):
    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "kind", "step"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    kind: Mapped[str]  # "resume" (full training state), "best" (the classifier) or "last" (that of the last epoch)
    step: Mapped[int]
    epoch: Mapped[int]
    storage_key: Mapped[str]
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Classifier(Base):
    """What a fine-tuning job made, what was uploaded, or a model as an evaluation found it."""

    __tablename__ = "classifiers"
    __table_args__ = (
        Index("ix_classifiers_dataset_id_owner", "dataset_id", "owner"),
        Index("ix_classifiers_dataset_id_setting", "dataset_id", "setting"),
        Index(  # all that a leaderboard reads of every run; no text of a user's, whose length has no such bound
            "ix_classifiers_leaderboard",
            "id",
            postgresql_include=[
                *("owner", "dataset_id", "data_fingerprint", "setting", "protocol"),
                *("shots", "shot_seed", "seed", "pinned", "group_id"),
            ],
        ),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), unique=True)  # None: uploaded
    group_id: Mapped[str | None] = mapped_column(ForeignKey("run_groups.id", ondelete="SET NULL"), index=True)
    dataset_id: Mapped[str]
    model: Mapped[str]
    method: Mapped[str]
    hyperparameters: Mapped[dict[str, Any]]
    shots: Mapped[int | None]  # None: every training image
    shot_seed: Mapped[int]
    seed: Mapped[int]
    protocol: Mapped[str]  # validation: none | few_shot | full; "zero_shot" for methods that do not train
    caption_job_id: Mapped[str | None]
    captioner: Mapped[str | None]  # engine revision the captions came from
    suffix: Mapped[str | None]
    setting: Mapped[str]  # hash of all that a user chose but the seeds (shared/settings_key.py): a leaderboard row
    tags: Mapped[list[str]] = mapped_column(server_default="{}")
    pinned: Mapped[bool] = mapped_column(server_default="false")  # shown on the leaderboard whatever the filter
    data_fingerprint: Mapped[str]
    storage_key: Mapped[str]
    details: Mapped[dict[str, Any]]  # val metric, best epoch, train seconds, captions used, parameters
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Evaluation(Base):
    """A classifier scored on a split of a data set; its logits are a Parquet file in the store. At most one stands for
    each (classifier, data set, split, head)."""

    __tablename__ = "evaluations"
    __table_args__ = (UniqueConstraint("classifier_id", "dataset_id", "split", "head"),)
    id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    owner: Mapped[str]
    classifier_id: Mapped[str] = mapped_column(ForeignKey("classifiers.id", ondelete="CASCADE"))
    dataset_id: Mapped[str] = mapped_column(index=True)
    split: Mapped[str]
    head: Mapped[str]  # "own", or "zero_shot": the data set's class names through the classifier's text tower
    data_fingerprint: Mapped[str]  # of the data set as it was scored
    predictions_key: Mapped[str]
    images: Mapped[int]
    correct: Mapped[bytes]  # one bit per image, ordered by path: was the top class right (numpy.packbits)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Score(Base):
    """One score per (classifier, data set, split, head, metric)."""

    __tablename__ = "scores"
    __table_args__ = (
        Index(
            "ix_scores_leaderboard",
            "dataset_id",
            "split",
            "metric",
            "head",
            postgresql_include=["classifier_id", "value"],
        ),
    )
    classifier_id: Mapped[str] = mapped_column(ForeignKey("classifiers.id", ondelete="CASCADE"), primary_key=True)
    dataset_id: Mapped[str] = mapped_column(primary_key=True)
    split: Mapped[str] = mapped_column(primary_key=True)
    head: Mapped[str] = mapped_column(primary_key=True)
    metric: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]
    evaluation_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class LeaderboardVersion(Base):
    """Raised by whatever changes what a data set's leaderboard shows: its ETag."""

    __tablename__ = "leaderboard_versions"
    dataset_id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
