"""What `leaderboard_load.py` reads: evaluations as the services leave them behind, written in bulk.

Shapes: N images, S settings, R seeds."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from psycopg import Connection

from services.evaluator.metrics import METRICS
from shared.core import Core
from shared.ids import new_id
from shared.settings_key import setting_of

IMAGES, SEEDS, METRIC_COUNT = 1000, 5, 12
FINGERPRINT, OWNER = "f" * 64, "bench"
METHODS = ("mmft", "flyp", "flyp_ensemble", "cross_entropy", "lp_ft", "lora", "tes", "linear_probe", "gda", "prolip")
MODELS = ("starter", "ViT-B-32-quickgelu/openai", "ViT-B-16/openai", "RN50/openai")
SHOTS = (1, 2, 4, 8, 16, None)
NAMES = [*METRICS, *(f"another_{number}" for number in range(METRIC_COUNT))][:METRIC_COUNT]
COLUMNS = {
    "jobs": "id, kind, owner, dataset_id, status, request",
    "classifiers": "id, owner, job_id, dataset_id, model, method, hyperparameters, shots, shot_seed, seed, protocol, "
    "captioner, setting, tags, pinned, data_fingerprint, storage_key, details",
    "evaluations": "id, owner, classifier_id, dataset_id, split, head, data_fingerprint, predictions_key, images, "
    "correct",
    "scores": "classifier_id, dataset_id, split, head, metric, value, evaluation_id",
}
Rows = dict[str, list[tuple[Any, ...]]]


def add_dataset(connection: Connection[Any], name: str) -> str:
    id = new_id("ds")
    _copy(connection, "jobs", [(id, "ingest", OWNER, id, "succeeded", "{}")])
    connection.execute(
        "INSERT INTO datasets (id, owner, name, domain, archive_key, archive_sha256, archive_bytes, split_seed, "
        "val_fraction, test_fraction, classes, fingerprint) "
        "VALUES (%s, %s, %s, 'pets', %s, '', 1, 0, 0.1, 0.2, '[]', %s)",
        (id, OWNER, name, id, FINGERPRINT),
    )
    return id


def add_evaluations(connection: Connection[Any], dataset_id: str, settings: int, seed: int = 0) -> None:
    """`settings` x R classifiers with one evaluation each, METRIC_COUNT scores of each."""
    for rows in _rows(dataset_id, settings, np.random.default_rng(seed)):
        for name in COLUMNS:
            _copy(connection, name, rows[name])


def _rows(dataset_id: str, settings: int, rng: np.random.Generator) -> Iterator[Rows]:
    easiness = rng.normal(0.5, 1.5, IMAGES)
    for number in range(settings):
        rows: Rows = {name: [] for name in COLUMNS}
        skill = rng.normal(0.5, 0.5)
        correct = rng.random((SEEDS, IMAGES)) < 1 / (1 + np.exp(-(easiness + skill + rng.normal(0, 0.1, (SEEDS, 1)))))
        for run in range(SEEDS):
            _add_run(rows, dataset_id, number, run, correct[run], rng)
        yield rows


def one_evaluation(connection: Connection[Any], dataset_id: str, number: int, seed: int) -> None:
    """One more run of setting `number`, as a worker's last transaction writes it."""
    rng = np.random.default_rng((number, seed))
    rows: Rows = {name: [] for name in COLUMNS}
    _add_run(rows, dataset_id, number, seed, rng.random(IMAGES) < 0.7, rng)
    for name in COLUMNS:
        _copy(connection, name, rows[name])


def _add_run(rows: Rows, dataset_id: str, number: int, seed: int, correct: Any, rng: np.random.Generator) -> None:
    job, classifier, evaluation = new_id("ft"), new_id("clf"), new_id("eval")
    method, model = METHODS[number % len(METHODS)], MODELS[number // len(METHODS) % len(MODELS)]
    shots = SHOTS[number // 40 % len(SHOTS)]
    protocol = ("full", "few_shot", "none")[number % 3]
    hyperparameters = {"epochs": 50, "batch_size": 64, "lr": 1e-5, "w": number / 1000, "weight_decay": 1e-4}
    setting = setting_of(
        protocol=protocol,
        method=method,
        model=model,
        captioner="attributes-3",
        shots=shots,
        hyperparameters=hyperparameters,
        suffix=None,
        captions=None,
    )
    details = {
        **{"train_seconds": 42.5, "caption_seconds": 120.0, "device": "cpu", "peak_memory_bytes": 2**31, "steps": 800},
        **{"val_top1": 0.7, "val_history": [0.7] * 50, "trainable_parameters": 150_000_000, "chosen": {}},
    }
    scores = [float(correct.mean()), *rng.random(METRIC_COUNT - 1).tolist()]
    request = json.dumps({"classifier_id": classifier, "dataset_id": dataset_id, "split": "test", "head": "own"})
    rows["jobs"] += [
        (job, "fine_tune", OWNER, dataset_id, "succeeded", "{}"),
        (evaluation, "evaluate", OWNER, dataset_id, "succeeded", request),
    ]
    chosen = (dataset_id, model, method, json.dumps(hyperparameters), shots, seed, seed, protocol, "attributes-3")
    rows["classifiers"].append(
        (classifier, OWNER, job, *chosen, setting, [], False, FINGERPRINT, classifier, json.dumps(details))
    )
    found = (classifier, dataset_id, "test", "own")
    rows["evaluations"].append(
        (evaluation, OWNER, *found, FINGERPRINT, evaluation, len(correct), np.packbits(correct).tobytes())
    )
    rows["scores"] += [(*found, name, value, evaluation) for name, value in zip(NAMES, scores, strict=True)]


def _copy(connection: Connection[Any], table: str, rows: list[tuple[Any, ...]]) -> None:
    with connection.cursor() as cursor, cursor.copy(f"COPY {table} ({COLUMNS[table]}) FROM STDIN") as out:
        for row in rows:
            out.write_row(row)


def connection_of(core: Core) -> Connection[Any]:
    """A psycopg connection of its own, for COPY; the caller commits and closes it."""
    url = core.settings.database_url.get_secret_value().replace("+psycopg", "")
    return Connection.connect(url)
