"""The Parquet file of an evaluation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from services.evaluator.scoring import predictions
from services.evaluator.scoring.predictions import Kept
from shared.errors import InvalidInput
from shared.store.disk import DiskStore
from shared.store.storage import Store

KEY = "predictions/eval_1-1.parquet"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return DiskStore(tmp_path)


@pytest.fixture
def kept() -> Kept:
    rng = np.random.default_rng(0)
    return Kept(
        image_ids=[f"img_{i}" for i in range(7)],
        paths=[f"cät/{i}.png" for i in range(7)],
        labels=rng.integers(0, 3, 7),
        logits=rng.normal(size=(7, 3)).astype(np.float32),
        class_names=["cät", "dog", 'a "newt"'],
    )


def test_what_was_kept_is_read_back(store: Store, kept: Kept) -> None:
    predictions.write(store, KEY, kept)
    with store.local_file(KEY) as path:
        found = predictions.read(path)
    assert (found.image_ids, found.paths, found.class_names) == (kept.image_ids, kept.paths, kept.class_names)
    np.testing.assert_array_equal(found.labels, kept.labels)
    np.testing.assert_array_equal(found.logits, kept.logits)


def test_any_parquet_reader_reads_it(store: Store, kept: Kept, tmp_path: Path) -> None:
    predictions.write(store, KEY, kept)
    table = pq.read_table(tmp_path / KEY)
    assert table.column_names == ["image_id", "path", "label", "logits"]
    assert [str(table.schema.field(name).type) for name in ("image_id", "label")] == ["string", "int32"]
    assert table["logits"][2].as_py() == pytest.approx(kept.logits[2].tolist())


def test_one_class_and_not_contiguous(store: Store, kept: Kept) -> None:
    wide = np.arange(14, dtype=np.float64).reshape(7, 2)
    predictions.write(store, KEY, replace(kept, logits=wide[:, 1:], class_names=["cat"]))
    with store.local_file(KEY) as path:
        np.testing.assert_array_equal(predictions.read(path).logits, wide[:, 1:])


@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 500])
def test_a_damaged_file_is_refused(store: Store, kept: Kept, tmp_path: Path, spoil) -> None:
    predictions.write(store, KEY, kept)
    path = tmp_path / "damaged.parquet"
    path.write_bytes(spoil((tmp_path / KEY).read_bytes()))
    with pytest.raises(InvalidInput, match="score the classifier again"):
        predictions.read(path)
