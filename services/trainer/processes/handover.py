"""A run as files, for the processes that share it: safetensors, memory-mapped arrays and JSON, no pickle.

base/            the model, as open_clip's local-dir folder
job/             labels, features and, as JSON, everything else that `train` was given
train.npy val.npy   pixels, which the processes map
events.jsonl     what the first process tells, a line each
request.json     where the parent wants the state saved
result/ last/    what came out: weights and head
"""

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.trainer.features import Features
from services.trainer.methods.base import FineTune
from services.trainer.training.data import ImageRows, TrainData
from services.trainer.training.parameters import state_on_cpu
from services.trainer.training.reports import TrainResult
from services.trainer.training.state import read_state, write_state
from shared.classifier.head import Head
from shared.clip.loading import LoadedClip, load_clip, save_clip

_ROWS = 256  # images copied at a time


@dataclass(frozen=True)
class Job:
    clip: LoadedClip
    method: FineTune
    data: TrainData
    features: Features
    seed: int
    resume: Path | None
    device: str  # "cpu" or "cuda"
    keep_last: bool


def write_job(folder: Path, job: Job) -> None:
    save_clip(job.clip, state_on_cpu(job.clip.model), folder / "base")
    of_features = {f.name: getattr(job.features, f.name) for f in fields(Features)}
    tensors = {f"features/{name}": value for name, value in of_features.items() if isinstance(value, Tensor)}
    tensors |= {"labels": job.data.labels, "val_labels": job.data.val_labels}
    for name, images in (("train", job.data.images), ("val", job.data.val_images)):
        _write_images(folder / f"{name}.npy", images)
    method = type(job.method)
    write_state(
        folder / "job",
        {name: value.clone() for name, value in tensors.items()},
        {
            "model": job.clip.name,
            "method": [method.__module__, method.__qualname__, job.method.hyperparameters.model_dump(mode="json")],
            "captions": job.data.captions,
            "class_names": job.data.class_names,
            "features": {name: value for name, value in of_features.items() if not isinstance(value, Tensor)},
            "seed": job.seed,
            "resume": None if job.resume is None else str(job.resume.resolve()),
            "device": job.device,
            "keep_last": job.keep_last,
        },
    )


def read_job(folder: Path) -> Job:
    tensors, meta = read_state(folder / "job")
    module, name, values = meta["method"]
    method: type[FineTune] = getattr(importlib.import_module(module), name)
    clip = load_clip(str(folder / "base"), folder, [folder])
    of_features: dict[str, Any] = dict(meta["features"])
    of_features |= {key.removeprefix("features/"): t for key, t in tensors.items() if key.startswith("features/")}
    return Job(
        clip=replace(clip, name=meta["model"]),
        method=method(method.Hyperparameters.model_validate(values)),
        data=TrainData(
            images=MappedImages(folder / "train.npy"),
            labels=tensors["labels"],
            captions=meta["captions"],
            class_names=meta["class_names"],
            val_images=MappedImages(folder / "val.npy"),
            val_labels=tensors["val_labels"],
        ),
        features=Features(**of_features),
        seed=meta["seed"],
        resume=None if meta["resume"] is None else Path(meta["resume"]),
        device=meta["device"],
        keep_last=meta["keep_last"],
    )


class MappedImages:
    """(N, 3, S, S) uint8 in a .npy file that all processes map."""

    def __init__(self, path: Path) -> None:
        self._pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        self.shape: tuple[int, ...] = self._pixels.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self._pixels[rows.numpy()])  # fancy indexing copies


def _write_images(path: Path, images: Tensor | ImageRows) -> None:
    shape = tuple(images.shape)
    if not len(images):
        np.save(path, np.empty(shape, np.uint8), allow_pickle=False)  # nothing can't be mapped while it is written
        return
    out = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    for start in range(0, len(images), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(images)))
        out[start : start + len(rows)] = images[rows].numpy()
    out.flush()


_TENSORS = ("model_state", "head", "last_state", "last_head")


def write_result(folder: Path, result: TrainResult) -> None:
    numbers = {name: value for name, value in asdict(_without_tensors(result)).items() if name not in _TENSORS}
    write_state(folder / "result", _packed(result.model_state, result.head), {"result": numbers})
    if result.last_state is not None and result.last_head is not None:
        write_state(folder / "last", _packed(result.last_state, result.last_head), {})


def read_result(folder: Path) -> TrainResult | None:
    """None where nothing was written."""
    if not (folder / "result").is_dir():
        return None
    tensors, meta = read_state(folder / "result")
    state, head = _unpacked(tensors)
    last_state, last_head = _unpacked(read_state(folder / "last")[0]) if (folder / "last").is_dir() else (None, None)
    return TrainResult(model_state=state, head=head, last_state=last_state, last_head=last_head, **meta["result"])


def _without_tensors(result: TrainResult) -> TrainResult:
    nothing = Head(torch.empty(0), torch.empty(0))
    return replace(result, model_state={}, head=nothing, last_state=None, last_head=None)


def _packed(state: Mapping[str, Tensor], head: Head) -> dict[str, Tensor]:
    return {f"model/{name}": value for name, value in state.items()} | {"weight": head.weight, "bias": head.bias}


def _unpacked(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Head]:
    state = {key.removeprefix("model/"): value for key, value in tensors.items() if key.startswith("model/")}
    return state, Head(tensors["weight"], tensors["bias"])


class Events:
    """The lines that the first process appends and the parent reads while they come."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "events.jsonl"
        self.path.touch()
        self._read = 0

    def send(self, event: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def new(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file.read().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    return  # still being written
                self._read += len(line)
                yield json.loads(line)


def ask_for_snapshot(folder: Path, directory: Path) -> None:
    temporary = folder / "request.part"
    temporary.write_text(json.dumps({"snapshot": str(directory.resolve())}), encoding="utf-8")
    os.replace(temporary, folder / "request.json")


def asked_for_snapshot(folder: Path) -> Path | None:
    """Where to save the state, if the parent asked; it asks again only when it was answered."""
    path = folder / "request.json"
    try:
        wanted = Path(json.loads(path.read_text(encoding="utf-8"))["snapshot"])
    except FileNotFoundError:
        return None
    path.unlink()
    return wanted
