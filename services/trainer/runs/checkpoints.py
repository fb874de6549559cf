"""Writes what a run made as a classifier's folder (layout and reader: shared/classifier/folder.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, JsonValue

from services.trainer.training.reports import TrainResult
from shared.classifier.card import ClassifierCard
from shared.classifier.writing import write_folder
from shared.clip.loading import LoadedClip


class Maker(Protocol):
    """What the card says of a method."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Literal["zero_shot", "frozen", "fine_tune"]: ...

    @property
    def hyperparameters(self) -> BaseModel: ...


def write_classifier(
    directory: Path,
    clip: LoadedClip,
    method: Maker,
    result: TrainResult,
    *,
    base_model: str,
    class_names: Sequence[str],
    display_names: Sequence[str],
    data_fingerprint: str,
    seeds: Mapping[str, int],
    shots: int | None,
    validation: Literal["none", "few_shot", "full"],
    provenance: Mapping[str, JsonValue] | None = None,
) -> ClassifierCard:
    """With the weights where the method trains the model, else with the tensors that differ from the base model's.
    clip: the base model that the method was given; the rest as `write_folder`."""
    trains = method.kind == "fine_tune"
    return write_folder(
        directory,
        clip,
        result.head,
        state=result.model_state if trains else None,
        changed=None if trains else result.model_state,
        base_model=base_model,
        class_names=class_names,
        display_names=display_names,
        method=method.name,
        hyperparameters=method.hyperparameters.model_dump(mode="json"),
        data_fingerprint=data_fingerprint,
        seeds=seeds,
        shots=shots,
        validation=validation,
        val_top1=result.val_top1,
        best_epoch=result.best_epoch,
        provenance=provenance,
    )
