"""The predictions of an evaluation, kept as a Parquet file in the store: new metrics need no model, and two classifiers
can be compared image by image. No torch. One row per image, in the order of the split (by path):

    image_id  string    path  string    label  int32 (index into the classes)    logits  float32, one per class

The file's metadata holds the class names as JSON under `class_names`. Shapes: N images, C classes."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shared.errors import InvalidInput
from shared.store.storage import Store


@dataclass(frozen=True)
class Kept:
    image_ids: list[str]
    paths: list[str]
    labels: NDArray[np.int64]  # (N,)
    logits: NDArray[np.float32]  # (N, C)
    class_names: list[str]


def write(store: Store, key: str, kept: Kept) -> None:
    """`key` must be new: a file that a row of the database names is never written over."""
    classes = len(kept.class_names)
    values = pa.array(np.ascontiguousarray(kept.logits, dtype=np.float32).reshape(-1))
    table = pa.table(
        {
            "image_id": pa.array(kept.image_ids, pa.string()),
            "path": pa.array(kept.paths, pa.string()),
            "label": pa.array(kept.labels, pa.int32()),
            "logits": pa.FixedSizeListArray.from_arrays(values, classes),
        },
        metadata={"class_names": json.dumps(kept.class_names)},
    )
    with tempfile.TemporaryFile(prefix="captune-") as file:
        pq.write_table(table, file, compression="zstd")
        file.seek(0)
        store.put_file(key, file)


def read(path: Path) -> Kept:
    """Raises InvalidInput where the file is not one of these, or is damaged."""
    try:
        table = pq.read_table(path, partitioning=None)
        class_names = json.loads(table.schema.metadata[b"class_names"])
        logits = table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return Kept(
            image_ids=table["image_id"].to_pylist(),
            paths=table["path"].to_pylist(),
            labels=table["label"].to_numpy().astype(np.int64),
            logits=logits.reshape(table.num_rows, len(class_names)),
            class_names=class_names,
        )
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise InvalidInput(
            f"The predictions in {path.name} can't be read ({error}); score the classifier again.",
            code="bad_predictions",
        ) from error
